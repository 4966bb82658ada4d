// Conversions between types, and moves.
#include <cmath>
#include <limits>

#include "ptx/numbers.h"
#include "ptx/operations.h"

namespace snv2::ptx {
namespace {

template <class D, class S>
struct Convert {
  static D of(S a) { return static_cast<D>(a); }
};
// Of the lower bits of a register.
template <class D, class S>
struct ConvertLow {
  static D of(uint64_t a) { return static_cast<D>(static_cast<S>(a)); }
};
struct HalfToFloat {
  static float of(uint16_t a) { return canonical(half_value(a)); }
};
struct FloatToHalf {
  static uint16_t of(float a) { return half_bits(a); }
};
struct Bfloat16ToFloat {
  static float of(uint16_t a) { return canonical(bfloat16_value(a)); }
};
struct FloatToBfloat16 {
  static uint16_t of(float a) { return bfloat16_bits(a); }
};
// Toward zero, and the nearest there is of what does not fit; NaN is zero.
struct FloatToInteger {
  static int32_t of(float a) {
    if (std::isnan(a)) return 0;
    if (a >= 0x1p31f) return std::numeric_limits<int32_t>::max();
    if (a < -0x1p31f) return std::numeric_limits<int32_t>::min();
    return static_cast<int32_t>(a);
  }
};
// b is the lower half.
template <uint16_t (*kBits)(float)>
struct FloatsToPair {
  static uint32_t of(float a, float b) { return uint32_t{kBits(a)} << 16 | kBits(b); }
};
// Ties away from zero; what the lower bits then hold is not documented.
struct FloatToTf32 {
  static uint32_t of(float a) {
    if (std::isnan(a)) return 0x7fffffffu;
    return std::isinf(a) ? as_bits(a) : (as_bits(a) + 0x1000u) & kTf32Bits;
  }
};

template <class D, class S>
void add_integer(Operations& all, const std::string& to, const std::string& from) {
  all["cvt." + to + "." + from] = unary<D, S, Convert<D, S>>;
  all["cvt." + to + "." + from + " of 8"] = unary<D, uint64_t, ConvertLow<D, S>>;
}
template <class S>
void add_integers_from(Operations& all, const std::string& from) {
  add_integer<uint16_t, S>(all, "u16", from);
  add_integer<int16_t, S>(all, "s16", from);
  add_integer<uint32_t, S>(all, "u32", from);
  add_integer<int32_t, S>(all, "s32", from);
  add_integer<uint64_t, S>(all, "u64", from);
  add_integer<int64_t, S>(all, "s64", from);
  all["cvt.rn.f32." + from] = unary<float, S, Convert<float, S>>;
}

// mov d, {...}: the first part is the lowest.
template <class D, class Part, size_t kParts>
void pack(Warp& w, const Instruction& i, uint32_t mask) {
  alignas(Block) D d[kLanes] = {};
  for (size_t k = 0; k < kParts; ++k) {
    const Part* const part = lanes_at<Part>(w, operand_of(w, i, k));
    for (uint32_t l = 0; l < kLanes; ++l) {
      d[l] |= static_cast<D>(static_cast<D>(part[l]) << 8 * sizeof(Part) * k);
    }
  }
  put(w, i.d, d, mask);
}
// mov {...}, a, where a may be one of the parts.
template <class A, class Part, size_t kParts>
void unpack(Warp& w, const Instruction& i, uint32_t mask) {
  alignas(Block) A a[kLanes];
  std::memcpy(a, lanes_at<A>(w, i.a), sizeof a);
  for (size_t k = 0; k < kParts; ++k) {
    const Place place = operand_of(w, i, k);
    if (place == kNowhere) continue;
    alignas(Block) Part part[kLanes];
    for (uint32_t l = 0; l < kLanes; ++l) {
      part[l] = static_cast<Part>(a[l] >> 8 * sizeof(Part) * k);
    }
    put(w, place, part, mask);
  }
}

void to_generic_shared(Warp& w, const Instruction& i, uint32_t mask) {
  const uint64_t* const a = lanes_at<uint64_t>(w, i.a);
  alignas(Block) uint64_t d[kLanes];
  for (uint32_t l = 0; l < kLanes; ++l) d[l] = a[l] | kSharedWindow;
  put(w, i.d, d, mask);
}
template <uint64_t kWindow>
void from_generic(Warp& w, const Instruction& i, uint32_t mask) {
  const uint64_t* const a = lanes_at<uint64_t>(w, i.a);
  alignas(Block) uint64_t d[kLanes] = {};
  for_lanes(mask, [&](uint32_t l) {
    if ((a[l] & kWindows) != kWindow) fault(w, i, l, "an address of another space");
    d[l] = a[l] & ~kWindows;
  });
  put(w, i.d, d, mask);
}

}  // namespace

void add_conversions(Operations& all) {
  add_integers_from<uint16_t>(all, "u16");
  add_integers_from<int16_t>(all, "s16");
  add_integers_from<uint32_t>(all, "u32");
  add_integers_from<int32_t>(all, "s32");
  add_integers_from<uint64_t>(all, "u64");
  add_integers_from<int64_t>(all, "s64");
  all["cvt.f32.f16"] = unary<float, uint16_t, HalfToFloat>;
  all["cvt.rn.f16.f32"] = unary<uint16_t, float, FloatToHalf>;
  all["cvt.f32.bf16"] = unary<float, uint16_t, Bfloat16ToFloat>;
  all["cvt.rn.bf16.f32"] = unary<uint16_t, float, FloatToBfloat16>;
  all["cvt.rn.f16x2.f32"] = binary<uint32_t, float, float, FloatsToPair<half_bits>>;
  all["cvt.rn.bf16x2.f32"] = binary<uint32_t, float, float, FloatsToPair<bfloat16_bits>>;
  all["cvt.rzi.s32.f32"] = unary<int32_t, float, FloatToInteger>;
  all["cvt.rna.tf32.f32"] = unary<uint32_t, float, FloatToTf32>;
  for (const std::string kind : {"b", "u", "s"}) {
    all["mov." + kind + "16"] = unary<uint16_t, uint16_t, Convert<uint16_t, uint16_t>>;
    all["mov." + kind + "32"] = unary<uint32_t, uint32_t, Convert<uint32_t, uint32_t>>;
    all["mov." + kind + "64"] = unary<uint64_t, uint64_t, Convert<uint64_t, uint64_t>>;
  }
  all["mov.f32"] = all["mov.b32"];
  all["pack.4.2"] = pack<uint32_t, uint16_t, 2>;
  all["pack.8.4"] = pack<uint64_t, uint32_t, 2>;
  all["pack.8.2"] = pack<uint64_t, uint16_t, 4>;
  all["unpack.4.2"] = unpack<uint32_t, uint16_t, 2>;
  all["unpack.8.4"] = unpack<uint64_t, uint32_t, 2>;
  all["unpack.8.2"] = unpack<uint64_t, uint16_t, 4>;
  all["cvta.shared.u64"] = to_generic_shared;
  all["cvta.to.global.u64"] = from_generic<0>;
  all["cvta.to.shared.u64"] = from_generic<kSharedWindow>;
}

}  // namespace snv2::ptx
