// Channels-last (NHWC) maps.
//
// Whole rows of pixels are contiguous, channels of a pixel need not even be whole sectors, so all
// channels stay together. Images that fit in shared memory are tiles: one run of memory in, one
// out. Of larger ones a tile is a strip of rows. A CTA marches down its strip with a ring of input
// rows in shared memory; while one output row is computed, the rows that the next ones add are on
// their way. Each row is read once; two strips of one image both read the rows around the cut, and
// each reads 44 bytes of parameters per channel: 5 % for two strips of 28 x 28, so images are cut
// only where the batch cannot feed the GPU otherwise.
//
// Lanes take neighbouring channels, and warps some columns (pixel_march.h). A launch has as many
// threads as there are such pieces of a row, or of an image.
#pragma once

#include <algorithm>

#include "cuda/pixel_march.h"

namespace snv2::SNV2_GPU {

// Lanes of pairs have twice as many registers, and those at stride 2 use them.
template <int kChannels>
constexpr int kMostPixelThreads = 512 / kChannels;
template <int kChannels, int kStride>
constexpr int kPixelCtas = kStride == 1 ? kChannels : 1;  // of an SM, at least

// How a row, or the columns of an image, are cut into the pieces of lanes.
struct PixelJobs {
  int lanes;   // for all channels: whole warps
  int groups;  // of columns

