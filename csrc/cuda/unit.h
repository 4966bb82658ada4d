// One ShuffleNet V2 unit in one launch: 1x1, depthwise 3x3 and 1x1 of the main branch, and at
// stride 2 the depthwise 3x3 and 1x1 of the projection, which other CTAs (blockIdx.y = 1) take.
//
// All images together are one tall map of batch x height rows. A CTA marches down a range of its
// output rows. In each step it
//   loads the next `columns` pixels of all gathered planes        X    [in][columns]
//   multiplies them, into a ring of pixels                        MID  [mid][ring]
//   convolves the rows that are complete                          DW   [mid][rows of pixels]
//   multiplies those, and stores planes or the caller's tensor.
// Steps begin on 32-byte sectors, not on rows, so that planes are read in whole sectors and
// products have no ragged columns. The ring keeps what the next rows need, less than three rows:
// inside a range nothing is read or computed twice; two ranges that meet inside an image both read
// up to two rows around the cut. X is dead once MID is made, and DW takes its place.
//
// Weights lie in shared memory for the whole march where they fit beside two CTAs (Resident), and
// are read from L2 in every step where they do not (Direct: a warp then takes a whole row of tiles
// over up to 128 columns, so that a step reads each weight once). For x1.0 in 16 bits, stage 2 has
// 16 KB of weights and stage 3 64 KB; stage 4 has 230 KB, more than an SM.
#pragma once

#include <cstdint>

#include "cuda/mma.h"
#include "cuda/span.h"

