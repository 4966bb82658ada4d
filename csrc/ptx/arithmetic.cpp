// Floating-point arithmetic: in float, and of pairs of 16-bit numbers.
#include <cfenv>

#include "ptx/numbers.h"
#include "ptx/operations.h"

namespace snv2::ptx {
namespace {

float flushed(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

struct Add {
  static float of(float a, float b) { return canonical(a + b); }
};
struct Subtract {
  static float of(float a, float b) { return canonical(a - b); }
};
struct Multiply {
  static float of(float a, float b) { return canonical(a * b); }
};
struct MultiplyAdd {
  static float of(float a, float b, float c) { return canonical(std::fma(a, b, c)); }
};
struct Divide {
  static float of(float a, float b) { return canonical(a / b); }
};
// Where 2^126 < |b| < 2^128 it makes 0, or NaN of an infinite a. Elsewhere 2 ulp are allowed.
struct DivideApproximately {
  static float of(float a, float b) {
    if (std::fabs(b) <= 0x1p126f || std::isinf(b) || std::isnan(a)) return Divide::of(a, b);
    return std::isinf(a) ? canonical(NAN) : std::copysign(0.0f, a) * std::copysign(1.0f, b);
  }
};
struct Reciprocal {
  static float of(float a) { return canonical(1.0f / a); }
};
struct Exp2 {
  static float of(float a) {
    return flushed(canonical(static_cast<float>(std::exp2(double{flushed(a)}))));
  }
};
struct Negate {
  static float of(float a) { return as_float(as_bits(a) ^ 0x80000000u); }
};
struct Absolute {
  static float of(float a) { return as_float(as_bits(a) & 0x7fffffffu); }
};
struct Saturate {
  static float of(float a) { return a > 1.0f ? 1.0f : a > 0.0f ? a : 0.0f; }  // NaN is 0
};

// -0 is less than +0.
bool is_less(float a, float b) { return a == b ? std::signbit(a) : a < b; }
template <bool kMaximum, bool kPropagatesNan>
struct Extreme {
  static float of(float a, float b) {
    if (std::isnan(a) || std::isnan(b)) {
      return kPropagatesNan || (std::isnan(a) && std::isnan(b)) ? canonical(NAN)
             : std::isnan(a)                                    ? b
                                                                : a;
    }
    return is_less(a, b) == kMaximum ? b : a;
  }
};
template <bool kMaximum, float (*kValue)(uint16_t)>
struct ExtremeOfPairs {
  static uint32_t of(uint32_t a, uint32_t b) {
    uint32_t pair = 0;
    for (const int shift : {0, 16}) {
      const auto one = static_cast<uint16_t>(a >> shift), other = static_cast<uint16_t>(b >> shift);
      const float x = kValue(one), y = kValue(other);
      const bool second = is_less(x, y) == kMaximum;
      pair |= (std::isnan(x) || std::isnan(y) ? 0x7fffu : second ? other : one) << shift;
    }
    return pair;
  }
};

// Rounded as `kMode` says, which the compiler must not know of.
template <int kMode>
void multiply_add_rounded(Warp& w, const Instruction& i, uint32_t mask) {
  const float* const a = lanes_at<float>(w, i.a);
  const float* const b = lanes_at<float>(w, i.b);
  const float* const c = lanes_at<float>(w, i.c);
  alignas(Block) float d[kLanes];
  const int before = std::fegetround();
  std::fesetround(kMode);
  for (uint32_t l = 0; l < kLanes; ++l) {
    volatile float x = a[l], y = b[l], z = c[l];
    volatile float sum = std::fma(x, y, z);
    d[l] = canonical(sum);
  }
  std::fesetround(before);
  put(w, i.d, d, mask);
}

struct Equal {
  static bool of(float a, float b) { return a == b; }
};
struct NotEqual {
  static bool of(float a, float b) { return a < b || a > b; }
};
struct Less {
  static bool of(float a, float b) { return a < b; }
};
struct LessOrEqual {
  static bool of(float a, float b) { return a <= b; }
};
template <class F>
struct Swapped {
  static bool of(float a, float b) { return F::of(b, a); }
};
// True of NaN.
template <class F>
struct Not {
  static bool of(float a, float b) { return !F::of(a, b); }
};

}  // namespace

void add_arithmetic(Operations& all) {
  all["add.f32"] = all["add.rn.f32"] = binary<float, float, float, Add>;
  all["sub.f32"] = all["sub.rn.f32"] = binary<float, float, float, Subtract>;
  all["mul.f32"] = all["mul.rn.f32"] = binary<float, float, float, Multiply>;
  all["fma.rn.f32"] = ternary<float, float, float, MultiplyAdd>;
  all["fma.rm.f32"] = multiply_add_rounded<FE_DOWNWARD>;
  all["div.rn.f32"] = binary<float, float, float, Divide>;
  all["div.approx.f32"] = binary<float, float, float, DivideApproximately>;
  all["rcp.rn.f32"] = unary<float, float, Reciprocal>;
  all["ex2.approx.ftz.f32"] = unary<float, float, Exp2>;
  all["neg.f32"] = unary<float, float, Negate>;
  all["abs.f32"] = unary<float, float, Absolute>;
  all["cvt.sat.f32.f32"] = unary<float, float, Saturate>;
  all["max.f32"] = binary<float, float, float, Extreme<true, false>>;
  all["min.f32"] = binary<float, float, float, Extreme<false, false>>;
  all["max.NaN.f32"] = binary<float, float, float, Extreme<true, true>>;
  all["min.NaN.f32"] = binary<float, float, float, Extreme<false, true>>;
  all["max.NaN.f16x2"] = binary<uint32_t, uint32_t, uint32_t, ExtremeOfPairs<true, half_value>>;
  all["max.NaN.bf16x2"] =
      binary<uint32_t, uint32_t, uint32_t, ExtremeOfPairs<true, bfloat16_value>>;
  all["setp.eq.f32"] = compare<float, Equal>;
  all["setp.ne.f32"] = compare<float, NotEqual>;
  all["setp.lt.f32"] = compare<float, Less>;
  all["setp.le.f32"] = compare<float, LessOrEqual>;
  all["setp.gt.f32"] = compare<float, Swapped<Less>>;
  all["setp.ge.f32"] = compare<float, Swapped<LessOrEqual>>;
  all["setp.equ.f32"] = compare<float, Not<NotEqual>>;
  all["setp.neu.f32"] = compare<float, Not<Equal>>;
  all["setp.ltu.f32"] = compare<float, Not<Swapped<LessOrEqual>>>;
  all["setp.leu.f32"] = compare<float, Not<Swapped<Less>>>;
  all["setp.gtu.f32"] = compare<float, Not<LessOrEqual>>;
  all["setp.geu.f32"] = compare<float, Not<Less>>;
}

}  // namespace snv2::ptx
