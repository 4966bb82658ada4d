// The head: features_kernel is a 1x1 convolution, activation and mean over pixels, linear_kernel
// the classifier on the features of all images.
//
// Features. A CTA takes a block of features (rows of the matrix) of a group of whole images; the
// map that is averaged, 100 KB of an image in 16 bits, stays in registers. The images of a group
// lie side by side in each plane: their pixels, with the padding of rows, are the columns of one
// product, up to 112, which two images of 7 x 7 fill. A stage of the depth is copied to shared
// memory while the one before is multiplied; the matrix is read from L2, each element once for 112
// columns.
//   many images   a warp takes 32 rows, 4 warps 128, and 8 warps those of two groups, which meet
//                 the matrix in L1: 300 KB from L2 for four images and 464 channels in 16 bits, 37
//                 multiply-adds for each byte
//   few images    2 or 4 warps share the depth and a CTA takes 64 to 16 rows, so that one image
//                 has 64 CTAs; their sums are added in shared memory
// An image of more pixels than 112 is a group of its own and takes several rounds.
//
// Linear. A CTA takes 16 or 32 classes of up to 64 images. Its 8 warps share the depth: a warp has
// its part of the matrix in registers, so that all of it is under way at once, and finds the
// features of the images in shared memory. 1000 classes of 1024 features are 2 MB of weights in 16
// bits: 63 CTAs read 32 KB each for one image, 128 CTAs 64 KB each for 256.
//
// All sums are made in a fixed order.
#pragma once

#include <cstdint>

#include "cuda/activation.h"
#include "cuda/line.h"
#include "cuda/span.h"

namespace snv2::SNV2_GPU {

// Features --------------------------------------------------------------------------------------

constexpr int kFeatureWarps = 4;  // of a group
constexpr int kFeatureThreads = kFeatureWarps * kWarp;
constexpr int kFeatureGroups = 2;  // of a CTA, at most
template <class T>
constexpr int kFeatureBlocks = sizeof(T) == 4 ? 8 : 14;  // of columns; registers bound them
template <class T>
constexpr int kFeatureColumns = kFeatureBlocks<T> * kBlock;

template <class T>
struct FeaturesParams {
  const T* in;              // planes
  const int32_t* in_table;  // [depth] planes
  const T* weights;         // packed [features, depth]
  const float* bias;        // [features], padded
  After after;
  T* out;  // [batch][features]
  int64_t in_pitch;
  int64_t batch;
  int plane;       // pixels of an image, with padding
  int width, row;  // pixels of a row, without padding and with it
  float pixels;    // of an image, without padding
  int depth, features;
  int row_blocks;                      // CTAs of the same groups
  int images;                          // of a group
  int parts;                           // warps that share the depth
  int blocks, rounds;                  // of columns, at most
  int chunk;                           // channels of a stage
  int pitch;                           // of a stage's rows
  int stage_bytes, sums_at, table_at;  // of shared memory; one group's stage
};

// The columns of a group.
struct FeatureGroup {
  int64_t image;
  int64_t base;  // pixel of column 0
  int images;
  int end;  // column after the last image's last pixel

