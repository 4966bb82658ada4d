// Products of matrices: mma.sync. Sums are made in double and rounded once, where tensor cores cut
// bits off in ways that are not documented.
#include "ptx/numbers.h"
#include "ptx/operations.h"

namespace snv2::ptx {
namespace {

constexpr size_t kRows = 16, kColumns = 8;

// D = A B + C from fragments: the list has four operands of D, four of A, two of B, four of C. The
// numbers of lane 4 g + t lie in row g of A and C, column g of B.
template <size_t kDepth>
struct Product {
  double a[kRows][kDepth];
  double b[kDepth][kColumns];

  void write(Warp& w, const Instruction& i) const {
    alignas(Block) float d[4][kLanes];
    for (size_t k = 0; k < 4; ++k) {
      const float* const c = lanes_at<float>(w, operand_of(w, i, 10 + k));
      for (size_t l = 0; l < kLanes; ++l) {
        const size_t row = l / 4 + 8 * (k / 2), column = 2 * (l % 4) + k % 2;
        double sum = 0;
        for (size_t j = 0; j < kDepth; ++j) sum += a[row][j] * b[j][column];
        d[k][l] = canonical(static_cast<float>(sum + double{c[l]}));
      }
    }
    for (size_t k = 0; k < 4; ++k) put(w, operand_of(w, i, k), d[k], kAllLanes);
  }
};

void require_all_lanes(const Warp& w, const Instruction& i, uint32_t mask) {
  if (mask != kAllLanes) fault(w, i, 0, "mma without all lanes");
}

// m16n8k16: a register has two neighbours of a row of A, or of a column of B.
template <float (*kValue)(uint16_t)>
void multiply_pairs(Warp& w, const Instruction& i, uint32_t mask) {
  require_all_lanes(w, i, mask);
  Product<16> product;
  for (size_t k = 0; k < 4; ++k) {
    const uint32_t* const pairs = lanes_at<uint32_t>(w, operand_of(w, i, 4 + k));
    for (size_t l = 0; l < kLanes; ++l) {
      double* const to = &product.a[l / 4 + 8 * (k % 2)][2 * (l % 4) + 8 * (k / 2)];
      to[0] = kValue(static_cast<uint16_t>(pairs[l]));
      to[1] = kValue(static_cast<uint16_t>(pairs[l] >> 16));
    }
  }
  for (size_t k = 0; k < 2; ++k) {
    const uint32_t* const pairs = lanes_at<uint32_t>(w, operand_of(w, i, 8 + k));
    for (size_t l = 0; l < kLanes; ++l) {
      const size_t row = 2 * (l % 4) + 8 * k;
      product.b[row][l / 4] = kValue(static_cast<uint16_t>(pairs[l]));
      product.b[row + 1][l / 4] = kValue(static_cast<uint16_t>(pairs[l] >> 16));
    }
  }
  product.write(w, i);
}

// m16n8k8
void multiply_tf32(Warp& w, const Instruction& i, uint32_t mask) {
  require_all_lanes(w, i, mask);
  Product<8> product;
  for (size_t k = 0; k < 4; ++k) {
    const uint32_t* const values = lanes_at<uint32_t>(w, operand_of(w, i, 4 + k));
    for (size_t l = 0; l < kLanes; ++l) {
      product.a[l / 4 + 8 * (k % 2)][l % 4 + 4 * (k / 2)] = as_float(values[l] & kTf32Bits);
    }
  }
  for (size_t k = 0; k < 2; ++k) {
    const uint32_t* const values = lanes_at<uint32_t>(w, operand_of(w, i, 8 + k));
    for (size_t l = 0; l < kLanes; ++l) {
      product.b[l % 4 + 4 * k][l / 4] = as_float(values[l] & kTf32Bits);
    }
  }
  product.write(w, i);
}

}  // namespace

void add_matrices(Operations& all) {
  all["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"] = multiply_pairs<half_value>;
  all["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] = multiply_pairs<bfloat16_value>;
  all["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"] = multiply_tf32;
}

}  // namespace snv2::ptx
