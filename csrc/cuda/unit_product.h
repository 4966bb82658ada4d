// Products and stores of a unit. unit.h puts them together.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/unit_load.h"
#include "cuda/unit_params.h"

namespace snv2::SNV2_GPU {

// Products --------------------------------------------------------------------------------------

// Has the warps compute all blocks of a product, and hands each to use(acc, first row of tiles,
// first block of columns, blocks).
template <class Mode, class T, class P, class Use>
SNV2_DEVICE void product(P matrix, int rows, const Operand<T>& x, int blocks, const Use& use) {
  constexpr int kTiles = Mode::kTiles, kBlocks = Mode::kBlocks;
  const int row_tiles = units_of<16>(rows);
  const int tile_row = units_of<kTileDepth<T>>(x.depth) * kTileElements<T>;
  const int row_blocks = units_of<kTiles>(row_tiles), column_blocks = units_of<kBlocks>(blocks);
  // Exact for what fits in shared memory, and a tenth of a division.
  const float by_row_blocks = reciprocal(static_cast<float>(row_blocks));
  for (int b = warp_of_cta(); b < row_blocks * column_blocks; b += unit_warps()) {
    const int column = static_cast<int>((static_cast<float>(b) + 0.5f) * by_row_blocks);
    const int tile = (b - column * row_blocks) * kTiles, block = column * kBlocks;
    const int count = blocks - block < kBlocks ? blocks - block : kBlocks;
    P at[kTiles];
    for (int i = 0; i < kTiles; ++i) {
      at[i] = matrix + (tile + i < row_tiles ? tile + i : row_tiles - 1) * tile_row;
    }
    float acc[kTiles][kBlocks][4];
    clear(acc);
    multiply<Mode::kAhead>(acc, at, Operand<T>{x.rows + block * kBlock, x.pitch, x.depth}, count);
    use(acc, tile, block, count);
  }
}

// Two neighbouring results, finished and rounded. Rounding does not change what ReLU does, which
// takes both at once then, but that it makes +0 of -0.
template <class T, class Act>
SNV2_DEVICE Vector<T, 2> finished_pair(float a, float b, float bias) {
  if constexpr (sizeof(T) == 4) {
    return {{Act::finish(a, bias), Act::finish(b, bias)}};
  } else if constexpr (std::is_same_v<Act, Relu>) {
    return max_nan(rounded_pair<T>(a + bias, b + bias), Vector<T, 2>{});
  } else {
    return rounded_pair<T>(Act::finish(a, bias), Act::finish(b, bias));
  }
}

// Stores a block of results, rounded, to rows of pixels in shared memory. column_of: of a block.
template <class T, class Act, int kTiles, int kBlocks, class ColumnOf>
SNV2_DEVICE void store_lines(Shared<T> lines, int pitch, const float (&acc)[kTiles][kBlocks][4],
                             Shared<float> bias, int rows, int tile, int count,
                             const ColumnOf& column_of) {
  const int first = tile * 16 + lane_of_warp() / 4;
  float biases[2 * kTiles];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    biases[i] = first + i * 8 < rows ? load(bias + (first + i * 8)) : 0.0f;
  }
  const Shared<T> line = lines + (first * pitch + lane_of_warp() % 4 * 2);
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    if (j >= count) break;
    const Shared<T> to = line + column_of(j);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      if (first + i * 8 >= rows) continue;
      const float (&of)[4] = acc[i / 2][j];
      store_vector<2>(to + i * 8 * pitch,
                      finished_pair<T, Act>(of[i % 2 * 2], of[i % 2 * 2 + 1], biases[i]));
    }
  }
}

SNV2_DEVICE uint32_t word_of(Vector<half_t, 2> v) {
  return v.values[0].bits | static_cast<uint32_t>(v.values[1].bits) << 16;
}
SNV2_DEVICE uint32_t word_of(Vector<bfloat16_t, 2> v) {
  return v.values[0].bits | static_cast<uint32_t>(v.values[1].bits) << 16;
}

