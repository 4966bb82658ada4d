// float32 <-> float16 / bfloat16, round to nearest even, NaN kept.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu/simd.h"

namespace snv2::cpu::SNV2_ISA {

struct Half {
  uint16_t bits;
};

SNV2_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

SNV2_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SNV2_INLINE float to_float(float value) { return value; }

SNV2_INLINE float to_float(BFloat16 value) { return from_bits(uint32_t{value.bits} << 16); }

SNV2_INLINE float to_float(Half value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  if (magnitude >= 0x0f800000u) return from_bits(sign | magnitude | 0x7f800000u);  // inf, NaN
  // 2^112 moves the exponent's bias from 15 to 127 and normalises subnormals on the way.
  return from_bits(sign | bits_of(from_bits(magnitude) * from_bits(0x77800000u)));
#endif
}

SNV2_INLINE void from_float(float value, float& out) { out = value; }

SNV2_INLINE void from_float(float value, BFloat16& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40u : rounded);
}

SNV2_INLINE void from_float(float value, Half& out) {
#if defined(__F16C__)
  out.bits = static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds past 65504
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal half: let the FPU round at 2^-24
    half = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
#endif
}

template <class In, class Out>
SNV2_INLINE void convert(In value, Out& out) {
  from_float(to_float(value), out);
}

template <class T>
SNV2_INLINE void convert(T value, T& out) {
  out = value;
}

// n elements `stride` apart to consecutive ones, and back.
template <class In, class Out>
SNV2_INLINE void read_elements(const In* x, int64_t stride, int64_t n, Out* y) {
  if (stride == 1) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) convert(x[i], y[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) convert(x[i * stride], y[i]);
  }
}

template <class T>
SNV2_INLINE void write_floats(const float* x, int64_t n, T* y, int64_t stride) {
  if (stride == 1) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) from_float(x[i], y[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) from_float(x[i], y[i * stride]);
  }
}

// Calls f with a value of the element type.
template <class F>
SNV2_INLINE void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kUint8:
      break;  // images of plans of integers only, which tell them themselves
  }
}

}  // namespace snv2::cpu::SNV2_ISA
