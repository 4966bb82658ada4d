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
// Products read planes by the *word*, 32 bits of each pixel: a plane of float32, planes 2i and
// 2i + 1 of bfloat16, or four of uint8. A word of which a product reads one plane of bfloat16 would
// carry the NaN of the other into its sums, so planes are placed such that both of a word are read
// by the same steps, and one without such a neighbour stands there twice, with half its weight.
// Bytes have no NaN: what a product does not read has a weight of zero.
//
// In a plan of integers (element uint8) each layer computes, with exact sums,
//
//   y[o] = clamp(round(multiplier[o] * sum_k weight[o][k] x[k] + offset[o]), 0, 255)
//
// where round takes halves to even; the mean of the head's features is rounded behind the mean, and
// scores are not. Scales and zero points of maps are in the multipliers and offsets, so a plan
// names none but at its ends: those of a kImport, a kStem and a kExport convert between floats and
// bytes. No weight is below -127.
#pragma once

#include <cstdint>
#include <vector>

#include "snv2/types.h"

namespace snv2 {

inline constexpr int64_t kPanel = 16;  // channels in a panel, on every backend

constexpr int64_t panels_of(int64_t channels) { return ceil_div(channels, kPanel); }

// Planes in a word of a map.
constexpr int64_t planes_in_word(DType element) { return 4 / size_of(element); }

// Rows of a panel of a packed matrix before its weights: one of biases; of integers multipliers,
// offsets and, as int32, the sums of the weights of each output.
constexpr int64_t rows_before_weights(DType element) { return element == DType::kUint8 ? 3 : 1; }

// Floats of a packed [outputs, depth] matrix: for each panel of outputs the rows before its
// weights, then `depth` rows of weights, each row 16 outputs. The weights of a product with a
// bfloat16 map are two of bfloat16 in the place of a float, those of one with a map of uint8 four
// of int8, and `depth` counts words.
constexpr int64_t packed_floats(int64_t outputs, int64_t depth, DType element = DType::kFloat32) {
  return panels_of(outputs) * (depth + rows_before_weights(element)) * kPanel;
}

// Words of a row of a depthwise window's taps, of one output, in a plan of integers: four taps
// each.
constexpr int64_t tap_words(int64_t window) { return ceil_div(window, 4); }

enum class StepKind : int64_t {
  kImport = 0,  // user's tensor -> planes 0..out_channels-1 of a new buffer
  kStem = 1,    // conv3x3 s2, then maxpool3x3 s2, user's tensor -> new buffer
  kUnit = 2,    // pw, dw and pw, or some of them, of a branch and of a projection beside it
  kGate = 3,    // squeeze-and-excite and a shortcut: planes = act(planes * pw2(pw1(mean over their
                // pixels)) + other planes)
  kHead = 4,    // 1x1, mean over pixels, linear -> user's [N, out_channels]
  kExport = 5,  // planes in logical order -> user's tensor; also between units
};

// One of the products that a pointwise layer of several groups consists of. Its outputs begin at a
// panel, and its matrix follows that of the block before.
struct Block {
  int64_t outputs;
  int64_t first;  // of the words that the layer reads
  int64_t depth;  // words
};
inline constexpr int64_t kBlockWords = 3;
static_assert(sizeof(Block) == kBlockWords * sizeof(int64_t));

// All *_table fields are offsets into the plan's tables, weights and slopes into the float buffer.
// A word in a table is its first plane. What a branch or a layer has no use for is 0.
struct Layer {
  int64_t weights;      // packed
  int64_t activation;   // Activation of its result
  int64_t slopes;       // [panels of outputs * 16], for kLeakyRelu and kPrelu
  int64_t blocks;       // table of Blocks, of kExpand and kProject
  int64_t block_count;  // 0: one product, of all words that the layer reads
};

// y = pw2(dw(pw1(x))) in a kUnit, where each of the three may be missing. A projection may be
// y = act(average(x)) instead.
struct Branch {
  int64_t parts;         // which of them there are: kExpand | kDepthwise | kProject, or kPool or
                         // kPool | kPoolInside alone; 0: no branch; kHead: kPool if its features
                         // are the planes themselves, else 0
  int64_t in_channels;   // words read by the first product; kDepthwise first, kPool: panels;
                         // kGate, kHead with kPool: planes; kImport, kStem: the user's
                         // channels; kExport: planes
  int64_t in_table;      // [in_channels] each of them (kImport: [out_channels] user's channel;
                         // kGate: counted from out_panel)
  int64_t mid_channels;  // kUnit: width of the depthwise result or of the average; kGate:
                         // between the products, 0: there are none, and nothing is scaled; kHead:
                         // features
  int64_t window;        // kDepthwise: odd
  int64_t dilation;
  int64_t depth;         // kDepthwise | kProject: words that the last product reads; kGate: planes
                         // that are added: none, or one for each of the result
  int64_t table;         // [depth] each of them, of the depthwise result; kGate: of the buffer
  int64_t out_channels;  // width of the result
  int64_t out_panel;     // first panel of the result
  int64_t added;         // [added_panels] panel of the map that is added to each of pw2's, before
                         // its activation: kProject, stride 1
  int64_t added_panels;  // none, or one for each of the result
  Layer pw1;  // packed [mid, in]: kExpand, kGate (of floats), kHead; kStem: [out, words * 9], where
              // a word of the user's channels has nine neighbouring columns
  Layer dw;   // packed [mid, window * window]: kDepthwise, in a plan of integers [mid, window *
              // tap_words(window)]; kGate, kPool: what its result goes through, no weights; in a
              // plan of integers also kImport, kStem: [2][in_channels] factors and summands that
              // make bytes of the user's channels, and for kStem another row, the byte that pads
              // each; kExport: factors and summands that make floats of planes
  Layer pw2;  // packed [out, depth]: kProject; [out, mid]: kGate (of floats), kHead
};

struct Step {
  StepKind kind;
  int64_t stride;         // of the depthwise convolutions (kUnit): 1 or 2
  int64_t new_buffer;     // 1: the result starts a new buffer, 0: it joins the current one
  int64_t buffer_panels;  // panels of the new buffer
  Branch main;
  Branch projection;  // kUnit: reads what the main branch does
};

// Of a depthwise convolution. A wider one is no better run in this way.
inline constexpr int64_t kMaxWindow = 31;
inline constexpr int64_t kMaxDilation = 64;

struct PlanHeader {
  int64_t magic;
  int64_t step_count;
  int64_t in_channels;   // of the user's tensor
  int64_t out_channels;  // of the last result
  int64_t halvings;      // how often height and width are halved (rounding up)
  int64_t classify;      // 1: the last result is [N, out_channels]
  int64_t element;       // DType of the maps: float32, bfloat16 or uint8
};

inline constexpr int64_t kPlanMagic = 0x736e7632'0005;  // "snv2", format 5
inline constexpr int64_t kStepWords = 58;
inline constexpr int64_t kBranchWords = 27;
inline constexpr int64_t kHeaderWords = 7;
static_assert(sizeof(Branch) == kBranchWords * sizeof(int64_t));
static_assert(sizeof(Step) == kStepWords * sizeof(int64_t));
static_assert(sizeof(PlanHeader) == kHeaderWords * sizeof(int64_t));

// A checked view of a plan's words; the words must outlive it.
class SNV2_API Plan {
 public:
  // Throws std::invalid_argument if any step reads or writes outside the tables, the `weight_count`
  // floats or its buffers, or has a word that it has no use for.
  Plan(const int64_t* words, int64_t word_count, int64_t weight_count);

  const PlanHeader& header() const { return *header_; }
  DType element() const { return static_cast<DType>(header_->element); }
  const Step* begin() const { return steps_; }
  const Step* end() const { return steps_ + header_->step_count; }
  const int64_t* table(int64_t offset) const { return tables_ + offset; }
  // Tensors that are written: one by each kExport, and by the kHead.
  int64_t result_count() const { return result_count_; }

 private:
  const PlanHeader* header_;
  const Step* steps_;
  const int64_t* tables_;
  int64_t result_count_ = 0;
};

// Results in the order of the steps that write them.
SNV2_API std::vector<PlanResult> results_of(const Plan& plan);

}  // namespace snv2
