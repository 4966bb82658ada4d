// What a unit's kernel is told, and where things lie in shared memory. unit.h tells how it works.
#pragma once

#include <cstdint>

#include "cuda/activation.h"
#include "cuda/mma.h"
#include "cuda/span.h"

namespace snv2::SNV2_GPU {

// Threads of a CTA beside another one on its SM, and of one that has an SM to itself: as many
// registers in both cases.
constexpr int kUnitThreads = 256, kMostUnitThreads = 512;

SNV2_DEVICE int unit_threads() { return static_cast<int>(blockDim.x); }
SNV2_DEVICE int unit_warps() { return static_cast<int>(blockDim.x / unsigned{kWarp}); }

// How warps share a product, and where the matrix is.
struct Resident {
  static constexpr bool kResident = true, kCluster = false;
  static constexpr int kTiles = 2, kBlocks = 4, kAhead = 1;
};
// Of float32 where two rows of tiles do not fit in the registers: in a piece's first product, and
// in units with any activations.
struct ResidentNarrow {
  static constexpr bool kResident = true, kCluster = false;
  static constexpr int kTiles = 1, kBlocks = 4, kAhead = 1;
};
struct Clustered {
  static constexpr bool kResident = true, kCluster = true;
  static constexpr int kTiles = 1, kBlocks = 4, kAhead = 1;
};
// Registers bound the blocks, and stride 2 has both branches in one kernel.
template <class T, int kStride>
struct Direct {
  static constexpr bool kResident = false, kCluster = false;
  static constexpr int kTiles = 1;
  static constexpr int kBlocks = sizeof(T) == 4 ? (kStride == 2 ? 6 : 8) : kStride == 2 ? 8 : 14;
  static constexpr int kAhead = sizeof(T) == 4 ? 1 : kStride;
};

// Blocks of columns that a warp's job has at most: fewer where warps would go without a job.
template <class Mode>
constexpr int blocks_of_job(int row_blocks, int blocks, int warps) {
  const int jobs = row_blocks * ((blocks + Mode::kBlocks - 1) / Mode::kBlocks);
  return Mode::kResident && jobs * 2 <= warps ? Mode::kBlocks / 2 : Mode::kBlocks;
}

// Channels that eight lanes take where each has a vector of a row: their vectors lie in different
// banks (shared_pitch).
template <class T>
constexpr int kGroupChannels = 16 / static_cast<int>(sizeof(T));

// Where a branch's parts lie, in bytes from the start of shared memory; X is at 0. In a cluster as
// the largest share of a CTA needs. MID and result have as many rows as rows of tiles have, so that
// no store asks whether its row is there.
struct Places {
  int mid, dw, result;
  int pw1_bias, dw_weights, in_table, out_table, sources, pw2_bias;
  int pw1, pw2;
  int x_pitch, mid_pitch, dw_pitch;  // elements
};

// One of the two branches; in a cluster, what a CTA has of it. Those of a piece are alike.
template <class T>
struct Branch {
  const T* pw1;  // packed [mid, in]; a projection and a piece have none, and mid is in
  const T* pw2;  // packed [out, depth]; null in a piece without, and out is mid
  const float* pw1_bias;
  const float* pw2_bias;
  const float* dw;           // [mid][depthwise_floats(window)]; a window of 1 has none
  const int32_t* out_table;  // [out] planes
  int mid;
  int out;
  int depth;         // rows of DW: mid of all CTAs
  int first_depth;   // row of DW that is row 0 of MID
  int first_result;  // row of the unit's whole result that is row 0 of this branch's
  Places at;
  int groups;  // of kGroupChannels channels that are convolved, of the CTA that has most
  Divisor by_groups;
  After pw1_after, dw_after, pw2_after;  // these three for kernels of any activation
  int window, dilation;

  template <class Act>
  SNV2_DEVICE int dw_floats() const {
    return static_cast<int>(Act::kAny ? depthwise_floats(window) : kDepthwiseFloats);
  }
};

// Arithmetic of rows ----------------------------------------------------------------------------

// Rows of an image, before and after. Those of all images together are below 2^31.
struct Heights {
  int in, out;
  Divisor by_in, by_out;

  Heights() = default;
  constexpr Heights(int64_t height, int64_t out_height)
      : in(static_cast<int>(height)),
        out(static_cast<int>(out_height)),
        by_in(height),
        by_out(out_height) {}