  // The first channel, of `each`.
  SNV2_DEVICE int channel(int job, int each) const { return job % lanes * each; }
};

template <int kChannels, class T>
PixelJobs pixel_jobs(const Operands<T>& op) {
  return {static_cast<int>(ceil_div(op.channels, kWarp * kChannels) * kWarp),
          static_cast<int>(ceil_div(op.out_width, kPixelColumns))};
}

// Threads that take equal shares of `jobs`, which are whole warps.
template <int kChannels>
int pixel_threads(int64_t jobs) {
  constexpr int64_t kLeast = 128;  // which copy
  const int64_t turns = ceil_div(jobs, kMostPixelThreads<kChannels>);
  return static_cast<int>(std::max(kLeast, ceil_div(ceil_div(jobs, turns), kWarp) * kWarp));
}

// Strips -------------------------------------------------------------------------------------

template <class T>
struct PixelsParams {
  Operands<T> op;
  PixelJobs jobs;
  bool restarts;              // there are more jobs than threads
  bool vectors;               // rows, in and out, begin and end with a vector of 16 bytes
  int64_t strips;             // of one image
  int64_t tiles;              // in all
  int rows;                   // output rows of a strip
  int row_bytes;              // of shared memory, for an input row
  int out_at, parameters_at;  // in shared memory; the ring is at 0
};

// Rows that one output row reads, and rows that the next one adds.
constexpr int ring_rows(int stride) { return 3 + stride; }

// Goes through the strips of a CTA. Where there are more jobs than threads, no job stays with its
// thread: it restarts for each row, and reads three.
template <class T, bool kPassthrough, Main kMain, int kChannels, bool kRestarts>
SNV2_DEVICE void march_strips(const PixelsParams<T>& params) {
  constexpr int kStride = stride_of(kMain);
  constexpr int kRing = ring_rows(kStride);
  constexpr int kUnit = kPassthrough ? 2 : 1;
  constexpr int kAhead = kStride == 1 && !kRestarts ? 2 : 1;  // rows of results, that loads are
  static_assert(!kPassthrough || kStride == 1, "passed-through pixels keep their place");
  using March = PixelMarch<T, kPassthrough, kStride, kChannels>;
  const Operands<T>& op = params.op;
  const int thread = static_cast<int>(threadIdx.x);
  const int channels = static_cast<int>(op.channels);
  const int height = static_cast<int>(op.height), out_height = static_cast<int>(op.out_height);
  const int row_elements = static_cast<int>(op.width * op.source_pixel);
  const int out_elements = static_cast<int>(op.out_width) * kUnit * channels;
  const int row_size = row_elements * static_cast<int>(sizeof(T));
  const int out_size = out_elements * static_cast<int>(sizeof(T));
  const int jobs = params.jobs.lanes * params.jobs.groups;
  const Shared<unsigned char> memory = shared_memory();
  const PixelParameters parameters((memory + params.parameters_at).template as<float>(), channels);
  parameters.load_all(op);
  sync_threads();

  const bool paired = misalignment(Global<T>{op.out}, 2 * static_cast<int>(sizeof(T))) == 0;
  const auto march_of = [&](int job) {
    const int channel = params.jobs.channel(job, kChannels);
    return March(parameters, op, channel < channels ? channel : channels - kChannels,
                 job / params.jobs.lanes * kPixelColumns, paired);
  };
  const bool idle = thread >= jobs || params.jobs.channel(thread, kChannels) >= channels;
  March march = march_of(thread < jobs ? thread : 0);

  for (int64_t tile = blockIdx.x; tile < params.tiles; tile += gridDim.x) {
    const int64_t image = tile / params.strips;
    const int row0 = static_cast<int>(tile % params.strips) * params.rows;
    const int row1 = row0 + params.rows < out_height ? row0 + params.rows : out_height;
    const Global<const T> x =
        Global<const T>{kPassthrough ? op.pass : op.source} + image * op.source_image;
    const Global<T> out = Global<T>{op.out} + image * op.out_image;
    const int phase = misalignment(x, 16), out_phase = misalignment(out, 16);
    const auto input = [&](int y) {
      const int slot = static_cast<int>(static_cast<unsigned>(y) % kRing);
      const int at = (phase + y * row_size) & 15;
      return (memory + (slot * params.row_bytes + at)).template as<T>();
    };

    // Loads the rows that results up to `row` need.
    int next = row0 * kStride > 0 ? row0 * kStride - 1 : 0;  // input row not yet asked for
    const int end = row1 * kStride < height ? row1 * kStride + 2 - kStride : height;
    const auto load_rows = [&](int row) {
      const int last = row * kStride + 1 < end - 1 ? row * kStride + 1 : end - 1;
#pragma unroll 1
      for (; next <= last; ++next) {
        const Global<const T> from = x + static_cast<int64_t>(next) * row_elements;
        if (params.vectors) {
          load_vectors(input(next), from, row_elements);
        } else {
          const int slot = static_cast<int>(static_cast<unsigned>(next) % kRing);
          load_span<kAnyTeam>(memory + slot * params.row_bytes, from, row_elements);
        }
      }
      cp_async_commit();
    };

    march.restart();
    int row = row0 - March::kBefore;
    for (int i = 0; i < kAhead; ++i) load_rows(row + i);
#pragma unroll 1
    for (; row < row1; ++row) {
      // Wait for what this row reads, and for all who read what gives way.
      cp_async_wait<kAhead - 1>();
      sync_threads();
      load_rows(row + kAhead);

      // Compute.
      const bool wanted = row >= row0;
      const int at = params.out_at + ((out_phase + row * out_size) & 15);
      const Shared<T> staged = (memory + at).template as<T>();
      if constexpr (!kRestarts) {
        if (!idle) march.step(row, height, wanted, input, staged);
      } else if (wanted) {
#pragma unroll 1
        for (int job = thread; job < jobs; job += static_cast<int>(blockDim.x)) {
          if (params.jobs.channel(job, kChannels) >= channels) continue;
          march = march_of(job);
#pragma unroll 1
          for (int k = row - March::kBefore; k <= row; ++k) {
            march.step(k, height, k == row, input, staged);
          }
        }
      }
      if (!wanted) continue;
      sync_threads();

      // Store.
      const Global<T> out_row = out + static_cast<int64_t>(row) * out_elements;
      if (params.vectors) {
        store_vectors(out_row, staged, out_elements);
      } else {
        store_span<kAnyTeam>(out_row, staged, out_elements);
      }
    }
    cp_async_wait<0>();
    sync_threads();
  }
}

template <class T, bool kPassthrough, Main kMain, int kChannels>
__global__ void __launch_bounds__(kMostPixelThreads<kChannels>,
                                  kPixelCtas<kChannels, stride_of(kMain)>)
    pixels_kernel(PixelsParams<T> params) {
  if (params.restarts) {
    march_strips<T, kPassthrough, kMain, kChannels, true>(params);
  } else {
    march_strips<T, kPassthrough, kMain, kChannels, false>(params);
  }
}

// Output rows of a strip. Halo rows and parameters cost memory traffic, so an image is cut only
// if there are few of them, or if it is long.
inline int64_t strip_rows(int64_t batch, int64_t out_height) {
  constexpr int64_t kLong = 28, kShort = 7, kCtas = 132;
  if (batch >= 8) return std::min(out_height, kLong);
  return std::min(out_height, std::max(kShort, ceil_div(batch * out_height, kCtas)));
}

// Fills in the tiling; false if the rows do not fit.
template <class T, bool kPassthrough, Main kMain, int kChannels>
bool tile_pixels(PixelsParams<T>& params, int64_t& shared_bytes) {
  const Operands<T>& op = params.op;
  const int64_t size = sizeof(T);
  const int64_t row = span_bytes(op.width * op.source_pixel * size);
  const int64_t out_row = span_bytes(op.out_width * op.channels * (kPassthrough ? 2 : 1) * size);
  const int64_t out_at = ring_rows(stride_of(kMain)) * row;
  shared_bytes = out_at + out_row + pixel_parameters(op.channels);
  if (shared_bytes > pixel_shared(op.channels) || op.height > (1 << 28)) return false;
  params.jobs = pixel_jobs<kChannels>(op);
  const auto vectors = [&](const T* data, int64_t elements) {
    return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(elements * size)) % 16 == 0;
  };
  params.vectors = vectors(kPassthrough ? op.pass : op.source, op.width * op.source_pixel) &&
                   vectors(op.out, op.out_image / op.out_height);
  params.restarts = params.jobs.lanes * params.jobs.groups > kMostPixelThreads<kChannels>;
  params.rows = static_cast<int>(strip_rows(op.batch, op.out_height));
  params.strips = ceil_div(op.out_height, params.rows);
  params.tiles = op.batch * params.strips;
  params.row_bytes = static_cast<int>(row);
  params.out_at = static_cast<int>(out_at);
  params.parameters_at = static_cast<int>(out_at + out_row);
  return true;
}