  template <class T>
  SNV2_DEVICE FeatureGroup(const FeaturesParams<T>& params, int index) {
    image = int64_t{index} * params.images;
    const int64_t left = params.batch - image;
    images = static_cast<int>(left < params.images ? left : params.images);
    base = image * params.plane;
    end = images > 0 ? images * params.plane : 0;
  }
  // Blocks of columns from column `first` on, if any.
  template <class T>
  SNV2_DEVICE int blocks(int first) const {
    const int left = (end - first + kBlock - 1) / kBlock;
    return left < kFeatureBlocks<T> ? left : kFeatureBlocks<T>;
  }
};

// Starts the copy of channels from `first` on, for columns from `column0` on.
template <class T>
SNV2_DEVICE void load_stage(const FeaturesParams<T>& params, const FeatureGroup& group,
                            Shared<T> stage, int first, int column0) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const Shared<int32_t> table = (shared_memory() + params.table_at).template as<int32_t>() + first;
  const int left = params.depth - first;
  const int depth = left < params.chunk ? left : params.chunk;
  const int columns = group.blocks<T>(column0) * kBlock;
  // Eight or 16 lanes take a row, a vector each, and go down.
  static_assert(kFeatureColumns<T> <= 16 * kVector);
  const int across = columns > 8 * kVector ? 4 : 3, rows = kFeatureThreads >> across;
  const int thread = static_cast<int>(threadIdx.x) % kFeatureThreads;
  const int begin = thread >> across, column = (thread & ((1 << across) - 1)) * kVector;
  if (column < columns) {
    const Global<const T> pixels = Global<const T>{params.in} + (group.base + column0 + column);
    Address<T> to(stage + (begin * params.pitch + column));
#pragma unroll 2
    for (int row = begin; row < depth; row += rows) {
      cp_async<kVector>(to, pixels + load(table + row) * params.in_pitch);
      to = to + rows * params.pitch;
    }
  }
  if (depth % kTileDepth<T> != 0) {
    for (int i = thread; i < columns; i += kFeatureThreads) {
      store(stage + (depth * params.pitch + i), rounded<T>(0.0f));
    }
  }
}

// Adds the accumulators of the warps that share rows to those of the first one.
template <int kTiles, int kBlocks>
SNV2_DEVICE void add_parts(float (&acc)[kTiles][kBlocks][4], Shared<float> sums, int parts,
                           int blocks) {
  constexpr int kValues = kTiles * kBlocks * 4;
  const int part = warp_of_cta() % parts;
  const Shared<float> first =
      sums + (warp_of_cta() / parts * (parts - 1) * kValues * kWarp + lane_of_warp());
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    if (part > 0 && v / 4 % kBlocks < blocks) {
      store(first + ((part - 1) * kValues + v) * kWarp,
            acc[v / 4 / kBlocks][v / 4 % kBlocks][v % 4]);
    }
  }
  sync_threads();
  if (part > 0) return;
  for (int other = 0; other < parts - 1; ++other) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      if (v / 4 % kBlocks >= blocks) continue;
      acc[v / 4 / kBlocks][v / 4 % kBlocks][v % 4] += load(first + (other * kValues + v) * kWarp);
    }
  }
}

// What a warp adds up over columns, for one image after the other: rows g and g + 8 of its tiles.
template <class T, class Act, int kTiles>
class Means {
 public:
  SNV2_DEVICE Means(const FeaturesParams<T>& params, const FeatureGroup& group, int row)
      : to_{params.out + (group.image * params.features + row)},
        features_(params.features),
        left_(params.features - row),
        blocks_of_image_(params.plane / kBlock),
        blocks_of_row_(params.row / kBlock),
        last_columns_(params.width - params.row + kBlock),
        pixels_(params.pixels),
        blocks_left_(group.images > 0 ? blocks_of_image_ : 0),
        row_left_(blocks_of_row_),
        images_(group.images) {
    reset();
  }

  // The next `blocks` blocks of columns. A block is of one row; its last one may end in padding.
  SNV2_DEVICE void add(const float (&acc)[kTiles][kFeatureBlocks<T>][4], int blocks) {
    const int t = lane_of_warp() % 4;
#pragma unroll
    for (int j = 0; j < kFeatureBlocks<T>; ++j) {
      if (j >= blocks || images_ == 0) break;
      const int columns = --row_left_ == 0 ? last_columns_ : kBlock;
      if (row_left_ == 0) row_left_ = blocks_of_row_;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) {
          const float value = Act::apply(acc[i / 2][j][i % 2 * 2 + c]);
          sums_[i] += 2 * t + c < columns ? value : 0.0f;
        }
      }
      if (--blocks_left_ == 0) finish();
    }
  }

 private:
  SNV2_DEVICE void reset() {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) sums_[i] = 0.0f;
  }
  // Writes an image's means: lane (g, t) that of row g of the t-th eight.
  SNV2_DEVICE void finish() {
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
    float mine = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      float sum = sums_[i];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (t == i) mine = sum;
    }
    const int row = 8 * t + g;
    if (t < 2 * kTiles && row < left_) {
      store(to_ + row, rounded<T>(mine / pixels_));
    }
    reset();
    --images_;
    blocks_left_ = blocks_of_image_;
    to_ = to_ + features_;
  }

  Global<T> to_;  // the next image's
  int features_, left_;
  int blocks_of_image_, blocks_of_row_;
  int last_columns_;            // of a row's last block that count
  float pixels_;                // of an image
  int blocks_left_, row_left_;  // blocks of this image, of this row
  int images_;
  float sums_[2 * kTiles];
};