// Stores a block of results to planes, whose columns begin with element `first`. In 16 bits the
// four lanes that share a row exchange their pairs, until each has one of four blocks whole: 64
// bytes of a plane in one instruction. In float32 their pairs are a sector as they are.
template <class T, class Act, int kTiles, int kBlocks>
SNV2_DEVICE void store_planes(const UnitParams<T>& params, const Memory<T>& m,
                              const float (&acc)[kTiles][kBlocks][4], int rows, int tile, int block,
                              int count, int64_t first) {
  const int t = lane_of_warp() % 4;
  const Global<T> out = Global<T>{params.out} + first;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int row = tile * 16 + i * 8 + lane_of_warp() / 4;
      if (row >= rows) continue;
      const float b = load(m.pw2_bias + row);
      const Global<T> line =
          out + (load(m.out_table + row) * params.out_pitch + block * kBlock + 2 * t);
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        if (j >= count) break;
        const float (&of)[4] = acc[i / 2][j];
        store_vector<2>(line + j * kBlock,
                        finished_pair<T, Act>(of[i % 2 * 2], of[i % 2 * 2 + 1], b));
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = (tile + i) * 16 + half * 8 + lane_of_warp() / 4;
        const float b = load(m.pw2_bias + row);  // or beyond, see Places
#pragma unroll
        for (int j0 = 0; j0 < kBlocks; j0 += 4) {
          if (j0 >= count) break;
          uint32_t words[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float (&of)[4] = acc[i][j0 + j < kBlocks ? j0 + j : j0];
            words[j] = word_of(finished_pair<T, Act>(of[2 * half], of[2 * half + 1], b));
          }
#pragma unroll
          for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if (j & bit) continue;
              uint32_t& keep_low = words[j];
              uint32_t& keep_high = words[j + bit];
              const uint32_t got = shuffle_xor(t & bit ? keep_low : keep_high, bit);
              (t & bit ? keep_low : keep_high) = got;
            }
          }
          Vector<T, 8> line;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            line.values[2 * j].bits = static_cast<uint16_t>(words[j]);
            line.values[2 * j + 1].bits = static_cast<uint16_t>(words[j] >> 16);
          }
          const int column = (block + j0 + t) * kBlock;
          if (row < rows && j0 + t < count) {
            store_vector<8>(out + (load(m.out_table + row) * params.out_pitch + column), line);
          }
        }
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
  const int places = places_of<T>(branch.mid, blocks);
  for (int i = static_cast<int>(threadIdx.x); i < places; i += unit_threads()) {
    const Place place = place_of<T>(i, i / 8 / blocks, blocks);
    if (place.row >= branch.mid) continue;
    const int at = (branch.first_depth + place.row) * m.dw_pitch + place.column;
    store_vector<kVector>(out + (load(m.out_table + place.row) * params.out_pitch + place.column),
                          load_vector<kVector>(m.dw + at));
  }
}

// Writes `rows` rows of the caller's tensor, from row `local0` of an image on, in logical order:
// the rows of this branch's result that lie in shared memory, and what passes through, which CTAs
// of a cluster share. Nothing does beside a projection.
template <class T>
SNV2_DEVICE void store_result(const UnitParams<T>& params, const Memory<T>& m,
                              const Branch<T>& branch, int64_t image0, int local0, int rows,
                              int rank) {
  const int count = rows * params.out_width;
  const bool along_pixels = params.result_pixel == 1;
  const int outer = along_pixels ? params.result_channels : count;
  const int inner = along_pixels ? count : params.result_channels;
  for (int o = warp_of_cta(); o < outer; o += unit_warps()) {
    for (int i = lane_of_warp(); i < inner; i += kWarp) {
      const int channel = along_pixels ? o : i, pixel = along_pixels ? i : o;
      const int32_t entry = load(Global<const int32_t>{params.result_table} + channel);
      const int row = entry - branch.first_result;
      const int line = params.by_out_width.divide(pixel), x = pixel - line * params.out_width;
      int64_t image = image0;
      int y = local0 + line;
      while (y >= params.out_height) y -= params.out_height, ++image;
      T value;
      if (entry >= 0 && row >= 0 && row < branch.out) {
        value = load(m.result + (row * m.dw_pitch + line * params.out_row + x));
      } else if (entry < 0 && channel % params.cluster == rank) {
        value = load(Global<const T>{params.in} +
                     ((-1 - int64_t{entry}) * params.in_channel + image * params.in_image +
                      y * params.in_row + x * params.in_pixel));
      } else {
        continue;
      }
      store(Global<T>{params.result} +
                (channel * params.result_channel + image * params.result_image +
                 y * params.result_row + x * params.result_pixel),
            value);
    }
  }
}

}  // namespace snv2::SNV2_GPU
