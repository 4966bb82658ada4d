// Bodies of isa.h for the GPU: arithmetic and conversions. isa_nvidia.h includes it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "cuda/isa_nvidia.h"

namespace snv2::SNV2_GPU {

// a b + c, rounded once.
SNV2_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Conversions -----------------------------------------------------------------------------

SNV2_DEVICE float to_float(float value) { return value; }
SNV2_DEVICE float to_float(half_t value) { return __half2float(__ushort_as_half(value.bits)); }
SNV2_DEVICE float to_float(bfloat16_t value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
SNV2_DEVICE void from_float(float value, float& out) { out = value; }
SNV2_DEVICE void from_float(float value, half_t& out) {
  out.bits = __half_as_ushort(__float2half_rn(value));
}
SNV2_DEVICE void from_float(float value, bfloat16_t& out) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// Unpacks a number of a word: in one instruction, where the compiler would move the bits from one
// register to another.
SNV2_DEVICE float low_bfloat16_to_float(uint32_t word) {
  float value;
  asm("shl.b32 %0, %1, 16;" : "=f"(value) : "r"(word));
  return value;
}
SNV2_DEVICE float high_bfloat16_to_float(uint32_t word) {
  float value;
  asm("and.b32 %0, %1, 0xffff0000;" : "=f"(value) : "r"(word));
  return value;
}

// Unpacks the two numbers of a word.
template <class T>
SNV2_DEVICE void to_floats(uint32_t word, float (&values)[2]) {
  if constexpr (std::is_same_v<T, half_t>) {
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(values[0]), "=f"(values[1])
        : "r"(word));
  } else {
    static_assert(std::is_same_v<T, bfloat16_t>);
    values[0] = low_bfloat16_to_float(word);
    values[1] = high_bfloat16_to_float(word);
  }
}

// Unpacks one of them.
template <class T>
SNV2_DEVICE float low_to_float(uint32_t word) {
  if constexpr (std::is_same_v<T, half_t>) {
    float value;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}"
        : "=f"(value)
        : "r"(word));
    return value;
  } else {
    static_assert(std::is_same_v<T, bfloat16_t>);
    return low_bfloat16_to_float(word);
  }
}
template <class T>
SNV2_DEVICE float high_to_float(uint32_t word) {
  if constexpr (std::is_same_v<T, half_t>) {
    float value;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}"
        : "=f"(value)
        : "r"(word));
    return value;
  } else {
    static_assert(std::is_same_v<T, bfloat16_t>);
    return high_bfloat16_to_float(word);
  }
}

// Two numbers, each rounded.
template <class T>
SNV2_DEVICE Vector<T, 2> rounded_pair(float a, float b) {
  Vector<T, 2> pair;
  if constexpr (std::is_same_v<T, half_t>) {
    const __half2 bits = __floats2half2_rn(a, b);
    memcpy(&pair, &bits, sizeof pair);
  } else {
    const __nv_bfloat162 bits = __floats2bfloat162_rn(a, b);
    memcpy(&pair, &bits, sizeof pair);
  }
  return pair;
}

// float32 rounded to the nearest tf32, ties away from zero.
SNV2_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#else
  __trap();
#endif
  return bits;
}

// Both within two units in the last place; so much the emulator's are apart from them.
SNV2_DEVICE float exponential(float x) { return expf(x); }
// Of 2^-126 to 2^126.
SNV2_DEVICE float reciprocal(float x) { return __fdividef(1.0f, x); }

// The larger one, +0 being larger than -0; NaN if one of them is NaN.
SNV2_DEVICE float max_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  if (a == b) return __uint_as_float(__float_as_uint(a) & __float_as_uint(b));
  return a > b || a != a ? a : b;
#endif
}

// As torch's: NaN stays NaN.
SNV2_DEVICE float relu(float value) { return value < 0.0f ? 0.0f : value; }

#if __CUDA_ARCH__ >= 800
#define SNV2_MAX_NAN(T, TYPE)                                                      \
  SNV2_DEVICE Vector<T, 2> max_nan(const Vector<T, 2>& a, const Vector<T, 2>& b) { \
    uint32_t bits_a, bits_b, larger;                                               \
    memcpy(&bits_a, &a, sizeof bits_a);                                            \
    memcpy(&bits_b, &b, sizeof bits_b);                                            \
    asm("max.NaN." TYPE " %0, %1, %2;" : "=r"(larger) : "r"(bits_a), "r"(bits_b)); \
    Vector<T, 2> out;                                                              \
    memcpy(&out, &larger, sizeof out);                                             \
    return out;                                                                    \
  }
#else
#define SNV2_MAX_NAN(T, TYPE)                                                           \
  SNV2_DEVICE Vector<T, 2> max_nan(const Vector<T, 2>& a, const Vector<T, 2>& b) {      \
    Vector<T, 2> out;                                                                   \
    for (int i = 0; i < 2; ++i) {                                                       \
      from_float(max_nan(to_float(a.values[i]), to_float(b.values[i])), out.values[i]); \
    }                                                                                   \
    return out;                                                                         \
  }
#endif
SNV2_MAX_NAN(half_t, "f16x2")
SNV2_MAX_NAN(bfloat16_t, "bf16x2")
#undef SNV2_MAX_NAN

}  // namespace snv2::SNV2_GPU
