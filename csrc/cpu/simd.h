// Vectors of float in the compiler's own vector types: the same source gives AVX-512, AVX2 and
// SSE2 or NEON code, depending on the flags it is compiled with.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

#ifndef SNV2_ISA
#error "SNV2_ISA names the namespace of this instruction set"
#endif

#define SNV2_INLINE inline __attribute__((always_inline))

namespace snv2::cpu::SNV2_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
// 7 x 2 accumulators in two chains, 2 weights, 1 input: 31 of 32 registers. 14 pixels in one
// chain are no faster, and less exact.
inline constexpr int kMaxPixels = 7;
inline constexpr int kMaxPanels = 2;
inline constexpr int kMaxPixels3 = 8;  // with three panels: 24 + 3 + 1
inline constexpr int kAccumulators = 28;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kMaxPixels = 6;  // 6 x 2 accumulators, 2 weights, 1 input: 15 registers
inline constexpr int kMaxPanels = 1;
inline constexpr int kMaxPixels3 = 0;
inline constexpr int kAccumulators = 12;
#elif defined(__aarch64__)
inline constexpr int kVectorBytes = 16;
inline constexpr int kMaxPixels = 6;  // 6 x 4 accumulators, 4 weights, 1 input: 29 registers
inline constexpr int kMaxPanels = 1;
inline constexpr int kMaxPixels3 = 0;
inline constexpr int kAccumulators = 24;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kMaxPixels = 3;  // 3 x 4 accumulators: the rest comes from memory
inline constexpr int kMaxPanels = 1;
inline constexpr int kMaxPixels3 = 0;
inline constexpr int kAccumulators = 12;
#endif

inline constexpr int kLanes = kVectorBytes / 4;
inline constexpr int kVecs = kPanel / kLanes;  // vectors in a panel
static_assert(kVecs * kLanes == kPanel);

using Vec = float __attribute__((vector_size(kVectorBytes)));
using VecUnaligned = float __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

SNV2_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
SNV2_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }

// A NaN passes through, as in torch.relu, and -0 becomes +0, which max_relu relies on.
SNV2_INLINE Vec relu(Vec v) { return Vec{} >= v ? Vec{} : v; }

using VecBits = uint32_t __attribute__((vector_size(kVectorBytes)));

// Larger of two results of relu. As unsigned integers they order like floats, and a NaN of
// either sign is above all numbers, so that it passes through as in torch's max pooling.
SNV2_INLINE Vec max_relu(Vec a, Vec b) {
  const VecBits x = reinterpret_cast<VecBits>(a);
  const VecBits y = reinterpret_cast<VecBits>(b);
  return reinterpret_cast<Vec>(x > y ? x : y);
}

}  // namespace snv2::cpu::SNV2_ISA