namespace snv2::SNV2_GPU {

constexpr int kUnitThreads = 256;
constexpr int kUnitWarps = kUnitThreads / kWarp;

// How warps share a product, and where the matrix is.
struct Resident {
  static constexpr bool kResident = true;
  static constexpr int kTiles = 2, kBlocks = 4, kAhead = 1;
};
// Registers bound the blocks, and stride 2 has both branches in one kernel.
template <class T, int kStride>
struct Direct {
  static constexpr bool kResident = false;
  static constexpr int kTiles = 1, kBlocks = kStride == 1 ? 16 : 8;
  static constexpr int kAhead = sizeof(T) == 4 ? 1 : 2 + kStride;
};

// Pixels in a sector: steps, and columns of results, begin on them.
template <class T>
constexpr int kSectorPixels = 32 / static_cast<int>(sizeof(T));

// One of the two branches.
template <class T>
struct Branch {
  const T* pw1;  // packed [mid, in]; the projection has none, and mid is in
  const T* pw2;  // packed [out, mid]
  const float* pw1_bias;
  const float* pw2_bias;
  const float* dw;           // [mid][10]
  const int32_t* out_table;  // [out] planes
  int mid;
  int out;
  int first_result;  // row of the unit's whole result that is row 0 of this branch's
  // Bytes from the start of shared memory; X is at 0.
  int mid_at, dw_at, result_at, weights_at, parameters_at;
};

template <class T>
struct UnitParams {
  const T* in;  // planes, or the caller's tensor
  int64_t in_channel, in_image, in_pixel;
  bool in_planes;
  T* out;  // planes, or null
  int64_t out_pitch;
  T* result;  // the caller's, or null
  int64_t result_channel, result_image, result_pixel;
  const int32_t* in_table;      // [in]
  const int32_t* result_table;  // [result_channels], see GpuStep
  int in_channels;
  int result_channels;
  Branch<T> branches[2];                            // main, projection
  int batch, height, width, out_height, out_width;  // rows of all images: below 2^31
  int rows_per_cta;                                 // output rows
  int columns;                                      // of a step
  int ring;                                         // columns of MID, at the projection of X
  int step_rows;                                    // output rows convolved at a time
  bool prefetch;       // X and DW are apart: the next X is loaded while DW is in use
  Divisor by_vectors;  // 16-byte vectors of a row of X
};

// Columns of DW: a step's rows begin anywhere in a sector.
template <class T>
constexpr int64_t dw_columns(int64_t step_rows, int64_t out_width) {
  return step_rows * out_width + kSectorPixels<T> - 1;
}

// Arithmetic of rows ----------------------------------------------------------------------------

// Input rows of all images that are in once output rows below `row` can be computed, and the number
// of output rows that can be once `in_rows` are in.
template <int kStride>
constexpr int rows_needed(int row, int height, int out_height) {
  if (row == 0) return 0;
  const int image = (row - 1) / out_height;
  const int last = (row - 1 - image * out_height) * kStride + 2;
  return image * height + (last < height ? last : height);
}
template <int kStride>
constexpr int rows_complete(int in_rows, int height, int out_height) {
  const int image = in_rows / height;
  const int rest = in_rows - image * height;
  const int more = kStride == 2 ? rest / 2 : rest - 1;
  return image * out_height + (rest > 0 ? more : 0);
}
// The first input row that an output row reads.
template <int kStride>
constexpr int first_row(int row, int height, int out_height) {
  const int image = row / out_height;
  const int first = (row - image * out_height) * kStride - 1;
  return image * height + (first > 0 ? first : 0);
}

// What a CTA knows all along ------------------------------------------------------------------

template <class T>
struct Memory {
  Shared<T> x, mid, dw, result;
  Shared<T> pw1, pw2;
  Shared<float> pw1_bias, pw2_bias, dw_weights;
  Shared<int32_t> in_table, out_table;
  int x_pitch, mid_pitch, dw_pitch;
};

template <class T, bool kProjection>
SNV2_DEVICE Memory<T> memory_of(const UnitParams<T>& params, const Branch<T>& branch) {
  const Shared<unsigned char> base = shared_memory();
  Memory<T> m;
  m.x = base.template as<T>();
  m.mid = (base + branch.mid_at).template as<T>();
  m.dw = (base + branch.dw_at).template as<T>();
  m.result = (base + branch.result_at).template as<T>();
  m.pw1 = m.pw2 = (base + branch.weights_at).template as<T>();
  if (!kProjection) {
    m.pw2 =
        m.pw1 + static_cast<int>(packed_elements(branch.mid, params.in_channels, dtype_of<T>()));
  }
  m.pw1_bias = m.pw2_bias = (base + branch.parameters_at).template as<float>();
  if (!kProjection) m.pw2_bias = m.pw1_bias + static_cast<int>(padded_rows(branch.mid));
  m.dw_weights = m.pw2_bias + static_cast<int>(padded_rows(branch.out));
  m.in_table =
      (m.dw_weights + branch.mid * static_cast<int>(kDepthwiseFloats)).template as<int32_t>();
  m.out_table = m.in_table + params.in_channels;
  m.x_pitch = static_cast<int>(shared_pitch(kProjection ? params.ring : params.columns));
  m.mid_pitch = static_cast<int>(shared_pitch(params.ring));
  m.dw_pitch = static_cast<int>(shared_pitch(dw_columns<T>(params.step_rows, params.out_width)));
  return m;
}

// Starts the copy of a packed matrix, by all threads.
template <class T>
SNV2_DEVICE void load_matrix(Shared<T> to, const T* from, int elements) {
  constexpr int kVector = 16 / sizeof(T);
  for (int i = static_cast<int>(threadIdx.x) * kVector; i < elements; i += kUnitThreads * kVector) {
    cp_async<kVector>(to + i, Global<const T>{from} + i);
  }
}

template <class T>
SNV2_DEVICE void load_words(Shared<T> to, const T* from, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kUnitThreads) {
    store(to + i, load(Global<const T>{from} + i));
  }
}

template <class T>
SNV2_DEVICE void zero_row(Shared<T> row, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kUnitThreads) {
    store(row + i, rounded<T>(0.0f));
  }
}

// Load ------------------------------------------------------------------------------------------

// Starts the copy of `blocks` blocks of pixels, from pixel `from` of all images on, to columns
// `at`, at + 1, ... of X. In a ring a block is never cut.
template <class T>
SNV2_DEVICE void load_planes(const UnitParams<T>& params, const Memory<T>& m, int64_t from,
                             int blocks, int at, int wrap) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const int vectors = params.columns / kVector, wanted = blocks * (kBlock / kVector);
  const Global<const T> pixels = Global<const T>{params.in} + from;
  for (int i = static_cast<int>(threadIdx.x); i < params.in_channels * vectors; i += kUnitThreads) {
    const int row = params.by_vectors.divide(i);
    const int vector = i - row * vectors;
    if (vector >= wanted) continue;
    int column = at + vector * kVector;
    if (column >= wrap) column -= wrap;
    cp_async<kVector>(m.x + (row * m.x_pitch + column),
                      pixels + (load(m.in_table + row) * params.in_channel + vector * kVector));
  }
}

