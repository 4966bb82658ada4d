// A plan: the steps of a unit, a stage or a network as one flat array of int64, made once by
// the packing code (snv2_kernels/packing/cpu.py) and read in place by the CPU backend.
//
//   [PlanHeader][Step x step_count][tables]
//
// Feature maps inside a plan are sets of *planes* (one channel of one image each), grouped in
// panels of 16. A step never copies a plane to reorder it: it names the planes it reads in a
// table, writes its own result to planes nobody reads any more, and the next step's table says
// where each logical channel now lives. That is how split, concat and shuffle cost nothing.
//
// Products read planes by the *word*, 32 bits of each pixel: a plane of float32, or planes 2i and
// 2i + 1 of bfloat16. A word of which a product reads one plane would carry the NaN of the other
// into its sums, so planes are placed such that both of a word are read by the same steps, and one
// without such a neighbour stands there twice, with half its weight.
#pragma once

#include <cstdint>

#include "snv2/types.h"

namespace snv2 {

inline constexpr int64_t kPanel = 16;  // channels in a panel, on every backend

constexpr int64_t panels_of(int64_t channels) { return ceil_div(channels, kPanel); }

// Planes in a word of a map.
constexpr int64_t planes_in_word(DType element) { return 4 / size_of(element); }

// Floats of a packed [outputs, depth] matrix: for each panel of outputs one row of biases, then
// `depth` rows of weights, each row 16 outputs. The weights of a product with a bfloat16 map are
// two of bfloat16 in the place of a float, and `depth` counts words.
constexpr int64_t packed_floats(int64_t outputs, int64_t depth) {
  return panels_of(outputs) * (depth + 1) * kPanel;
}

enum class StepKind : int64_t {
  kImport = 0,  // user's tensor -> planes 0..out_channels-1 of a new buffer
  kStem = 1,    // relu(conv3x3 s2) then maxpool3x3 s2, user's tensor -> new buffer
  kUnit = 2,    // one ShuffleNet V2 unit, buffer -> buffer
  kHead = 3,    // relu(1x1), mean over pixels, linear -> user's [N, out_channels]
  kExport = 4,  // planes in logical order -> user's tensor
};

// All *_table fields are offsets into the plan's tables, all *_weights into the float buffer. A
// word in a table is its first plane.
struct Step {
  StepKind kind;
  int64_t stride;         // of the depthwise convolutions (kUnit): 1 or 2
  int64_t new_buffer;     // 1: the result starts a new buffer, 0: it joins the current one
  int64_t buffer_panels;  // panels of the new buffer
  int64_t in_channels;    // words read by the first product (kImport, kStem: the user's channels;
                          // kExport: planes)
  int64_t in_table;       // [in_channels] each of them (kImport: [out_channels] user's channel)
  int64_t mid_channels;   // kUnit: width between the products; kHead: features
  int64_t out_channels;   // kUnit: width of the main branch's result
  int64_t out_panel;      // first panel of that result
  int64_t pw1_weights;    // packed [mid, in] (kHead: [features, in]; kStem: [out, words * 9],
                          // where a word of the user's channels has nine neighbouring columns)
  int64_t dw_weights;     // packed [mid, 9]
  int64_t pw2_weights;    // packed [out, mid] (kHead: [classes, features])
  // Projection branch of a stride-2 unit (dw, pw); proj_channels = 0 where there is none.
  int64_t proj_panels;       // input panels that hold a live plane
  int64_t proj_panel_table;  // [proj_panels] panel of each
  int64_t proj_depth;        // words read from the depthwise result
  int64_t proj_table;        // [proj_depth] each of them, counted in the order of the panels
  int64_t proj_channels;
  int64_t proj_out_panel;
  int64_t proj_dw_weights;  // packed [proj_panels * 16, 9]
  int64_t proj_pw_weights;  // packed [proj_channels, proj_depth]
};

struct PlanHeader {
  int64_t magic;
  int64_t step_count;
  int64_t in_channels;   // of the user's tensor
  int64_t out_channels;  // of the result
  int64_t halvings;      // how often height and width are halved (rounding up)
  int64_t classify;      // 1: the result is [N, out_channels]
  int64_t element;       // DType of the maps: float32 or bfloat16
};

inline constexpr int64_t kPlanMagic = 0x736e7632'0002;  // "snv2", format 2
inline constexpr int64_t kStepWords = 20;
inline constexpr int64_t kHeaderWords = 7;
static_assert(sizeof(Step) == kStepWords * sizeof(int64_t));
static_assert(sizeof(PlanHeader) == kHeaderWords * sizeof(int64_t));

// A checked view of a plan's words; the words must outlive it.
class SNV2_API Plan {
 public:
  // Throws std::invalid_argument if any step reads or writes outside the tables, the
  // `weight_count` floats or its buffers.
  Plan(const int64_t* words, int64_t word_count, int64_t weight_count);

  const PlanHeader& header() const { return *header_; }
  DType element() const { return static_cast<DType>(header_->element); }
  const Step* begin() const { return steps_; }
  const Step* end() const { return steps_ + header_->step_count; }
  const int64_t* table(int64_t offset) const { return tables_ + offset; }

 private:
  const PlanHeader* header_;
  const Step* steps_;
  const int64_t* tables_;
};

}  // namespace snv2
