// The pass of activation.h. What is NaN or infinite is so in torch.nn.functional's results too.
#include "cpu/activation.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

// Comparisons with NaN are false and keep it.
SNV2_INLINE Vec relu6(Vec v) {
  const Vec positive = v < 0.0f ? Vec{} : v;
  return positive > 6.0f ? Vec{} + 6.0f : positive;
}

// Of the sigmoid n / d, from e^-|v|, which cannot overflow.
struct Fraction {
  Vec numerator;
  Vec denominator;
};
SNV2_INLINE Fraction sigmoid(Vec v) {
  const Vec minus_magnitude = reinterpret_cast<Vec>(reinterpret_cast<VecBits>(v) | 0x80000000u);
  const Vec e = exp_negative(minus_magnitude);
  return {v > 0.0f ? Vec{} + 1.0f : e, e + 1.0f};
}

template <Activation kKind>
SNV2_INLINE Vec activated(Vec v, Vec slope) {
  switch (kKind) {
    case Activation::kRelu:
      return relu(v);
    case Activation::kIdentity:
      return v;
    case Activation::kRelu6:
      return relu6(v);
    case Activation::kLeakyRelu:
    case Activation::kPrelu:
      return v > 0.0f ? v : v * slope;
    case Activation::kSilu: {
      const Fraction f = sigmoid(v);
      return v * f.numerator / f.denominator;
    }
    case Activation::kHardswish:
      return v * (relu6(v + 3.0f) * (1.0f / 6.0f));
    case Activation::kSigmoid: {
      const Fraction f = sigmoid(v);
      return f.numerator / f.denominator;
    }
    case Activation::kHardsigmoid:
      return relu6(v + 3.0f) * (1.0f / 6.0f);
  }
  __builtin_unreachable();
}

template <Activation kKind, class Out>
void pass(const Act& act, int64_t panels, const float* x, int64_t x_panel, int64_t pixels, Out* y,
          int64_t y_panel) {
  constexpr bool kSloped = kKind == Activation::kLeakyRelu || kKind == Activation::kPrelu;
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
      const Vec slope = kSloped ? load(act.slopes + panel * kPanel + lane) : Vec{};
      const float* const in = x + panel * x_panel + lane;
      Out* const out = y + panel * y_panel + lane;
      for (int64_t p = 0; p < pixels * kPanel; p += kPanel) {
        store(out + p, activated<kKind>(load(in + p), slope));
      }
    }
  }
}

template <class Out>
void any_pass(const Act& act, int64_t panels, const float* x, int64_t x_panel, int64_t pixels,
              Out* y, int64_t y_panel) {
  const auto run = [&](auto kind) {
    pass<decltype(kind)::value>(act, panels, x, x_panel, pixels, y, y_panel);
  };
#define SNV2_CASE(name)  \
  case Activation::name: \
    return run(std::integral_constant<Activation, Activation::name>{})
  switch (act.kind) {
    SNV2_CASE(kRelu);
    SNV2_CASE(kIdentity);
    SNV2_CASE(kRelu6);
    SNV2_CASE(kLeakyRelu);
    SNV2_CASE(kPrelu);
    SNV2_CASE(kSilu);
    SNV2_CASE(kHardswish);
    SNV2_CASE(kSigmoid);
    SNV2_CASE(kHardsigmoid);
  }
#undef SNV2_CASE
}

}  // namespace

void activate(const Act& act, int64_t panels, const float* x, int64_t x_panel, int64_t pixels,
              float* y, int64_t y_panel) {
  any_pass(act, panels, x, x_panel, pixels, y, y_panel);
}

#if defined(SNV2_BFLOAT16_MAPS)
void activate(const Act& act, int64_t panels, const float* x, int64_t x_panel, int64_t pixels,
              BFloat16* y, int64_t y_panel) {
  any_pass(act, panels, x, x_panel, pixels, y, y_panel);
}
#endif

}  // namespace snv2::cpu::SNV2_ISA
