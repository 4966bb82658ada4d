// Multiply-adds in registers, as fast as this instruction set can.
#include "cpu/tile.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

// Independent sums hide the latency of a multiply-add: 4 cycles at 2 a cycle on x86, at 4 on ARM.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24;  // of 32 registers
#else
constexpr int kSums = 12;  // of 16
#endif

// A sum that the product itself changes, or is opaque: nothing to take out of the loop.
SNV2_INLINE Vec next(Vec sum, Vec half, float) { return sum * half + half; }
#if defined(SNV2_BFLOAT16_MAPS)
SNV2_INLINE Vec next(Vec sum, Vec half, BFloat16) {
  Product<BFloat16>::multiply_add(half, half, sum);
  return sum;
}
#endif

}  // namespace

int64_t multiply_adds(int64_t count) {
  const volatile float opaque = 0.5f;  // as good as any where it stands for two of bfloat16
  const Vec half = Vec{} + opaque;
  Vec sum[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sum[i] = half * static_cast<float>(i);
  const int64_t rounds = ceil_div(count, kSums * kLanes * kWordPlanes);
#pragma GCC unroll 1
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sum[i] = next(sum[i], half, Element{});
  }
  Vec total = sum[0];
  for (int i = 1; i < kSums; ++i) total += sum[i];
  volatile float used = 0;
  for (int lane = 0; lane < kLanes; ++lane) used = total[lane];
  static_cast<void>(used);
  return rounds * kSums * kLanes * kWordPlanes;
}

}  // namespace snv2::cpu::SNV2_ISA
