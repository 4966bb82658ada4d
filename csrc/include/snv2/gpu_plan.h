// A plan for GPUs: the steps of a unit, a stage or a network as one flat array of int64 in host
// memory, made once by the packing code (snv2_kernels/packing/gpu.py).
//
//   [GpuPlanHeader][GpuStep x step_count][tables]
//
// Between steps a feature map lies in a *plane buffer*. Plane p of all images is one run of
// batch x height rows of pixels, images one after the other, each row padded to a multiple of 8
// pixels (row_pitch): all vectors are whole and aligned, and none spans two rows. Padding is
// written and read as pixels are, and never counts. Planes are planes_pitch elements apart. A step
// names the planes it reads in a table and the planes it writes in another: split, concat and
// shuffle are those tables. There are two buffers; a step of stride 1 stays in the one it reads
// (its results go to planes that nobody reads any more), one of stride 2 writes to the other.
// Planes that are free again are given out again, so that a stage of C channels occupies C + C / 2
// planes.
//
// A buffer's planes have one extent. The first step that writes a smaller map there takes all of
// it; while the pieces of a unit of stride 2 run, both buffers hold planes that are read.
//
// Beside the words a plan has three arrays in device memory:
//   weights     elements of the map's dtype: matrices in the order of tensor-core fragments
//   parameters  float32: biases, and depthwise convolutions
//   tables      int32: a copy of the tables at the end of the words
//
// A matrix [rows, depth] in `weights` consists of tiles of 16 rows x 16 (float32: 4) columns, zero
// beyond its edges, row of tiles by row of tiles. Lane l of a warp, g = l / 4 and t = l % 4, owns
//   16-bit: the 8 elements at [lane][8]: (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1), then the same
//           with column + 8: the A fragment of mma.m16n8k16;
//   float32: the 8 elements at [g][8]: (g, k), (g+8, k) for k = 0..3; lanes of one g share them.
//
// In `parameters` the bias of a matrix is padded with zeros to whole tiles of 16 rows, and so are
// the slopes of an activation, one for each channel; a depthwise convolution is
// [channels][depthwise_floats(window)]: taps in row order, then the shift; batch norm is folded.
// Each starts at a multiple of 4 floats.
#pragma once

#include <cstdint>
#include <vector>

#include "snv2/types.h"

namespace snv2 {

enum class GpuStepKind : int64_t {
  kCopy = 0,    // caller's map -> planes
  kStem = 1,    // conv3x3 s2, activation, maxpool3x3 s2: caller's image -> planes
  kUnit = 2,    // one ShuffleNet V2 unit, or a piece of one
  kHead = 3,    // 1x1, activation, mean over pixels, linear: planes -> caller's [N, out_channels]
  kGate = 4,    // x = activation(x * expand(reduce(means of x over pixels)) + s), planes, in place
  kExport = 5,  // planes -> caller's map
  kPool = 6,    // activation(average of the 3x3 pixels around each): planes -> planes
};

// A kUnit may lack parts of its main branch. Without kExpand it convolves the planes that it reads;
// without kProject the convolution is the result.
inline constexpr int64_t kWholeBranch = kExpand | kDepthwise | kProject;

inline constexpr int64_t kCallersMap = -1;  // as a buffer: the tensor that the network is given
inline constexpr int64_t kNoBuffer = -2;    // nothing is kept in planes
inline constexpr int64_t kNoResult = -1;    // as a result: none of the caller's

// A depthwise convolution's window of window x window, odd, and its dilation; it is padded with
// reach() zeros, so that the extent is that of a 3x3 window. A step that lacks it has window 1.
struct GpuWindow {
  int64_t window = 1;
  int64_t dilation = 1;

  constexpr int64_t reach() const { return window / 2 * dilation; }
};

// Of a layer's result. kLeakyRelu is written as kPrelu; kSigmoid and kHardsigmoid are of the layers
// of a kGate only. A step that lacks the layer has kIdentity.
struct GpuActivation {
  Activation kind = Activation::kIdentity;
  int64_t slopes = 0;  // kPrelu: [rows] in `parameters`, else 0
};

// All *_table fields are offsets into the tables, *_weights into `weights`, the rest of the last
// group into `parameters`. What a step has no use for is 0, its stride 1.
struct GpuStep {
  GpuStepKind kind;
  int64_t parts;        // kUnit: kExpand | kDepthwise | kProject; kPool: kPool, or with
                        // kPoolInside; else 0
  int64_t stride;       // of the depthwise convolutions (kUnit) or the average (kPool): 1 or 2
  int64_t in_buffer;    // 0, 1 or kCallersMap
  int64_t out_buffer;   // 0, 1 or kNoBuffer
  int64_t out_planes;   // planes that out_buffer has room for while this step's map is in it
  int64_t result;       // which of the caller's results this step writes, or kNoResult
  int64_t in_channels;  // planes gathered; kStem: channels of the image
  int64_t in_table;     // [in_channels] plane, or channel of the caller's map; kGate: x, s if any
  // kUnit: channels that the main branch convolves; kHead: features; kGate: between its layers, 0
  // if it has none and scales nothing.
  int64_t mid_channels;
  int64_t proj_channels;  // kUnit with a projection of what it reads: its width, else 0
  int64_t out_channels;   // kUnit: width of the main branch's result; kHead: classes; kGate: of x
  int64_t out_table;      // [proj_channels + out_channels] plane of each, the projection's first
  // The result in logical order. Entry e >= 0: row e of [projection's, main] result; e < 0: copied
  // from plane (or channel of the caller's map) -1 - e of in_buffer (stride 1). Of a kUnit with all
  // parts; the result of a kExport is what it reads, as in_table has it, that of a kHead scores.
  int64_t result_channels;
  int64_t result_table;