template <class T, class Act, int kTiles>
__global__ void __launch_bounds__(kFeatureThreads*(kTiles == 2 ? kFeatureGroups : 1),
                                  kTiles == 2 ? 1 : 3) features_kernel(FeaturesParams<T> params) {
  constexpr int kAhead = kTiles == 2 ? 2 : sizeof(T) == 4 ? 3 : 4;  // registers bound it
  constexpr int kBlocks = kFeatureBlocks<T>;
  const int groups = static_cast<int>(blockDim.x) / kFeatureThreads;
  const int index = static_cast<int>(blockIdx.x) / params.row_blocks;
  const int row_block = static_cast<int>(blockIdx.x) - index * params.row_blocks;
  const int side = warp_of_cta() / kFeatureWarps, warp = warp_of_cta() % kFeatureWarps;
  const FeatureGroup group(params, index * groups + side);
  const int parts = params.parts, part = warp % parts;
  const int row = (row_block * (kFeatureWarps / parts) + warp / parts) * kTiles * 16;
  const int tiles = (params.features + 15) / 16;
  const int deep = (params.depth + kTileDepth<T> - 1) / kTileDepth<T>;

  // Load what no kernel writes.
  const Shared<int32_t> table = (shared_memory() + params.table_at).template as<int32_t>();
  for (int i = static_cast<int>(threadIdx.x); i < params.depth; i += static_cast<int>(blockDim.x)) {
    store(table + i, load(Global<const int32_t>{params.in_table} + i));
  }
  Global<const T> matrix[kTiles];
  float bias[2 * kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int tile = row / 16 + i < tiles ? row / 16 + i : tiles - 1;
    matrix[i] = Global<const T>{params.weights} + int64_t{tile} * deep * kTileElements<T>;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bias[2 * i + half] =
          load(Global<const float>{params.bias} + (tile * 16 + half * 8 + lane_of_warp() / 4));
    }
  }
  grid_dependents_launch();
  grid_dependency_wait();
  sync_threads();

  const auto stage_of = [&](int stage) {
    return (shared_memory() + (stage * groups + side) * params.stage_bytes).template as<T>();
  };
  Means<T, Act, kTiles> means(params, group, row);
  load_stage(params, group, stage_of(0), 0, 0);
  cp_async_commit();
  float acc[kTiles][kBlocks][4];
  const int columns = params.rounds * kFeatureColumns<T>;
  for (int column0 = 0, first = 0, stage = 0; column0 < columns; stage ^= 1) {
    const int blocks = group.blocks<T>(column0);
    // Load the next stage.
    const bool last = first + params.chunk >= params.depth;
    const int next_first = last ? 0 : first + params.chunk;
    const int next_column0 = last ? column0 + kFeatureColumns<T> : column0;
    if (next_column0 < columns) {
      load_stage(params, group, stage_of(stage ^ 1), next_first, next_column0);
    }
    cp_async_commit();
    cp_async_wait<1>();
    sync_threads();

    // Multiply.
    if (first == 0) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
          for (int d = 0; d < 4; ++d) acc[i][j][d] = part == 0 ? bias[2 * i + d / 2] : 0.0f;
        }
      }
    }
    const int depth = last ? params.depth - first : params.chunk;
    const int count = (depth + kTileDepth<T> - 1) / kTileDepth<T>;
    const int from = count * part / parts, to = count * (part + 1) / parts;
    if (from < to && blocks > 0) {
      Global<const T> at[kTiles];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        at[i] = matrix[i] + (first / kTileDepth<T> + from) * kTileElements<T>;
      }
      const int above = from * kTileDepth<T>, below = to * kTileDepth<T>;
      multiply<kAhead>(acc, at,
                       Operand<T>{stage_of(stage) + above * params.pitch, params.pitch,
                                  (below < depth ? below : depth) - above},
                       blocks);
    }

    // Average.
    if (last) {
      if (parts > 1) {
        add_parts(acc, (shared_memory() + params.sums_at).template as<float>(), parts, blocks);
      }
      if (part == 0) {
        activate<Act>(acc, params.after, params.features, row / 16);
        means.add(acc, blocks);
      }
    }
    sync_threads();
    first = next_first, column0 = next_column0;
  }
  cp_async_wait<0>();
}

