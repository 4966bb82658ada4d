// Parameters of the kernel that takes the units of some stages in one launch, and where things lie
// in shared memory. stages.h tells how it works.
#pragma once

#include <cstdint>

#include "cuda/mma.h"

namespace snv2::SNV2_GPU {

constexpr int kStagesThreads = 512, kStagesWarps = kStagesThreads / kWarp;
constexpr int kMostStagedUnits = 20, kMostStages = 4;
constexpr int kMostMatrices = 2 * kMostStagedUnits + kMostStages;

// Tiles of a matrix that a warp gets at once, and how many times as many it has room for.
constexpr int kQuadTiles = 4, kRingQuads = 2;
constexpr int kRingTiles = kQuadTiles * kRingQuads;

// Barriers of a CTA: two of rows that neighbours store, one of parameters. A word is stored where
// there is no row.
constexpr int kStageBarriers = 3, kTokenBytes = 4;

// A map of an image in the shared memory of a cluster: of each plane a CTA has `rows` rows, at
// least one, those of the CTAs follow each other, and the last one's may be fewer. Plane number
// `planes` is all zeros.
struct StagedMap {
  int at;             // bytes
  int pitch;          // elements from plane to plane
  int top;            // elements before the CTA's own rows: the row above them, or none
  int row;            // elements of a row
  int rows;           // of a CTA
  int height, width;  // of the image
  int planes;

  constexpr int first(int rank) const { return rank * rows; }
  // Returns how many of a CTA's rows the image has.
  constexpr int own(int rank) const {
    const int left = height - first(rank);
    return left < rows ? left : rows;
  }
  constexpr int columns() const { return rows * row; }
};

// A packed matrix, and how the warps share its product: job number j is row of tiles j % tiles with
// `wide` blocks of columns from j / tiles * wide on, and is warp (j + first) % kStagesWarps's. What
// is one for each warp is of its first job.
struct StagedMatrix {
  int weights;  // element of the plan's
  int tiles;    // rows of tiles
  int deep;     // tiles of each
  int wide;     // 1, 2 or 4
  int jobs;
  int first;
  float by_tiles;           // 1 / tiles
  int begin[kStagesWarps];  // `weights`
  int16_t tile[kStagesWarps], block[kStagesWarps];
  unsigned char after[kStagesWarps];  // the next matrix of which a warp has a job, or the last one

  SNV2_DEVICE int column_of(int job) const {
    return static_cast<int>((static_cast<float>(job) + 0.5f) * by_tiles);
  }
  SNV2_DEVICE int first_job(int warp) const { return (warp - first) & (kStagesWarps - 1); }
};

// A unit's parameters: offsets into the plan's arrays, bytes of shared memory, and how many, the
// floats rounded up to whole vectors.
struct StagedArray {
  int from, at, count;
};

// A depthwise convolution, of which a lane takes a block of 8 pixels of a channel down the rows: an
// item is 8 channels, a task is four items, one for each quarter of a warp. Two to the power of
// `shift` warps share a task by rows. Job number j is warp (j + first_warp) % kStagesWarps's.
struct StagedConvolution {
  StagedArray weights;
  int out_at;  // bytes
  int channels, groups, items, tasks, shift, first_warp;
  float by_groups;  // 1 / groups
};

struct StagedUnit {
  int stride;
  int in, out;  // maps; at stride 1 the same
  int in_channels, mid, main, proj;
  int mid_at, mid_pitch, dw_pitch;  // bytes, elements
  int pw1, pw2;                     // matrices; that of the projection follows pw2
  bool apart;                       // no warp has jobs of both
  int idle;                    // the first warp without depthwise tasks, which others may follow
  int from_above, from_below;  // bytes that neighbours store
  int floats;                  // of all parameters
  StagedConvolution dw, proj_dw;
  StagedArray pw1_bias, pw2_bias, proj_bias;
  StagedArray in_table, proj_table, out_table;
};

template <class T>
struct StagesParams {
  const T* weights;
  const float* parameters;
  const int32_t* tables;
  const T* in;
  int64_t in_pitch, in_image;
  T* out;
  int64_t out_pitch, out_image;
  int cluster;  // CTAs
  int units;
  int result_table, results;    // planes of the last map that are written
  int result_at, result_share;  // bytes; planes that a CTA writes
  StagedMap maps[kMostStages];
  StagedUnit unit[kMostStagedUnits];
  StagedMatrix matrix[kMostMatrices + 1];  // in the order of their use, and one without jobs
  unsigned char start[kStagesWarps];       // a warp's first matrix
  int barriers_at;                         // of the warps' rings, and the CTA's
  int tokens_at;                           // two words that nobody reads, one for each barrier
};

}  // namespace snv2::SNV2_GPU