  // kUnit [mid, in]; kStem: [out, in * 9]; kHead: [features, in]; kGate: reduce [mid, out]
  int64_t pw1_weights;
  int64_t pw2_weights;   // kUnit [out, mid]; kHead: [classes, features]; kGate: expand [out, mid]
  int64_t proj_weights;  // [proj, in]
  int64_t pw1_bias;
  int64_t pw2_bias;
  int64_t proj_bias;
  int64_t dw;       // [mid]
  int64_t proj_dw;  // [in]

  GpuWindow dw_window;  // kUnit
  GpuWindow proj_dw_window;
  // After each layer: kUnit in the order of its layers; kStem and kHead have pw1's, kGate both
  // pw's, and dw's after all.
  GpuActivation pw1_activation;      // [mid]; kStem: [out]
  GpuActivation dw_activation;       // [mid]; kGate, kPool: [out]
  GpuActivation pw2_activation;      // [out]
  GpuActivation proj_dw_activation;  // [in]
  GpuActivation proj_activation;     // [proj]
};

struct GpuPlanHeader {
  int64_t magic;
  int64_t step_count;
  int64_t in_channels;   // of the caller's map
  int64_t out_channels;  // of the last result
  int64_t halvings;      // how often height and width are halved until then (rounding up)
  int64_t classify;      // 1: the last result is [N, out_channels]
  int64_t result_count;  // the last one included
  int64_t weight_count;
  int64_t parameter_count;
  int64_t dtype;  // of weights
};

inline constexpr int64_t kGpuPlanMagic = 0x736e7632'1005;  // "snv2", GPU, format 5
inline constexpr int64_t kGpuStepWords = 37;
inline constexpr int64_t kGpuHeaderWords = 10;
static_assert(sizeof(GpuStep) == kGpuStepWords * sizeof(int64_t));
static_assert(sizeof(GpuPlanHeader) == kGpuHeaderWords * sizeof(int64_t));

// Extents of a packed matrix.
inline constexpr int64_t kTileRows = 16;
constexpr int64_t tile_depth(DType dtype) { return dtype == DType::kFloat32 ? 4 : 16; }
constexpr int64_t padded_rows(int64_t rows) { return ceil_div(rows, kTileRows) * kTileRows; }
constexpr int64_t padded_depth(int64_t depth, DType dtype) {
  return ceil_div(depth, tile_depth(dtype)) * tile_depth(dtype);
}
constexpr int64_t packed_elements(int64_t rows, int64_t depth, DType dtype) {
  return padded_rows(rows) * padded_depth(depth, dtype);
}
// Of a channel.
constexpr int64_t depthwise_floats(int64_t window) { return window > 1 ? window * window + 1 : 0; }
inline constexpr int64_t kDepthwiseFloats = depthwise_floats(3);

// Elements from one row of a plane to the next, and from one plane to the next: planes start on
// 128 bytes.
inline constexpr int64_t kRowUnit = 8;
constexpr int64_t row_pitch(int64_t width) { return ceil_div(width, kRowUnit) * kRowUnit; }
constexpr int64_t planes_pitch(int64_t batch, int64_t height, int64_t width, DType dtype) {
  const int64_t line = 128 / size_of(dtype);
  return ceil_div(batch * height * row_pitch(width), line) * line;
}

// A checked view of a plan's words; the words must outlive it.
class SNV2_API GpuPlan {
 public:
  // Throws std::invalid_argument if any step reads outside the tables, weights and parameters,
  // reads planes that nobody wrote, writes outside its buffer or to planes that it reads (but for a
  // kGate's x), has a word that it has no use for, or if not each result is written once. The
  // device's copy of the tables is taken on trust.
  GpuPlan(const int64_t* words, int64_t word_count);

  const GpuPlanHeader& header() const { return *header_; }
  const GpuStep* begin() const { return steps_; }
  const GpuStep* end() const { return steps_ + header_->step_count; }
  const int64_t* table(int64_t offset) const { return tables_ + offset; }
  int64_t table_count() const { return table_count_; }
  DType dtype() const { return static_cast<DType>(header_->dtype); }

 private:
  const GpuPlanHeader* header_;
  const GpuStep* steps_;
  const int64_t* tables_;
  int64_t table_count_;
};

// Results in the caller's order.
SNV2_API std::vector<PlanResult> results_of(const GpuPlan& plan);

}  // namespace snv2
