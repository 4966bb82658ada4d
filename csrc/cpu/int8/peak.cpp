// Products of bytes in registers, as fast as this instruction set can.
#include "cpu/int8/kernels.h"
#include "cpu/int8/vectors.h"

namespace snv2::cpu::SNV2_ISA::int8 {

namespace {

// Makes a vector one that the compiler knows nothing of, so that no product leaves the loop.
SNV2_INLINE void hide(Ints& v) {
#if defined(__x86_64__)
  asm volatile("" : "+v"(v));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(v));
#else
  asm volatile("" : "+m"(v));
#endif
}
#if !defined(__AVX512VNNI__) && !defined(__AVXVNNI__) && !defined(__aarch64__)
SNV2_INLINE void hide(Planes<Ints>& x) {
  hide(x.even);
  hide(x.odd);
}
#endif

}  // namespace

int64_t multiply_adds(int64_t count) {
#if defined(__AVX512F__) || defined(__aarch64__)
  constexpr int kSums = 24;  // of 32 registers
#else
  constexpr int kSums = 10;  // of 16
#endif
  constexpr int64_t kProducts = kSums * kLanes * 4;  // of a round
  const volatile int32_t opaque = 0x01020304;
  Planes<Ints> x = planes(Ints{} + opaque);
  const Weights<Ints> w = weights(Ints{} + opaque);
  Ints sums[kSums] = {};
  const int64_t rounds = ceil_div(count, kProducts);
#pragma GCC unroll 1
  for (int64_t round = 0; round < rounds; ++round) {
    unroll<kSums>([&](auto i) SNV2_INLINED {
      hide(x);
      dot(x, w, sums[i]);
    });
  }
  volatile int32_t used = 0;
  for (int i = 0; i < kSums; ++i) used = sums[i][0];
  static_cast<void>(used);
  return rounds * kProducts;
}

}  // namespace snv2::cpu::SNV2_ISA::int8
