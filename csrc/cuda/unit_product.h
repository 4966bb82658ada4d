// Products and stores of a unit. unit.h puts them together.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cuda/unit_load.h"
#include "cuda/unit_params.h"

namespace snv2::SNV2_GPU {

// Products --------------------------------------------------------------------------------------

// Returns 1 / rows of jobs in a column of them. Exact for what fits in shared memory, and a tenth
// of a division.
template <class Mode>
SNV2_DEVICE float by_row_blocks(int rows) {
  return reciprocal(static_cast<float>(units_of<16 * Mode::kTiles>(rows)));
}

// Has the warps compute all blocks of a product and its bias, and hands each to use(acc, first row
// of tiles, first block of columns, blocks, what before(rows of tiles) returned).
template <class Mode, class T, class P, class Before, class Use>
SNV2_DEVICE void product(P matrix, Shared<float> bias, int rows, float by_rows, const Operand<T>& x,
                         int blocks, const Before& before, const Use& use) {
  constexpr int kTiles = Mode::kTiles, kBlocks = Mode::kBlocks;
  const int row_tiles = units_of<16>(rows);
  const int tile_row = units_of<kTileDepth<T>>(x.depth) * kTileElements<T>;
  const int row_blocks = units_of<kTiles>(row_tiles);
  const int wide = blocks_of_job<Mode>(row_blocks, blocks, unit_warps());
  const int column_blocks = wide == kBlocks ? units_of<kBlocks>(blocks) : units_of<2>(blocks);
  if constexpr (!Mode::kResident) by_rows = by_row_blocks<Mode>(rows);
  const Shared<float> lane_bias = bias + lane_of_warp() / 4;
  for (int b = warp_of_cta(); b < row_blocks * column_blocks; b += unit_warps()) {
    const int column = static_cast<int>((static_cast<float>(b) + 0.5f) * by_rows);
    const int tile = (b - column * row_blocks) * kTiles, block = column * wide;
    const int count = blocks - block < wide ? blocks - block : wide;
    P at[kTiles];
    Start<kTiles> start;
    int tiles[kTiles];  // of a row of tiles that does not exist the last one is made again
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      tiles[i] = i == 0 || tile + i < row_tiles ? tile + i : row_tiles - 1;
      at[i] = matrix + tiles[i] * tile_row;
      start.set(i, load(lane_bias + tiles[i] * 16), load(lane_bias + (tiles[i] * 16 + 8)));
    }
    const auto known = before(tiles);
    float acc[kTiles][kBlocks][4];
    const Operand<T> columns{x.rows + block * kBlock, x.pitch, x.depth};
    if constexpr (std::is_same_v<P, Shared<T>> && sizeof(T) == 2) {
      multiply_from(start, acc, at, columns, count);
    } else {
      begin(acc, start);
      multiply<Mode::kAhead>(acc, at, columns, count);
    }
    use(acc, tile, block, count, known);
  }
}

// Two neighbouring results, finished and rounded. Rounding does not change what ReLU does, which
// takes both at once then, but that it makes +0 of -0.
template <class T, class Act>
SNV2_DEVICE Vector<T, 2> finished_pair(float a, float b) {
  if constexpr (sizeof(T) == 4) {
    return {{Act::apply(a), Act::apply(b)}};
  } else if constexpr (std::is_same_v<Act, Relu>) {
    return max_nan(rounded_pair<T>(a, b), Vector<T, 2>{});
  } else {
    return rounded_pair<T>(Act::apply(a), Act::apply(b));
  }
}

// Stores pair(j) for block j from a place on.
template <class T, class Pair, int... J>
SNV2_DEVICE void store_each(Address<T> to, const Pair& pair, std::integer_sequence<int, J...>) {
  (store_vector<2, J * kBlock>(to, pair(J)), ...);
}

// Stores blocks of results, rounded, to rows of pixels in shared memory, of which there are as many
// as rows of tiles have. Blocks from `column` on, which lie in a ring of `ring` columns.
template <class T, class Act, int kTiles, int kBlocks>
SNV2_DEVICE void store_lines(Shared<T> lines, int pitch, const float (&acc)[kTiles][kBlocks][4],
                             int rows, int tile, int count, int column, int ring) {
  const int row_tiles = units_of<16>(rows);
  if (column >= ring) column -= ring;
  const Shared<T> lane =
      lines + ((tile * 16 + lane_of_warp() / 4) * pitch + lane_of_warp() % 4 * 2);
  // Nearly all are whole and lie side by side: then places are parts of instructions.
  const bool whole = count == kBlocks && column + kBlocks * kBlock <= ring;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (i > 0 && tile + i >= row_tiles) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Address<T> line(lane + (i * 16 + half * 8) * pitch);
      const auto pair = [&](int j) {
        const float (&of)[4] = acc[i][j];
        return finished_pair<T, Act>(of[half * 2], of[half * 2 + 1]);
      };
      if (whole) {
        const Address<T> first = line + column;
        store_each(first, pair, std::make_integer_sequence<int, kBlocks>{});
      } else {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          if (j >= count) break;
          const int there = column + j * kBlock;
          store_vector<2>(line + (there < ring ? there : there - ring), pair(j));
        }
      }
    }
  }
}