  // Input rows of all images that are in once output rows below `row` can be computed, and the
  // number of output rows that can be once `in_rows` are in.
  template <int kStride>
  constexpr int needed(int row, int reach) const {
    if (row == 0) return 0;
    const int image = by_out.divide(row - 1);
    const int last = (row - 1 - image * out) * kStride + 1 + reach;
    return image * in + (last < in ? last : in);
  }
  template <int kStride>
  constexpr int complete(int in_rows, int reach) const {
    const int image = by_in.divide(in_rows);
    const int rest = in_rows - image * in - reach;
    return image * out + (rest > 0 ? (rest + kStride - 1) / kStride : 0);
  }
  // The first input row that an output row reads.
  template <int kStride>
  constexpr int first(int row, int reach) const {
    const int image = by_out.divide(row);
    const int first = (row - image * out) * kStride - reach;
    return image * in + (first > 0 ? first : 0);
  }
};

template <class T>
struct UnitParams {
  const T* in;  // planes, or the caller's tensor
  int64_t in_channel, in_image, in_row, in_pixel;
  bool in_planes;
  T* out;  // planes, or null
  int64_t out_pitch;
  T* result;  // the caller's, or null
  int64_t result_channel, result_image, result_row, result_pixel;
  int in_vector, result_vector;  // neighbouring pixels that are moved at once: 1, 2 or 4
  bool in_pairs, result_pairs;   // an even channel and the next one of a pixel are an aligned word
  const int32_t* in_table;       // [in]
  const int32_t* result_table;   // [result_channels], see GpuStep
  int in_channels;
  int result_channels;
  Branch<T> branches[2];  // main, projection
  int batch, width, out_width;
  Heights heights;
  int row, out_row;  // elements of a row, with its padding
  int rows_per_cta;  // output rows
  int columns;       // of a step, which is some whole rows or a part of one
  int stretch;       // elements of those rows, and how many rows
  int stretch_rows;
  int ring;                   // columns of MID, at the projection of X: whole rows
  int step_rows;              // output rows convolved at a time
  bool prefetch;              // X and DW are apart: the next X is loaded while DW is in use
  int cluster, cluster_log2;  // CTAs
  Divisor by_quads;           // of blocks of a row of X
  Divisor by_row, by_stretch, by_out_row;
  int reach;  // of the windows, for kernels of any activation

  // Rows above and below that an output row needs.
  template <class Act>
  SNV2_DEVICE int reach_of() const {
    return Act::kAny ? reach : 1;
  }
};

// What a CTA knows all along ------------------------------------------------------------------

template <class T>
struct Memory {
  Shared<T> x, mid, dw, result;
  Shared<T> pw1, pw2;
  Shared<float> pw1_bias, pw2_bias, dw_weights;
  Shared<int32_t> in_table, out_table, sources;
  int x_pitch, mid_pitch, dw_pitch;
};

template <class T>
SNV2_DEVICE Memory<T> memory_of(const Places& at) {
  const Shared<unsigned char> base = shared_memory();
  Memory<T> m;
  m.x = base.template as<T>();
  m.mid = (base + at.mid).template as<T>();
  m.dw = (base + at.dw).template as<T>();
  m.result = (base + at.result).template as<T>();
  m.pw1 = (base + at.pw1).template as<T>();
  m.pw2 = (base + at.pw2).template as<T>();
  m.pw1_bias = (base + at.pw1_bias).template as<float>();
  m.dw_weights = (base + at.dw_weights).template as<float>();
  m.pw2_bias = (base + at.pw2_bias).template as<float>();
  m.in_table = (base + at.in_table).template as<int32_t>();
  m.out_table = (base + at.out_table).template as<int32_t>();
  m.sources = (base + at.sources).template as<int32_t>();
  m.x_pitch = at.x_pitch;
  m.mid_pitch = at.mid_pitch;
  m.dw_pitch = at.dw_pitch;
  return m;
}

// What CTA `rank` of a cluster has of a branch: every matrix is cut between rows of tiles.
template <class T, class Act>
SNV2_DEVICE Branch<T> share_of(const Branch<T>& whole, int depth_in, int rank, int ranks_log2) {
  Branch<T> share = whole;
  const auto cut = [&](int rows, int& begin) {
    const int tiles = units_of<16>(rows);
    begin = (tiles * rank >> ranks_log2) * 16;
    const int end = (tiles * (rank + 1) >> ranks_log2) * 16;
    return (end < rows ? end : rows) - begin;
  };
  int begin = 0;
  share.mid = cut(whole.mid, begin);
  if (whole.pw1 != nullptr) {
    share.pw1 += begin * padded_depth(depth_in, dtype_of<T>());
    share.pw1_bias += begin;
    share.pw1_after.slopes += begin;
  }
  share.dw += begin * whole.template dw_floats<Act>();
  share.dw_after.slopes += begin;
  share.first_depth = begin;
  share.out = cut(whole.out, begin);
  if (!Act::kAny || whole.pw2 != nullptr) {
    share.pw2 += begin * padded_depth(whole.depth, dtype_of<T>());
    share.pw2_bias += begin;
    share.pw2_after.slopes += begin;
  }
  share.out_table += begin;
  share.first_result += begin;
  return share;
}

}  // namespace snv2::SNV2_GPU
