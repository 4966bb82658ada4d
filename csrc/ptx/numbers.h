// Bits of floating-point numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace snv2::ptx {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The NaN that arithmetic makes.
inline float canonical(float value) { return std::isnan(value) ? as_float(0x7fffffffu) : value; }

inline float half_value(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
}
inline uint16_t half_bits(float value) {
  if (std::isnan(value)) return 0x7fff;
  const auto half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

inline float bfloat16_value(uint16_t bits) { return as_float(uint32_t{bits} << 16); }
inline uint16_t bfloat16_bits(float value) {
  if (std::isnan(value)) return 0x7fff;
  const uint32_t bits = as_bits(value);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);  // ties to even
}

// The bits that tensor cores look at.
constexpr uint32_t kTf32Bits = 0xffffe000u;

}  // namespace snv2::ptx