// The same from the caller's tensor, whatever its strides; pixels beyond the last are zero.
template <class T>
SNV2_DEVICE void load_tensor(const UnitParams<T>& params, const Memory<T>& m, int64_t from,
                             int blocks, int at, int wrap) {
  const int plane = params.height * params.width, columns = blocks * kBlock;
  const int64_t image0 = from / plane, first = from - image0 * plane;
  const bool along_pixels = params.in_pixel == 1;
  const int outer = along_pixels ? params.in_channels : columns;
  const int inner = along_pixels ? columns : params.in_channels;
  for (int o = warp_of_cta(); o < outer; o += kUnitWarps) {
    for (int i = lane_of_warp(); i < inner; i += kWarp) {
      const int row = along_pixels ? o : i, pixel = along_pixels ? i : o;
      int64_t image = image0, place = first + pixel;
      while (place >= plane) place -= plane, ++image;
      T value = rounded<T>(0.0f);
      if (image < params.batch) {
        value =
            load(Global<const T>{params.in} + (load(m.in_table + row) * params.in_channel +
                                               image * params.in_image + place * params.in_pixel));
      }
      int column = at + pixel;
      if (column >= wrap) column -= wrap;
      store(m.x + (row * m.x_pitch + column), value);
    }
  }
}

// Products --------------------------------------------------------------------------------------

// Has the warps compute all blocks of a product, and hands each to use(acc, first row of tiles,
// first block of columns, blocks).
template <class Mode, class T, class P, class Use>
SNV2_DEVICE void product(P matrix, int rows, const Operand<T>& x, int blocks, const Use& use) {
  constexpr int kTiles = Mode::kTiles, kBlocks = Mode::kBlocks;
  const int row_tiles = (rows + 15) / 16;
  const int tile_row = (x.depth + kTileDepth<T> - 1) / kTileDepth<T> * kTileElements<T>;
  const int row_blocks = (row_tiles + kTiles - 1) / kTiles;
  const int column_blocks = (blocks + kBlocks - 1) / kBlocks;
  for (int b = warp_of_cta(); b < row_blocks * column_blocks; b += kUnitWarps) {
    const int tile = b % row_blocks * kTiles, block = b / row_blocks * kBlocks;
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

// Pairs of neighbouring pixels of a block of results, rounded: f(row, block, pair) for rows that
// exist, with pair at column 2t of the block.
template <class T, class Act, int kTiles, int kBlocks, class F>
SNV2_DEVICE void for_each_pair(const float (&acc)[kTiles][kBlocks][4], Shared<float> bias, int rows,
                               int tile, int count, const F& f) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (tile + i) * 16 + half * 8 + lane_of_warp() / 4;
      if (row >= rows) continue;
      const float b = load(bias + row);
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        if (j >= count) break;
        f(row, j,
          Vector<T, 2>{{rounded<T>(Act::apply(acc[i][j][2 * half] + b)),
                        rounded<T>(Act::apply(acc[i][j][2 * half + 1] + b))}});
      }
    }
  }
}

// Pixels of the results of a step: columns count from `base`, on a sector; the pixels from `begin`
// to `end` are results.
struct Pixels {
  int64_t base;
  int begin, end;  // columns
};

SNV2_DEVICE uint32_t word_of(Vector<half_t, 2> v) {
  return v.values[0].bits | static_cast<uint32_t>(v.values[1].bits) << 16;
}
SNV2_DEVICE uint32_t word_of(Vector<bfloat16_t, 2> v) {
  return v.values[0].bits | static_cast<uint32_t>(v.values[1].bits) << 16;
}

template <int N, class T>
SNV2_DEVICE void store_columns(Global<T> at, const Vector<T, N>& v, int column,
                               const Pixels& pixels) {
  if (column >= pixels.begin && column + N <= pixels.end) {
    store_vector<N>(at, v);
    return;
  }
  for (int i = 0; i < N; ++i) {
    if (column + i >= pixels.begin && column + i < pixels.end) store(at + i, v.values[i]);
  }
}

