// Products of float32, which are exact: multiply-adds, in the fragments of tensor cores. mma.h
// includes it.
#pragma once

#include <type_traits>
#include <utility>

#include "cuda/mma.h"

namespace snv2::SNV2_GPU {

constexpr int kChainTiles = 8;  // that are added up on their own, at least

// Tiles of kTiles rows of a packed matrix in shared memory, each loaded when it is asked for.
template <int kTiles>
class SharedTiles {
 public:
  SNV2_DEVICE SharedTiles(const Shared<float> (&matrix)[kTiles], int) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      next_[i] = Address<float>(lane_of_tile(matrix[i], Tile<float>{}));
    }
  }
  SNV2_DEVICE void take(Tile<float> (&to)[kTiles], int) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      load_lane<0>(to[i], next_[i]);
      next_[i] = next_[i] + kTileElements<float>;
    }
  }

 private:
  Address<float> next_[kTiles];
};

// The rows of a float32 map that one tile of the matrix is multiplied with. kStays: move() stays in
// the last tile.
template <bool kStays>
class FloatRows {
 public:
  static constexpr int kDepth = kTileDepth<float>;

  SNV2_DEVICE FloatRows(const Operand<float>& x, int deep) : step_(kDepth * x.pitch) {
    const Shared<float> first = x.rows + lane_of_warp() % 4 * 2;
    const auto row = [&](int r) {
      return Address<float>(first + (r < x.depth ? r : x.depth) * x.pitch);
    };
#pragma unroll
    for (int r = 0; r < kDepth; ++r) {
      here_[r] = row(r);
      last_[r] = row((deep - 1) * kDepth + r);
    }
  }
  SNV2_DEVICE void move() {
#pragma unroll
    for (int r = 0; r < kDepth; ++r) {
      here_[r] = here_[r] + step_;
      if constexpr (kStays) here_[r] = earlier(here_[r], last_[r]);
    }
  }
  // Moves to the last tile, whose rows beyond the last of all are the one of zeros.
  SNV2_DEVICE void move_to_last() {
#pragma unroll
    for (int r = 0; r < kDepth; ++r) here_[r] = last_[r];
  }
  template <int kAt>
  SNV2_DEVICE void load(Vector<float, 2> (&b)[kDepth]) const {
#pragma unroll
    for (int r = 0; r < kDepth; ++r) b[r] = load_vector<2, kAt * kBlock>(here_[r]);
  }

 private:
  Address<float> here_[kDepth], last_[kDepth];
  int step_;
};

// sums += a x the rows, of blocks below `blocks`, which are all of them if kWhole.
template <bool kWhole, int kTiles, int kBlocks, class Rows, int... kAt>
SNV2_DEVICE void multiply_tile(float (&sums)[kTiles][kBlocks][4], const Tile<float> (&a)[kTiles],
                               const Rows& rows, int blocks, std::integer_sequence<int, kAt...>) {
  const auto multiply = [&](auto at) {
    constexpr int kThis = decltype(at)::value;
    if (!kWhole && kThis >= blocks) return;
    Vector<float, 2> b[Rows::kDepth];
    rows.template load<kThis>(b);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        float sum = sums[i][kThis][d];
#pragma unroll
        for (int r = 0; r < Rows::kDepth; ++r) {
          sum = multiply_add(a[i].a[r][d / 2], b[r].values[d % 2], sum);
        }
        sums[i][kThis][d] = sum;
      }
    }
  };
  (multiply(std::integral_constant<int, kAt>{}), ...);
}

// acc += matrix x operand, of kCount blocks, of which those from `blocks` on are of no use. The
// products of kChain tiles are added up on their own: chains are short, and so are errors. Where
// tiles come one by one, the last one is a chain of its own if the depth ends inside it.
template <int kCount, bool kWhole, int kAhead, int kTiles, int kBlocks, class From>
SNV2_DEVICE void multiply_chains(float (&acc)[kTiles][kBlocks][4], From& tiles,
                                 const Operand<float>& x, int deep, int blocks) {
  constexpr int kChain = (kChainTiles + kAhead - 1) / kAhead * kAhead;
  constexpr bool kStays = kAhead > 1;
  constexpr auto kAll = std::make_integer_sequence<int, kCount>{};
  FloatRows<kStays> rows(x, deep);
  int whole = kStays || deep * kTileDepth<float> == x.depth ? deep : deep - 1;
#pragma unroll 1
  for (int left = deep; left > 0;) {
    int count = whole < kChain ? whole : kChain;
    whole -= count;
    if (!kStays && count == 0) {
      rows.move_to_last();
      count = 1;
    }
    left -= count;
    float sums[kTiles][kCount][4] = {};
#pragma unroll 1
    for (; count > 0; count -= kAhead) {
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        if (ahead >= count) break;
        Tile<float> a[kTiles];
        tiles.take(a, ahead);
        multiply_tile<kWhole>(sums, a, rows, blocks, kAll);
        rows.move();
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
#pragma unroll
        for (int d = 0; d < 4; ++d) acc[i][j][d] += sums[i][j][d];
      }
    }
  }
}

// float32. Tiles in shared memory are loaded as they are used, since registers are few.
template <int kAhead, class P, int kTiles, int kBlocks>
SNV2_DEVICE void multiply(float (&acc)[kTiles][kBlocks][4], const P (&matrix)[kTiles],
                          const Operand<float>& x, int blocks) {
  const int deep = units_of<kTileDepth<float>>(x.depth);
  std::conditional_t<std::is_same_v<P, Shared<float>>, SharedTiles<kTiles>,
                     Tiles<kAhead, float, kTiles>>
      tiles(matrix, deep);
  // Few blocks have a loop for each number of them.
  if (blocks == kBlocks) {
    multiply_chains<kBlocks, true, kAhead>(acc, tiles, x, deep, blocks);
  } else if constexpr (kBlocks > 4) {
    multiply_chains<kBlocks, false, kAhead>(acc, tiles, x, deep, blocks);
  } else if (blocks == 3) {
    multiply_chains<3, true, kAhead>(acc, tiles, x, deep, blocks);
  } else if (blocks == 2) {
    multiply_chains<2, true, kAhead>(acc, tiles, x, deep, blocks);
  } else {
    multiply_chains<1, true, kAhead>(acc, tiles, x, deep, blocks);
  }
}

}  // namespace snv2::SNV2_GPU
