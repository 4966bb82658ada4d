// Products of packed matrices (snv2/gpu_plan.h) with maps in shared memory, one warp at a time.
//
// The matrix is the left operand: its rows are output channels, so that a result's neighbouring
// elements are neighbouring pixels, as planes have them. The right operand is a set of rows of
// pixels in shared memory, addressed one by one.
//
// A warp computes a block of kTiles x 16 rows and kBlocks x 8 columns. acc[i][j] is the part of
// 16 x 8 that PTX calls D: lane l, g = l / 4, t = l % 4, holds rows g, g, g + 8, g + 8 and columns
// 2t, 2t + 1, 2t, 2t + 1. float32 is multiplied exactly, in the same fragments.
//
// Rows in shared memory are an odd number of 8 elements apart (shared_pitch): eight rows of 16
// bytes (float32: four of 32) then lie in different banks, for ldmatrix, for the stores of results
// and for the reads of the depthwise convolution.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cuda/isa.h"
#include "snv2/gpu_plan.h"

namespace snv2::SNV2_GPU {

constexpr int kBlock = 8;  // columns of the smallest block

// a / kUnit, rounded up, of what is not negative: a shift, where signed division takes four.
template <int kUnit>
SNV2_DEVICE int units_of(int a) {
  return static_cast<int>((static_cast<unsigned>(a) + (kUnit - 1)) / unsigned{kUnit});
}

// Elements between rows of at least `columns` columns.
constexpr int64_t shared_pitch(int64_t columns) { return (ceil_div(columns, kBlock) | 1) * kBlock; }

template <class T>
constexpr DType dtype_of() {
  return DType::kFloat16;
}
template <>
constexpr DType dtype_of<float>() {
  return DType::kFloat32;
}
template <>
constexpr DType dtype_of<bfloat16_t>() {
  return DType::kBFloat16;
}

template <class T>
constexpr int kTileDepth = static_cast<int>(tile_depth(dtype_of<T>()));
template <class T>
constexpr int kTileElements = 16 * kTileDepth<T>;

// Rows of a map with `depth` channels in shared memory: a row of zeros follows where the last tile
// of the matrix is not full, since zero weights would not silence a NaN.
template <class T>
constexpr int64_t shared_rows(int64_t depth) {
  return depth + (depth % kTileDepth<T> != 0 ? 1 : 0);
}

SNV2_DEVICE int lane_of_warp() { return static_cast<int>(threadIdx.x % unsigned{kWarp}); }
SNV2_DEVICE int warp_of_cta() {
  return warp_uniform(static_cast<int>(threadIdx.x / unsigned{kWarp}));
}

// One tile of a packed matrix, in registers.
template <class T>
struct Tile {
  uint32_t a[4];
};
template <>
struct Tile<float> {
  float a[4][2];  // [k][row g, row g + 8]
};

template <class T>
SNV2_DEVICE Shared<uint32_t> words(Shared<T> p) {
  return p.template as<uint32_t>();
}
template <class T>
SNV2_DEVICE Global<const uint32_t> words(Global<const T> p) {
  return {reinterpret_cast<const uint32_t*>(p.address)};
}

// Returns the place of a lane's part of a tile.
template <class P, class T>
SNV2_DEVICE P lane_of_tile(P tile, const Tile<T>&) {
  return tile + lane_of_warp() * 8;
}
template <class P>
SNV2_DEVICE P lane_of_tile(P tile, const Tile<float>&) {
  return tile + lane_of_warp() / 4 * 8;
}
// P is Global<const T> or Shared<T>, at the lane's part.
template <class P, class T>
SNV2_DEVICE void load_lane(Tile<T>& tile, P lane) {
  const Vector<uint32_t, 4> v = load_vector<4>(words(lane));
#pragma unroll
  for (int r = 0; r < 4; ++r) tile.a[r] = v.values[r];
}
// kOffset elements after the lane's part.
template <int kOffset, class T>
SNV2_DEVICE void load_lane(Tile<T>& tile, Address<T> lane) {
  const Vector<T, 8> v = load_vector<8, kOffset>(lane);
  std::memcpy(tile.a, &v, sizeof v);
}
SNV2_DEVICE void set_lane(Tile<float>& tile, const Vector<float, 4>& low,
                          const Vector<float, 4>& high) {
  for (int k = 0; k < 2; ++k) {
    for (int r = 0; r < 2; ++r) {
      tile.a[k][r] = low.values[2 * k + r];
      tile.a[k + 2][r] = high.values[2 * k + r];
    }
  }
}
template <class P>
SNV2_DEVICE void load_lane(Tile<float>& tile, P lane) {
  set_lane(tile, load_vector<4>(lane), load_vector<4>(lane + 4));
}
template <int kOffset>
SNV2_DEVICE void load_lane(Tile<float>& tile, Address<float> lane) {
  set_lane(tile, load_vector<4, kOffset>(lane), load_vector<4, kOffset + 4>(lane));
}
template <class P, class T>
SNV2_DEVICE void load_tile(Tile<T>& tile, P at) {
  load_lane(tile, lane_of_tile(at, tile));
}

// d = c + a b
SNV2_DEVICE void mma(float (&d)[4], const Tile<half_t>& a, const uint32_t (&b)[2],
                     const float (&c)[4]) {
  mma_f16(d, a.a, b, c);
}
SNV2_DEVICE void mma(float (&d)[4], const Tile<bfloat16_t>& a, const uint32_t (&b)[2],
                     const float (&c)[4]) {
  mma_bf16(d, a.a, b, c);
}
template <class T>
SNV2_DEVICE void mma(float (&d)[4], const Tile<T>& a, const uint32_t (&b)[2]) {
  mma(d, a, b, d);
}

// The right operand: rows [depth (+ a row of zeros)][pitch] of T.
template <class T>
struct Operand {
  Shared<T> rows;
  int pitch;
  int depth;
};

// Tiles of kTiles rows of a packed matrix in global memory, each kAhead tiles before it is used.
template <int kAhead, class T, int kTiles>
class Tiles {
 public:
  SNV2_DEVICE Tiles(const Global<const T> (&matrix)[kTiles], int deep) : left_(deep) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) next_[i] = lane_of_tile(matrix[i], tiles_[0][0]);
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (k < deep) load(tiles_[k]);
    }
  }
  // The next tiles, those of place `at` = 0, 1, ... kAhead - 1, 0, ...
  SNV2_DEVICE void take(Tile<T> (&to)[kTiles], int at) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) to[i] = tiles_[at][i];
    if (left_ > 0) load(tiles_[at]);
  }

 private:
  SNV2_DEVICE void load(Tile<T> (&to)[kTiles]) {
    --left_;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      load_lane(to[i], next_[i]);
      next_[i] = next_[i] + kTileElements<T>;
    }
  }

  Tile<T> tiles_[kAhead][kTiles];
  Global<const T> next_[kTiles];
  int left_;  // tiles from next_ on
};