// Stores a block of results to planes. In 16 bits the four lanes that share a row exchange their
// pairs, until each has one of four blocks whole: 64 bytes of a plane in one instruction. In
// float32 their pairs are a sector as they are.
template <class T, class Act, int kTiles, int kBlocks>
SNV2_DEVICE void store_planes(const UnitParams<T>& params, const Memory<T>& m,
                              const float (&acc)[kTiles][kBlocks][4], int rows, int tile, int block,
                              int count, const Pixels& pixels) {
  const int t = lane_of_warp() % 4;
  const Global<T> out = Global<T>{params.out} + pixels.base;
  if constexpr (sizeof(T) == 4) {
    for_each_pair<T, Act>(acc, m.pw2_bias, rows, tile, count, [&](int row, int j, auto pair) {
      const int column = (block + j) * kBlock + 2 * t;
      store_columns<2>(out + (load(m.out_table + row) * params.out_pitch + column), pair, column,
                       pixels);
    });
  } else {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = (tile + i) * 16 + half * 8 + lane_of_warp() / 4;
        const float b = load(m.pw2_bias + row);  // padded to whole tiles
#pragma unroll
        for (int j0 = 0; j0 < kBlocks; j0 += 4) {
          if (j0 >= count) break;
          uint32_t words[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            words[j] =
                word_of(Vector<T, 2>{{rounded<T>(Act::apply(acc[i][j0 + j][2 * half] + b)),
                                      rounded<T>(Act::apply(acc[i][j0 + j][2 * half + 1] + b))}});
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
            store_columns<8>(out + (load(m.out_table + row) * params.out_pitch + column), line,
                             column, pixels);
          }
        }
      }
    }
  }
}

// Writes the caller's tensor in logical order: the rows of this branch's result that lie in shared
// memory and, at the main branch, what passes through.
template <class T, bool kProjection>
SNV2_DEVICE void store_result(const UnitParams<T>& params, const Memory<T>& m,
                              const Branch<T>& branch, const Pixels& pixels) {
  const int plane = params.out_height * params.out_width, count = pixels.end - pixels.begin;
  const int64_t begin = pixels.base + pixels.begin;
  const int64_t image0 = begin / plane, first = begin - image0 * plane;
  const bool along_pixels = params.result_pixel == 1;
  const int outer = along_pixels ? params.result_channels : count;
  const int inner = along_pixels ? count : params.result_channels;
  for (int o = warp_of_cta(); o < outer; o += kUnitWarps) {
    for (int i = lane_of_warp(); i < inner; i += kWarp) {
      const int channel = along_pixels ? o : i, pixel = along_pixels ? i : o;
      const int32_t entry = load(Global<const int32_t>{params.result_table} + channel);
      const int row = entry - branch.first_result;
      int64_t image = image0, place = first + pixel;
      while (place >= plane) place -= plane, ++image;
      T value;
      if (entry >= 0 && row >= 0 && row < branch.out) {
        value = load(m.result + (row * m.dw_pitch + pixels.begin + pixel));
      } else if (entry < 0 && !kProjection) {
        value =
            load(Global<const T>{params.in} + ((-1 - int64_t{entry}) * params.in_channel +
                                               image * params.in_image + place * params.in_pixel));
      } else {
        continue;
      }
      store(Global<T>{params.result} + (channel * params.result_channel +
                                        image * params.result_image + place * params.result_pixel),
            value);
    }
  }
}

// Depthwise convolution -------------------------------------------------------------------------