// Linear ----------------------------------------------------------------------------------------

constexpr int kLinearWarps = 8;
constexpr int kLinearThreads = kLinearWarps * kWarp;

// Tiles of 16 classes and blocks of 8 images of a CTA, tiles of the depth that a warp holds, and
// CTAs that registers must leave room for: many images leave an SM's shared memory to one.
struct FewImages {
  static constexpr int kTiles = 1, kBlocks = 2, kSteps = 8, kCtasPerSm = 2;
};
template <class T>
struct ManyImages {
  static constexpr int kTiles = sizeof(T) == 4 ? 1 : 2, kBlocks = 8, kSteps = 4, kCtasPerSm = 1;
};

template <class T>
struct LinearParams {
  const T* in;        // [batch][depth]
  const T* weights;   // packed [classes, depth]
  const float* bias;  // [classes], padded
  T* out;             // [batch][classes]
  int64_t out_image, out_class;
  int64_t batch;
  int depth, classes;
  int row_blocks;  // CTAs of a group
  int images;      // of a group
  int copy;        // elements that are copied at once
};

template <class T, class Shape>
constexpr int kLinearChunk = kLinearWarps * Shape::kSteps * kTileDepth<T>;
// Eight images lie in different banks.
template <class T, class Shape>
constexpr int kLinearPitch = kLinearChunk<T, Shape> + 16 / static_cast<int>(sizeof(T));

// acc += one tile of the depth of each of the kTiles matrices x `x`, images as rows.
template <class T, int kTiles, int kBlocks>
SNV2_DEVICE void multiply_images(float (&acc)[kTiles][kBlocks][4], const Tile<T> (&a)[kTiles],
                                 Shared<T> x, int pitch, int images) {
  const int lane = lane_of_warp();
#pragma unroll
  for (int j = 0; j < kBlocks; j += 2) {
    if (j * kBlock >= images) break;
    // Eight rows of both halves of the tile, for two blocks.
    const int image = (j + lane / 16) * kBlock + lane % 8;
    uint32_t b[4];
    ldmatrix<4>(b, x + ((image < images ? image : images - 1) * pitch + lane / 8 % 2 * 8));
    const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      mma(acc[i][j], a[i], b0);
      mma(acc[i][j + 1], a[i], b1);
    }
  }
}
template <int kTiles, int kBlocks>
SNV2_DEVICE void multiply_images(float (&acc)[kTiles][kBlocks][4], const Tile<float> (&a)[kTiles],
                                 Shared<float> x, int pitch, int images) {
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    if (j * kBlock >= images) break;
    Vector<float, 4> b[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int image = j * kBlock + lane_of_warp() % 4 * 2 + c;
      b[c] = load_vector<4>(x + (image < images ? image : images - 1) * pitch);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        float sum = a[i].a[0][d / 2] * b[d % 2].values[0];
#pragma unroll
        for (int k = 1; k < 4; ++k) sum += a[i].a[k][d / 2] * b[d % 2].values[k];
        acc[i][j][d] += sum;
      }
    }
  }
}