// The rows of a map that one tile of the matrix is multiplied with, as ldmatrix names them: lanes
// 16 and up name rows of the second block of a pair, if there is one.
template <class T>
class OperandRows {
 public:
  SNV2_DEVICE OperandRows(const Operand<T>& x, int deep, int blocks)
      : line_(x.rows + lane_of_warp() % 16 * x.pitch),
        last_(line_),
        here_(line_),
        step_(in_register(kTileDepth<T> * x.pitch)),
        blocks_(blocks),
        second_(lane_of_warp() / 16 * kBlock),
        first_(blocks > 1 ? second_ : 0) {
    const int last = (deep - 1) * kTileDepth<T> + lane_of_warp() % 16;
    line_ = line_ + first_;
    last_ = Address<T>(x.rows + ((last < x.depth ? last : x.depth) * x.pitch + first_));
  }
  // Moves to the next tile, the first one at first, and stays in the last one. Rows beyond the last
  // are the one of zeros.
  SNV2_DEVICE void move() {
    here_ = earlier(line_, last_);
    line_ = line_ + step_;
  }
  // Elements from the first pair of blocks to another one; of a pair that is not there to the
  // first.
  SNV2_DEVICE int place(int pair) const {
    if (2 * pair >= blocks_) return 0;
    return 2 * pair * kBlock + (2 * pair + 1 < blocks_ ? second_ : 0) - first_;
  }
  // Loads two registers of either block of the pair at a place.
  SNV2_DEVICE void load(uint32_t (&b)[4], int place) const { ldmatrix<4, true>(b, here_ + place); }
  // The same of a pair where all blocks are there.
  template <int kPair>
  SNV2_DEVICE void load_pair(uint32_t (&b)[4]) const {
    ldmatrix<4, true, 2 * kPair * kBlock>(b, here_);
  }