// A warp takes 8 columns of 8 (float32: 4) channels down the rows, a lane two neighbouring columns
// (one) of a channel, with its window of inputs in registers. At stride 2 lanes are two words apart
// in 16 bits, and channels four times an odd number: odd channels begin one column earlier, so that
// they read the words between.
template <class T, int kStride>
SNV2_DEVICE void convolve(const UnitParams<T>& params, Shared<T> x, int x_pitch, Shared<T> out,
                          int out_pitch, Shared<float> weights, int channels, int row_start,
                          int lead, int row0, int rows, int column0) {
  constexpr int kPixels = 4 / static_cast<int>(sizeof(T));
  constexpr int kAcross = kBlock / kPixels, kChannels = kWarp / kAcross;
  constexpr int kSpan = kPixels * kStride + 3 - kStride;
  const int height = params.height, width = params.width, ring = params.ring;
  const int groups = (channels + kChannels - 1) / kChannels;
  constexpr bool kShifted = kStride == 2 && sizeof(T) == 2;
  const int strips = (params.out_width + kBlock - 1 + kShifted) / kBlock;
  const int image0 = row0 / params.out_height;
  const int local0 = row0 - image0 * params.out_height;

  for (int task = warp_of_cta(); task < groups * strips; task += kUnitWarps) {
    const int wanted = task % groups * kChannels + lane_of_warp() / kAcross;
    const int channel = wanted < channels ? wanted : channels - 1;
    const int first =
        task / groups * kBlock + lane_of_warp() % kAcross * kPixels - (kShifted ? channel % 2 : 0);
    const Shared<T> line = x + channel * x_pitch;
    float w[kDepthwiseFloats];
    for (int i = 0; i < kDepthwiseFloats; ++i) {
      w[i] = load(weights + (channel * static_cast<int>(kDepthwiseFloats) + i));
    }

    float window[3][kSpan];
    const auto read = [&](float (&to)[kSpan], int image, int row) {
      const bool inside = row >= 0 && row < height;
      const int at = inside ? ((image * height + row - row_start) * width + lead) % ring : 0;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        to[i] = 0.0f;
        if (!inside) continue;
        const int column = first * kStride - 1 + i;
        const int clamped = column < 0 ? 0 : column < width ? column : width - 1;
        int there = at + clamped;
        if (there >= ring) there -= ring;
        const float value = to_float(load(line + there));
        to[i] = column == clamped ? value : 0.0f;
      }
    };
    int image = image0, local = local0;
    for (int r = 0; r < rows; ++r) {
      const int top = local * kStride - 1;
      if (r == 0 || local == 0) {
        read(window[0], image, top);
        if constexpr (kStride == 1) read(window[1], image, top + 1);
      } else {
#pragma unroll
        for (int i = 0; i < kSpan; ++i) {
          window[0][i] = window[kStride][i];
          window[1][i] = window[2][i];
        }
      }
      if constexpr (kStride == 2) read(window[1], image, top + 1);
      read(window[2], image, top + 2);
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        float sum = 0.0f;
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) sum += w[tap] * window[tap / 3][p * kStride + tap % 3];
        const int column = first + p;
        if (wanted < channels && column >= 0 && column < params.out_width) {
          store(out + (channel * out_pitch + column0 + r * params.out_width + column),
                rounded<T>(sum + w[9]));
        }
      }
      if (++local == params.out_height) local = 0, ++image;
    }
  }
  if (channels % kTileDepth<T> != 0) zero_row(out + channels * out_pitch, out_pitch);
}

// The march -------------------------------------------------------------------------------------