// Whole images -------------------------------------------------------------------------------

template <class T>
struct ImagesParams {
  Operands<T> op;
  PixelJobs jobs;
  int images;                 // of a tile
  int rows, strips;           // of the results of an image, for a lane
  int64_t tiles;              // in all
  int out_at, parameters_at;  // in shared memory; the input is at 0
};

template <class T, bool kPassthrough, Main kMain, int kChannels>
__global__ void __launch_bounds__(kMostPixelThreads<kChannels>,
                                  kPixelCtas<kChannels, stride_of(kMain)>)
    images_kernel(ImagesParams<T> params) {
  constexpr int kStride = stride_of(kMain);
  using March = PixelMarch<T, kPassthrough, kStride, kChannels>;
  const Operands<T>& op = params.op;
  const int thread = static_cast<int>(threadIdx.x), team = static_cast<int>(blockDim.x);
  const int channels = static_cast<int>(op.channels);
  const int height = static_cast<int>(op.height), out_height = static_cast<int>(op.out_height);
  const int row_elements = static_cast<int>(op.width * op.source_pixel);
  const int out_elements = static_cast<int>(op.out_width) * channels * (kPassthrough ? 2 : 1);
  const Shared<unsigned char> memory = shared_memory();
  const PixelParameters parameters((memory + params.parameters_at).template as<float>(), channels);
  parameters.load_all(op);

  for (int64_t tile = blockIdx.x; tile < params.tiles; tile += gridDim.x) {
    const int64_t image0 = tile * params.images;
    const int images =
        static_cast<int>(op.batch - image0 < params.images ? op.batch - image0 : params.images);
    // Load.
    const Shared<T> x = load_span<kAnyTeam>(
        memory, Global<const T>{kPassthrough ? op.pass : op.source} + image0 * op.source_image,
        images * height * row_elements);
    cp_async_commit();
    cp_async_wait<0>();
    sync_threads();

    // Compute.
    const Global<T> out = Global<T>{op.out} + image0 * op.out_image;
    const int phase = misalignment(out, 16);
    const Shared<T> staged = (memory + (params.out_at + phase)).template as<T>();
    const bool paired = phase % (2 * static_cast<int>(sizeof(T))) == 0;
    const int jobs = params.jobs.lanes * params.jobs.groups * params.strips * images;
#pragma unroll 1
    for (int job = thread; job < jobs; job += team) {
      const int channel = params.jobs.channel(job, kChannels);
      if (channel >= channels) continue;
      const int piece = job / params.jobs.lanes, strip = piece / params.jobs.groups;
      const int image = strip / params.strips;
      const int row0 = strip % params.strips * params.rows;
      const int row1 = row0 + params.rows < out_height ? row0 + params.rows : out_height;
      const Shared<T> source = x + image * height * row_elements;
      Shared<T> result = staged + (image * out_height + row0 - March::kBefore) * out_elements;
      March march(parameters, op, channel, piece % params.jobs.groups * kPixelColumns, paired);
#pragma unroll 1
      for (int row = row0 - March::kBefore; row < row1; ++row) {
        march.step(
            row, height, row >= row0, [&](int y) { return source + y * row_elements; }, result);
        result = result + out_elements;
      }
    }
    sync_threads();

    // Store.
    store_span<kAnyTeam>(out, staged, images * out_height * out_elements);
    if (tile + gridDim.x < params.tiles) sync_threads();
  }
}