 private:
  Address<T> line_, last_, here_;
  int step_, blocks_, second_;
  int first_;  // elements to this lane's block of the first pair
};

template <int kTiles, int kBlocks, class T>
SNV2_DEVICE void multiply_pair(float (&acc)[kTiles][kBlocks][4], const Tile<T> (&a)[kTiles],
                               const uint32_t (&b)[4], int pair) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t block[2] = {b[2 * j], b[2 * j + 1]};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) mma(acc[i][2 * pair + j], a[i], block);
  }
}

// What the columns of a block begin with: a number of each row g and g + 8 of the tiles.
template <int kTiles>
struct Start {
  float rows[kTiles][4];

  SNV2_DEVICE void set(int tile, float upper, float lower) {
    rows[tile][0] = rows[tile][1] = upper;
    rows[tile][2] = rows[tile][3] = lower;
  }
};

// By a matrix in shared memory. What two tiles take is in registers: while one is multiplied, the
// next is loaded. kPairs of blocks, of which the last one may lack its second.
template <int kPairs, class T, int kTiles>
SNV2_DEVICE void multiply_shared(float (&acc)[kTiles][4][4], const Shared<T> (&matrix)[kTiles],
                                 const Operand<T>& x, const Start<kTiles>& start, int deep,
                                 int blocks) {
  OperandRows<T> rows(x, deep, blocks);
  const int second = kPairs == 2 ? rows.place(1) : 0;
  Address<T> lane[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) lane[i] = Address<T>(lane_of_tile(matrix[i], Tile<T>{}));
  Tile<T> a[2][kTiles];
  uint32_t b[2][2][4] = {};
  // A tile of an even place, and then the one after it.
  const auto load = [&](int at) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (at == 0) {
        load_lane<0>(a[0][i], lane[i]);
      } else {
        load_lane<kTileElements<T>>(a[1][i], lane[i]);
        lane[i] = lane[i] + 2 * kTileElements<T>;
      }
    }
    rows.move();
    rows.load(b[at][0], 0);
    if constexpr (kPairs == 2) rows.load(b[at][1], second);
  };
  const auto multiply = [&](int at) {
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) multiply_pair(acc, a[at], b[at][pair], pair);
  };
  load(0);
#pragma unroll
  for (int j = 0; j < 2 * kPairs; ++j) {
    const uint32_t block[2] = {b[0][j / 2][j % 2 * 2], b[0][j / 2][j % 2 * 2 + 1]};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) mma(acc[i][j], a[0][i], block, start.rows[i]);
  }
  if (deep == 1) return;
  load(1);
#pragma unroll 1
  for (int left = deep - 2; left > 1; left -= 2) {
    load(0);
    multiply(1);
    load(1);
    multiply(0);
  }
  if (deep % 2 != 0) {
    load(0);
    multiply(1);
    multiply(0);
  } else {
    multiply(1);
  }
}

