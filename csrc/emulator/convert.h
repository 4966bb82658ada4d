// Bits of numbers, in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

namespace snv2::emulator {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float bfloat16_to_float(uint16_t bits) { return float_of(uint32_t{bits} << 16); }

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{bits & 0x7fffu} << 13;
  // Subnormal: mantissa / 2^24, as a difference of normal values.
  const uint32_t small = bits_of(float_of(0x38800000u | magnitude) - 0x1p-14f);
  const uint32_t large = magnitude + 0x38000000u;
  const uint32_t special = magnitude | 0x7f800000u;
  return float_of(sign | (magnitude < 0x00800000u    ? small
                          : magnitude >= 0x0f800000u ? special
                                                     : large));
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fffu : rounded);  // the GPU's one NaN
}

inline uint16_t float_to_half(float value) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffu;  // the GPU's one NaN
  uint32_t half;
  if (magnitude >= 0x477ff000u) {  // rounds past 65504
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: let the FPU round at 2^-24
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

inline uint32_t float_to_tf32(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
  if ((bits & 0x7fffffffu) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

inline float max_nan(float a, float b) {
  if (a != a || b != b) return float_of(0x7fffffffu);  // the GPU's one NaN
  if (a == b) return float_of(bits_of(a) & bits_of(b));
  return a > b ? a : b;
}

}  // namespace snv2::emulator