// Fills in the tiling; false if not even one image fits.
template <class T, bool kPassthrough, Main kMain, int kChannels>
bool tile_images(ImagesParams<T>& params, int64_t& shared_bytes) {
  constexpr int64_t kCtas = 2 * 132;
  const Operands<T>& op = params.op;
  const int64_t size = sizeof(T);
  const int64_t in = op.height * op.width * op.source_pixel * size, out = op.out_image * size;
  const int64_t parameters = pixel_parameters(op.channels);
  const int64_t spans = pixel_shared(op.channels) - parameters - 2 * span_bytes(0) - 32;
  const int64_t fit = spans / (in + out);
  if (fit < 1) return false;
  const int64_t images = std::max<int64_t>(1, std::min(fit, op.batch / kCtas));
  params.images = static_cast<int>(images);
  params.tiles = ceil_div(op.batch, images);
  params.out_at = static_cast<int>(span_bytes(images * in));
  params.parameters_at = params.out_at + static_cast<int>(span_bytes(images * out));
  shared_bytes = params.parameters_at + parameters;
  // Few lanes take short strips, of which each reads two rows more.
  params.jobs = pixel_jobs<kChannels>(op);
  const int64_t whole = int64_t{params.jobs.lanes} * params.jobs.groups * images;
  constexpr int64_t kLeastRows = 3;
  const int64_t strips =
      std::max<int64_t>(1, std::min(kThreads / whole, ceil_div(op.out_height, kLeastRows)));
  params.rows = static_cast<int>(ceil_div(op.out_height, strips));
  params.strips = static_cast<int>(ceil_div(op.out_height, params.rows));
  return true;
}

}  // namespace snv2::SNV2_GPU