// acc = start + matrix[tiles of rows] x operand[all rows][blocks of columns], by a matrix in shared
// memory.
template <class T, int kTiles>
SNV2_DEVICE void multiply_from(const Start<kTiles>& start, float (&acc)[kTiles][4][4],
                               const Shared<T> (&matrix)[kTiles], const Operand<T>& x, int blocks) {
  const int deep = units_of<kTileDepth<T>>(x.depth);
  if (blocks > 2) {
    multiply_shared<2>(acc, matrix, x, start, deep, blocks);
  } else {
    multiply_shared<1>(acc, matrix, x, start, deep, blocks);
  }
}

// One tile of the depth with all blocks. A pair's rows are loaded while the pair before it is
// multiplied.
template <int kTiles, int kBlocks, class T, int... kPair>
SNV2_DEVICE void multiply_whole(float (&acc)[kTiles][kBlocks][4], const Tile<T> (&a)[kTiles],
                                const OperandRows<T>& rows, std::integer_sequence<int, kPair...>) {
  uint32_t b[2][4];
  rows.template load_pair<0>(b[0]);
  const auto multiply = [&](auto pair) {
    constexpr int kThis = decltype(pair)::value, kNext = kThis + 1;
    if constexpr (2 * kNext < kBlocks) rows.template load_pair<kNext>(b[kNext % 2]);
    multiply_pair(acc, a, b[kThis % 2], kThis);
  };
  (multiply(std::integral_constant<int, kPair>{}), ...);
}

// acc += matrix[tiles of rows] x operand[all rows][blocks of columns]. `matrix` is at the first
// tile of each of the kTiles rows of tiles; the operand's `rows` is at the first block. Blocks of
// acc from `blocks` on are of no use. Loads of a matrix in global memory run kAhead tiles ahead.
template <int kAhead, class T, class P, int kTiles, int kBlocks>
SNV2_DEVICE void multiply(float (&acc)[kTiles][kBlocks][4], const P (&matrix)[kTiles],
                          const Operand<T>& x, int blocks) {
  static_assert(kBlocks % 2 == 0);
  const int deep = units_of<kTileDepth<T>>(x.depth);
  Tiles<kAhead, T, kTiles> tiles(matrix, deep);
  OperandRows<T> rows(x, deep, blocks);
  for (int k0 = 0; k0 < deep; k0 += kAhead) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      if (ahead > 0 && k0 + ahead >= deep) break;
      Tile<T> a[kTiles];
      tiles.take(a, ahead);
      rows.move();
      if (blocks == kBlocks) {
        multiply_whole(acc, a, rows, std::make_integer_sequence<int, kBlocks / 2>{});
        continue;
      }
      uint32_t b[2][4];
      rows.load(b[0], rows.place(0));
#pragma unroll
      for (int pair = 0; pair < kBlocks / 2; ++pair) {
        if (pair > 0 && 2 * pair >= blocks) break;
        // Without asking for it: after the last pair comes the first, which nobody needs.
        if (pair + 1 < kBlocks / 2) rows.load(b[(pair + 1) % 2], rows.place(pair + 1));
        multiply_pair(acc, a, b[pair % 2], pair);
      }
    }
  }
}

template <int kTiles, int kBlocks>
SNV2_DEVICE void begin(float (&acc)[kTiles][kBlocks][4], const Start<kTiles>& start) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
      for (int d = 0; d < 4; ++d) acc[i][j][d] = start.rows[i][d];
    }
  }
}

// Two numbers of 16 bits as a word. Copied as a whole: of halves the compiler makes shifts.
template <class T>
SNV2_DEVICE uint32_t word_of(const Vector<T, 2>& pair) {
  uint32_t word;
  std::memcpy(&word, &pair, sizeof word);
  return word;
}

template <class T>
SNV2_DEVICE T rounded(float value) {
  T out;
  from_float(value, out);
  return out;
}

}  // namespace snv2::SNV2_GPU

#include "cuda/mma_float.h"