template <class T, int kStride, class Mode, class Act, bool kProjection>
SNV2_DEVICE void march(const UnitParams<T>& params) {
  const Branch<T>& branch = params.branches[kProjection ? 1 : 0];
  const Memory<T> m = memory_of<T, kProjection>(params, branch);
  const int width = params.width, depth = params.in_channels;
  const int ring = params.ring, columns = params.columns;

  // The range, in output rows, and the pixels it reads.
  const int all_rows = params.batch * params.out_height;
  int row = static_cast<int>(blockIdx.x) * params.rows_per_cta;
  const int row_end = all_rows - row < params.rows_per_cta ? all_rows : row + params.rows_per_cta;
  const int row_start = first_row<kStride>(row, params.height, params.out_height);
  // Pixels count from `start`, at or less than a sector before the first row.
  const int64_t start = int64_t{row_start} * width / kSectorPixels<T> * kSectorPixels<T>;
  const int lead = static_cast<int>(int64_t{row_start} * width - start);
  const int end =
      (rows_needed<kStride>(row_end, params.height, params.out_height) - row_start) * width + lead;

  // Load what stays.
  if constexpr (Mode::kResident) {
    if constexpr (!kProjection) {
      load_matrix(m.pw1, branch.pw1,
                  static_cast<int>(packed_elements(branch.mid, depth, dtype_of<T>())));
    }
    load_matrix(m.pw2, branch.pw2,
                static_cast<int>(packed_elements(branch.out, branch.mid, dtype_of<T>())));
  }
  if constexpr (!kProjection) {
    load_words(m.pw1_bias, branch.pw1_bias, static_cast<int>(padded_rows(branch.mid)));
  }
  load_words(m.pw2_bias, branch.pw2_bias, static_cast<int>(padded_rows(branch.out)));
  load_words(m.dw_weights, branch.dw, branch.mid * static_cast<int>(kDepthwiseFloats));
  load_words(m.in_table, params.in_table, depth);
  load_words(m.out_table, branch.out_table, branch.out);
  // Columns beyond the results of a step are multiplied and thrown away.
  zero_row(m.dw, static_cast<int>(shared_rows<T>(branch.mid)) * m.dw_pitch);
  grid_dependents_launch();
  grid_dependency_wait();
  sync_threads();

  int ring_at = 0;  // place of pixel `done` in the ring
  const auto start_load = [&](int done, int at) {
    const int blocks = ((end - done < columns ? end - done : columns) + kBlock - 1) / kBlock;
    const int wrap = kProjection ? ring : columns;
    if (params.in_planes) {
      load_planes(params, m, start + done, blocks, kProjection ? at : 0, wrap);
    } else {
      load_tensor(params, m, start + done, blocks, kProjection ? at : 0, wrap);
    }
    if (!kProjection && depth % kTileDepth<T> != 0) {
      zero_row(m.x + depth * m.x_pitch, m.x_pitch);
    }
    cp_async_commit();
  };
  start_load(0, 0);

  for (int done = 0; done < end; done += columns) {
    const int blocks = ((end - done < columns ? end - done : columns) + kBlock - 1) / kBlock;
    const bool more = done + columns < end;
    int next_at = ring_at + columns;
    if (next_at >= ring) next_at -= ring;
    cp_async_wait<0>();
    sync_threads();

    // First product.
    if constexpr (!kProjection) {
      const auto ring_column = [&](int block) {
        const int column = ring_at + block * kBlock;
        return column < ring ? column : column - ring;
      };
      const auto use = [&](const auto& acc, int tile, int block, int count) {
        for_each_pair<T, Act>(
            acc, m.pw1_bias, branch.mid, tile, count, [&](int r, int j, auto pair) {
              store_vector<2>(
                  m.mid + (r * m.mid_pitch + ring_column(block + j) + lane_of_warp() % 4 * 2),
                  pair);
            });
      };
      const Operand<T> x{m.x, m.x_pitch, depth};
      if constexpr (Mode::kResident) {
        product<Mode>(m.pw1, branch.mid, x, blocks, use);
      } else {
        product<Mode>(Global<const T>{branch.pw1}, branch.mid, x, blocks, use);
      }
      sync_threads();
      if (params.prefetch && more) start_load(done + columns, next_at);
    }

    // The rows that are complete now.
    int complete = row_end;
    if (more) {
      const int there = done + columns - lead;
      complete = rows_complete<kStride>(row_start + (there > 0 ? there / width : 0), params.height,
                                        params.out_height);
      if (complete > row_end) complete = row_end;
    }
    while (row < complete) {
      const int rows = complete - row < params.step_rows ? complete - row : params.step_rows;
      const int64_t first = int64_t{row} * params.out_width;
      Pixels pixels;
      pixels.base = first / kSectorPixels<T> * kSectorPixels<T>;
      pixels.begin = static_cast<int>(first - pixels.base);
      pixels.end = pixels.begin + rows * params.out_width;

      // Depthwise convolution.
      convolve<T, kStride>(params, kProjection ? m.x : m.mid, kProjection ? m.x_pitch : m.mid_pitch,
                           m.dw, m.dw_pitch, m.dw_weights, branch.mid, row_start, lead, row, rows,
                           pixels.begin);
      sync_threads();

      // Second product.
      const auto use = [&](const auto& acc, int tile, int block, int count) {
        if (params.out != nullptr) {
          store_planes<T, Act>(params, m, acc, branch.out, tile, block, count, pixels);
        }
        if (params.result != nullptr) {
          for_each_pair<T, Act>(
              acc, m.pw2_bias, branch.out, tile, count, [&](int r, int j, auto pair) {
                store_vector<2>(
                    m.result + (r * m.dw_pitch + (block + j) * kBlock + lane_of_warp() % 4 * 2),
                    pair);
              });
        }
      };
      const Operand<T> x{m.dw, m.dw_pitch, branch.mid};
      const int dw_blocks = (pixels.end + kBlock - 1) / kBlock;
      if constexpr (Mode::kResident) {
        product<Mode>(m.pw2, branch.out, x, dw_blocks, use);
      } else {
        product<Mode>(Global<const T>{branch.pw2}, branch.out, x, dw_blocks, use);
      }
      sync_threads();
      if (params.result != nullptr) {
        store_result<T, kProjection>(params, m, branch, pixels);
        sync_threads();
      }
      row += rows;
    }
    ring_at = next_at;
    if (more && (kProjection || !params.prefetch)) start_load(done + columns, next_at);
  }
}

template <class T, int kStride, class Mode, class Act>
__global__ void __launch_bounds__(kUnitThreads, 2) unit_kernel(UnitParams<T> params) {
  if constexpr (kStride == 2) {
    if (blockIdx.y == 1) return march<T, kStride, Mode, Act, true>(params);
  }
  march<T, kStride, Mode, Act, false>(params);
}

}  // namespace snv2::SNV2_GPU