// Exchanges words between lanes that differ in kBit: what has the bit of one for what lacks it of
// the other.
template <int kBit>
SNV2_DEVICE void exchange(uint32_t& without, uint32_t& with) {
  const bool has = (lane_of_warp() & kBit) != 0;
  const uint32_t got = shuffle_xor(has ? without : with, kBit);
  (has ? without : with) = got;
}

// Returns pairs of pixels as a vector.
template <class T, int N>
SNV2_DEVICE Vector<T, 2 * N> pixels_of(const uint32_t (&words)[N]) {
  Vector<T, 2 * N> pixels;
  std::memcpy(&pixels, words, sizeof pixels);
  return pixels;
}

// The planes of a lane's rows of results. They are looked up before the product: no store waits.
template <int kTiles>
struct ResultPlanes {
  int32_t of[kTiles][2] = {};  // row g, row g + 8

  ResultPlanes() = default;
  SNV2_DEVICE ResultPlanes(Shared<int32_t> table, const int (&tiles)[kTiles]) {
    const Shared<int32_t> lane = table + lane_of_warp() / 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      of[i][0] = load(lane + tiles[i] * 16);
      of[i][1] = load(lane + (tiles[i] * 16 + 8));
    }
  }
};

// Stores a block of results to planes, whose columns begin with element `first`. In 16 bits the
// four lanes that share a row exchange their pairs, until each has one of four blocks whole: 64
// bytes of a plane in one instruction. In float32 their pairs are a sector as they are.
template <class T, class Act, int kTiles, int kBlocks>
SNV2_DEVICE void store_planes(const UnitParams<T>& params, const ResultPlanes<kTiles>& planes,
                              const float (&acc)[kTiles][kBlocks][4], int rows, int tile, int block,
                              int count, int64_t first) {
  const int t = lane_of_warp() % 4, left = rows - tile * 16 - lane_of_warp() / 4;
  const auto plane = [&](Global<T> out, int i, int half) {
    return out + static_cast<uint32_t>(planes.of[i][half]) * params.out_pitch;
  };
  if constexpr (sizeof(T) == 4) {
    const Global<T> out = Global<T>{params.out} + (first + block * kBlock + 2 * t);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      if (i * 8 >= left) continue;
      const Global<T> line = plane(out, i / 2, i % 2);
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        if (j >= count) break;
        const float (&of)[4] = acc[i / 2][j];
        store_vector<2>(line + j * kBlock, finished_pair<T, Act>(of[i % 2 * 2], of[i % 2 * 2 + 1]));
      }
    }
  } else {
    // Exchanges of all rows go together, and then their stores.
    const auto store_all = [&](auto number, Global<T> out, int j0, bool stores) {
      constexpr int kWords = decltype(number)::value;
      uint32_t words[2 * kTiles][kWords];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kWords; ++j) {
          const float (&of)[4] = acc[i / 2][j0 + j < kBlocks ? j0 + j : j0];
          words[i][j] = word_of(finished_pair<T, Act>(of[i % 2 * 2], of[i % 2 * 2 + 1]));
        }
#pragma unroll
        for (int j = 0; j < kWords; j += 2) exchange<1>(words[i][j], words[i][j + 1]);
        if constexpr (kWords == 4) {
          exchange<2>(words[i][0], words[i][2]);
          exchange<2>(words[i][1], words[i][3]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const Global<T> to = plane(out, i / 2, i % 2) + j0 * kBlock;
        if (stores && i * 8 < left) store_vector<2 * kWords>(to, pixels_of<T>(words[i]));
      }
    };
    // A lane's first element: of half of a block, or of one.
    const Global<T> out = Global<T>{params.out} + (first + block * kBlock);
    if (count <= 2) {
      store_all(std::integral_constant<int, 2>{}, out + (t % 2 * kBlock + t / 2 * 4), 0,
                t % 2 < count);
    } else {
#pragma unroll
      for (int j0 = 0; j0 < kBlocks; j0 += 4) {
        if (j0 >= count) break;
        store_all(std::integral_constant<int, 4>{}, out + t * kBlock, j0, j0 + t < count);
      }
    }
  }
}

// Stores the rows of DW that a branch without a second product ends in.
template <class T>
SNV2_DEVICE void store_rows(const UnitParams<T>& params, const Memory<T>& m,
                            const Branch<T>& branch, int blocks, int64_t first) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const Global<T> out = Global<T>{params.out} + first;
  Global<T> plane = out;
  Shared<T> from = m.dw;
  for_vectors<T>(
      branch.mid, blocks,
      [&](int row) {
        plane = out + load(m.out_table + row) * params.out_pitch;
        from = m.dw + (branch.first_depth + row) * m.dw_pitch;
      },
      [&](int column) {
        store_vector<kVector>(plane + column, load_vector<kVector>(from + column));
      });
}

}  // namespace snv2::SNV2_GPU
