// What the lanes of a warp make together. It runs once all of them are there.
#include <cstring>

#include "emulator/convert.h"
#include "emulator/machine.h"

namespace snv2::emulator {
namespace {

void exchange(void* const* payloads, uint32_t mask) {
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    auto& to = *static_cast<Exchange*>(payloads[lane]);
    to.result = (mask >> to.source & 1) != 0 ? static_cast<Exchange*>(payloads[to.source])->value
                                             : ~uint64_t{0};
  }
}

template <int kMatrices, bool kTransposed>
void load_matrices(void* const* payloads, uint32_t) {
  for (uint32_t m = 0; m < kMatrices; ++m) {
    uint16_t matrix[8][8];
    for (uint32_t r = 0; r < 8; ++r) {
      std::memcpy(matrix[r], static_cast<MatrixRows*>(payloads[8 * m + r])->row, 16);
    }
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      const uint32_t i = lane / 4, j = lane % 4 * 2;
      const uint32_t low = kTransposed ? matrix[j][i] : matrix[i][j];
      const uint32_t high = kTransposed ? matrix[j + 1][i] : matrix[i][j + 1];
      static_cast<MatrixRows*>(payloads[lane])->d[m] = low | high << 16;
    }
  }
}

// D[16][8] += A[16][K] B[K][8]; products are exact in double, and the sum is rounded once.
template <int K>
void multiply(const double (&a)[16][K], const double (&b)[K][8], void* const* payloads) {
  double d[16][8];
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const float* mine = static_cast<Fragments*>(payloads[lane])->d;
    for (uint32_t i = 0; i < 4; ++i) d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = mine[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < K; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    float* mine = static_cast<Fragments*>(payloads[lane])->d;
    for (uint32_t i = 0; i < 4; ++i) {
      mine[i] = static_cast<float>(d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
    }
  }
  machine->count_mma();
}

template <float (*to_float)(uint16_t)>
void multiply_16(void* const* payloads, uint32_t) {
  double a[16][16], b[16][8];
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const Fragments& f = *static_cast<Fragments*>(payloads[lane]);
    const uint32_t g = lane / 4, t = lane % 4;
    for (uint32_t i = 0; i < 2; ++i) {
      const auto element = [i](uint32_t word) {
        return to_float(static_cast<uint16_t>(word >> (16 * i)));
      };
      for (uint32_t r = 0; r < 4; ++r) a[g + r % 2 * 8][2 * t + i + r / 2 * 8] = element(f.a[r]);
      for (uint32_t r = 0; r < 2; ++r) b[2 * t + i + r * 8][g] = element(f.b[r]);
    }
  }
  multiply(a, b, payloads);
}

void multiply_tf32(void* const* payloads, uint32_t) {
  double a[16][8], b[8][8];
  const auto tf32 = [](uint32_t bits) { return float_of(bits & 0xffffe000u); };
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const Fragments& f = *static_cast<Fragments*>(payloads[lane]);
    const uint32_t g = lane / 4, t = lane % 4;
    for (uint32_t r = 0; r < 4; ++r) a[g + r % 2 * 8][t + r / 2 * 4] = tf32(f.a[r]);
    for (uint32_t r = 0; r < 2; ++r) b[t + r * 4][g] = tf32(f.b[r]);
  }
  multiply(a, b, payloads);
}

Combine combine_ldmatrix(int matrices, bool transposed) {
  switch (matrices) {
    case 1:
      return transposed ? load_matrices<1, true> : load_matrices<1, false>;
    case 2:
      return transposed ? load_matrices<2, true> : load_matrices<2, false>;
    default:
      return transposed ? load_matrices<4, true> : load_matrices<4, false>;
  }
}

}  // namespace

void shuffle(const char* name, uint32_t mask, Exchange& mine, Site site) {
  machine->collective(name, mask, &mine, exchange, site);
}
void ldmatrix(int matrices, bool transposed, MatrixRows& mine, Site site) {
  machine->collective("ldmatrix", ~uint32_t{0}, &mine, combine_ldmatrix(matrices, transposed),
                      site);
}
void mma_f16(Fragments& mine, Site site) {
  machine->collective("mma_f16", ~uint32_t{0}, &mine, multiply_16<half_to_float>, site);
}
void mma_bf16(Fragments& mine, Site site) {
  machine->collective("mma_bf16", ~uint32_t{0}, &mine, multiply_16<bfloat16_to_float>, site);
}
void mma_tf32(Fragments& mine, Site site) {
  machine->collective("mma_tf32", ~uint32_t{0}, &mine, multiply_tf32, site);
}
void sync_warp(uint32_t mask, Site site) {
  machine->collective("sync_warp", mask, nullptr, nullptr, site);
}

}  // namespace snv2::emulator