template <class T, class Shape>
__global__ void __launch_bounds__(kLinearThreads, Shape::kCtasPerSm)
    linear_kernel(LinearParams<T> params) {
  constexpr int kTiles = Shape::kTiles, kBlocks = Shape::kBlocks, kSteps = Shape::kSteps;
  constexpr int kChunk = kLinearChunk<T, Shape>, kPitch = kLinearPitch<T, Shape>;
  constexpr int kRows = kTiles * 16, kValues = kTiles * kBlocks * 4;
  const int warp = warp_of_cta(), lane = lane_of_warp();
  const int row = static_cast<int>(blockIdx.x) % params.row_blocks * kRows;
  const int64_t image = static_cast<int64_t>(blockIdx.x) / params.row_blocks * params.images;
  const int images =
      static_cast<int>(params.batch - image < params.images ? params.batch - image : params.images);
  const int row_tiles = (params.classes + 15) / 16;
  const int deep = (params.depth + kTileDepth<T> - 1) / kTileDepth<T>;
  const int chunks = (params.depth + kChunk - 1) / kChunk;

  const auto load_weights = [&](Tile<T>(&to)[kTiles], int chunk, int step) {
    const int k = (chunk * kLinearWarps + warp) * kSteps + step;
    if (k >= deep) return;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int tile = row / 16 + i < row_tiles ? row / 16 + i : row_tiles - 1;
      load_tile(to[i],
                Global<const T>{params.weights} + (int64_t{tile} * deep + k) * kTileElements<T>);
    }
  };
  const auto stage_of = [&](int chunk) {
    return shared_memory().template as<T>() + chunk % 2 * params.images * kPitch;
  };
  const auto load_images = [&](int chunk) {
    const int left = params.depth - chunk * kChunk, padded = deep * kTileDepth<T> - chunk * kChunk;
    for (int n = warp; n < images; n += kLinearWarps) {
      load_line(stage_of(chunk) + n * kPitch,
                Global<const T>{params.in} + ((image + n) * params.depth + chunk * kChunk), 0,
                left < kChunk ? left : kChunk, padded < kChunk ? padded : kChunk, params.copy);
    }
  };

  // Load.
  Tile<T> a[kSteps][kTiles];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) load_weights(a[step], 0, step);
  grid_dependents_launch();
  grid_dependency_wait();
  load_images(0);
  cp_async_commit();

  float acc[kTiles][kBlocks][4];
  begin(acc, Start<kTiles>{});
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (chunk + 1 < chunks) load_images(chunk + 1);
    cp_async_commit();
    cp_async_wait<1>();
    sync_threads();

    // Multiply.
    const Shared<T> x = stage_of(chunk) + warp * kSteps * kTileDepth<T>;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if ((chunk * kLinearWarps + warp) * kSteps + step >= deep) break;
      multiply_images(acc, a[step], x + step * kTileDepth<T>, kPitch, images);
      load_weights(a[step], chunk + 1, step);
    }
    sync_threads();
  }
  cp_async_wait<0>();

  // Add the warps' parts: [warp][value][lane], lanes so turned that classes of an image, which are
  // spread over values, are in different banks.
  const Shared<float> sums = shared_memory().template as<float>();
  const auto turn = [&](int i, int d) { return d / 2 + 2 * (kTiles == 2 ? i : d % 2); };
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        const int value = (i * kBlocks + j) * 4 + d;
        store(sums + ((warp * kValues + value) * kWarp + (lane ^ turn(i, d))), acc[i][j][d]);
      }
    }
  }
  sync_threads();
  for (int o = static_cast<int>(threadIdx.x); o < kRows * images; o += kLinearThreads) {
    const int r = o % kRows, n = o / kRows;
    if (row + r >= params.classes) continue;
    const int i = r / 16, d = r % 16 / 8 * 2 + n % 2;
    const int value = (i * kBlocks + n / kBlock) * 4 + d;
    const int from = (r % 8 * 4 + n % kBlock / 2) ^ turn(i, d);
    float sum = load(Global<const float>{params.bias} + (row + r));
    for (int w = 0; w < kLinearWarps; ++w) {
      sum += load(sums + ((w * kValues + value) * kWarp + from));
    }
    store(Global<T>{params.out} +
              ((image + n) * params.out_image + int64_t{row + r} * params.out_class),
          rounded<T>(sum));
  }
}

}  // namespace snv2::SNV2_GPU
