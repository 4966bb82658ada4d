#include "snv2/plan.h"

#include <stdexcept>

#include "plan_checks.h"

namespace snv2 {
namespace {

class Checker : public PlanChecker {
 public:
  Checker(const int64_t* tables, int64_t table_words, int64_t weight_count, DType element)
      : PlanChecker(tables, table_words),
        weight_count_(weight_count),
        element_(element),
        word_planes_(planes_in_word(element)) {}

  bool integers() const { return element_ == DType::kUint8; }

  // A table of words of `limit` planes.
  void words(int64_t offset, int64_t length, int64_t limit, const char* what) const {
    table(offset, length, limit, what);
    const int64_t* const entries = table(offset, length, what);
    for (int64_t i = 0; i < length; ++i) require(entries[i] % word_planes_ == 0, what);
  }

  // Words of consecutive channels.
  int64_t words_of(int64_t channels) const { return ceil_div(channels, word_planes_); }

  void layer(const Layer& layer, int64_t outputs, int64_t depth, const char* what) const {
    range(layer.weights, packed_floats(outputs, depth, element_), weight_count_, what);
    activation(layer, outputs, what);
  }

  void depthwise(const Layer& layer, int64_t outputs, int64_t window, const char* what) const {
    this->layer(layer, outputs, window * (integers() ? tap_words(window) : window), what);
  }

  // Rows between floats and bytes, one entry for each of the channels.
  void conversion(const Layer& layer, int64_t rows, int64_t channels, const char* what) const {
    require(layer.activation == 0 && layer.slopes == 0, what);
    range(layer.weights, integers() ? rows * channels : 0, weight_count_, what);
  }

  // The same of a layer that may have several groups.
  void grouped(const Layer& layer, int64_t outputs, int64_t depth, const char* what) const {
    if (layer.block_count == 0) {
      require(layer.blocks == 0, what);
      return this->layer(layer, outputs, depth, what);
    }
    require(layer.block_count > 0 && layer.block_count <= panels_of(outputs) && !integers(), what);
    const auto* const blocks =
        reinterpret_cast<const Block*>(table(layer.blocks, layer.block_count * kBlockWords, what));
    int64_t panels = 0, floats = 0;
    for (int64_t i = 0; i < layer.block_count; ++i) {
      count(blocks[i].outputs, what);
      count(blocks[i].depth, what);
      range(blocks[i].first, blocks[i].depth, depth, what);
      panels += panels_of(blocks[i].outputs);
      floats += packed_floats(blocks[i].outputs, blocks[i].depth);
      require(panels <= panels_of(outputs), what);
    }
    require(panels == panels_of(outputs), what);
    range(layer.weights, floats, weight_count_, what);
    activation(layer, outputs, what);
  }

  void activation(const Layer& layer, int64_t outputs, const char* what) const {
    const auto activation = static_cast<Activation>(layer.activation);
    require(layer.activation >= 0 && activation <= Activation::kHardsigmoid, what);
    require(!integers() || activation <= Activation::kRelu6, what);
    if (activation == Activation::kLeakyRelu || activation == Activation::kPrelu) {
      range(layer.slopes, panels_of(outputs) * kPanel, weight_count_, what);
    } else {
      require(layer.slopes == 0, what);
    }
  }

  void used_or_zero(bool used, const Layer& layer, const char* what) const {
    require(used || (layer.weights == 0 && layer.activation == 0 && layer.slopes == 0), what);
    require(used || (layer.blocks == 0 && layer.block_count == 0), what);
  }
  void ungrouped(bool ungrouped, const Layer& layer, const char* what) const {
    require(!ungrouped || (layer.blocks == 0 && layer.block_count == 0), what);
  }
  using PlanChecker::used_or_zero;

  void panels(int64_t first, int64_t channels, int64_t limit, const char* what) const {
    require(first >= 0 && first <= limit - panels_of(channels), what);
  }

 private:
  int64_t weight_count_;
  DType element_;
  int64_t word_planes_;
};

void check_pool(const Branch& branch, int64_t in_panels, int64_t out_panels, Checker& check) {
  check.require(!check.integers(), "parts");
  check.require(branch.parts == kPool || branch.parts == (kPool | kPoolInside), "parts");
  check.count(branch.in_channels, "in_channels");
  check.table(branch.in_table, branch.in_channels, in_panels, "in_table");
  check.require(branch.mid_channels == branch.in_channels * kPanel, "mid_channels");
  check.require(branch.out_channels == branch.mid_channels, "out_channels");
  check.activation(branch.dw, branch.out_channels, "dw");
  check.panels(branch.out_panel, branch.out_channels, out_panels, "out_panel");
}

void check_branch(const Step& step, const Branch& branch, int64_t in_panels, int64_t out_panels,
                  Checker& check) {
  const bool expands = (branch.parts & kExpand) != 0;
  const bool depthwise = (branch.parts & kDepthwise) != 0;
  const bool projects = (branch.parts & kProject) != 0;
  check.require(branch.parts == (branch.parts & (kExpand | kDepthwise | kProject)), "parts");
  check.require(depthwise || (projects && !expands && step.stride == 1), "parts");
  check.count(branch.in_channels, "in_channels");
  check.count(branch.out_channels, "out_channels");
  if (depthwise && !expands) {
    check.table(branch.in_table, branch.in_channels, in_panels, "in_table");
    check.require(branch.mid_channels == branch.in_channels * kPanel, "mid_channels");
  } else {
    check.words(branch.in_table, branch.in_channels, in_panels * kPanel, "in_table");
  }
  int64_t depth = branch.in_channels;
  if (depthwise) {
    check.count(branch.mid_channels, "mid_channels");
    check.require(branch.window >= 3 && branch.window <= kMaxWindow && branch.window % 2 == 1,
                  "window");
    check.require(branch.dilation >= 1 && branch.dilation <= kMaxDilation, "dilation");
    check.require(!check.integers() || (branch.window == 3 && branch.dilation == 1), "window");
    check.depthwise(branch.dw, branch.mid_channels, branch.window, "dw");
    depth = branch.depth;
  }
  if (expands) check.grouped(branch.pw1, branch.mid_channels, branch.in_channels, "pw1");
  if (projects && depthwise) {
    check.count(depth, "depth");
    check.words(branch.table, depth, panels_of(branch.mid_channels) * kPanel, "table");
  }
  if (projects) {
    check.grouped(branch.pw2, branch.out_channels, depth, "pw2");
  } else {
    check.require(branch.out_channels == branch.mid_channels, "out_channels");
  }
  if (branch.added_panels != 0) {
    const bool fits = projects && step.stride == 1 && !step.new_buffer && !check.integers() &&
                      branch.added_panels == panels_of(branch.out_channels);
    check.require(fits, "added_panels");
    check.table(branch.added, branch.added_panels, in_panels, "added");
    // They are read while others write the result.
    const int64_t* const added = check.table(branch.added, branch.added_panels, "added");
    for (int64_t i = 0; i < branch.added_panels; ++i) {
      check.require(
          added[i] < branch.out_panel || added[i] >= branch.out_panel + branch.added_panels,
          "added");
    }
  }
  check.panels(branch.out_panel, branch.out_channels, out_panels, "out_panel");
}

void check_unit(const Step& step, int64_t in_panels, int64_t out_panels, Checker& check) {
  check.require(step.stride == 1 || step.stride == 2, "stride is not 1 or 2");
  check.require(step.stride == 1 || step.new_buffer, "stride 2 needs a new buffer");
  check.in_part("main.");
  check_branch(step, step.main, in_panels, out_panels, check);
  check.in_part("projection.");
  if ((step.projection.parts & kPool) != 0) {
    check_pool(step.projection, in_panels, out_panels, check);
  } else if (step.projection.parts != 0) {
    check_branch(step, step.projection, in_panels, out_panels, check);
  }
}

void check_gate(const Step& step, int64_t panels, Checker& check) {
  const Branch& main = step.main;
  check.require(!step.new_buffer, "a gate has no new buffer");
  check.require(!check.integers(), "a gate in a plan of integers");
  check.in_part("main.");
  check.panels(main.out_panel, main.out_channels, panels, "out_panel");
  check.activation(main.dw, main.out_channels, "dw");
  if (main.mid_channels != 0) {
    check.count(main.mid_channels, "mid_channels");
    check.table(main.in_table, main.in_channels, panels_of(main.out_channels) * kPanel, "in_table");
    check.layer(main.pw1, main.mid_channels, main.in_channels, "pw1");
    check.layer(main.pw2, main.out_channels, main.mid_channels, "pw2");
  }
  if (main.depth == 0) return;
  check.require(main.depth == main.out_channels, "depth");
  check.table(main.table, main.depth, panels * kPanel, "table");
  // What is added is read while others write the result.
  const int64_t* const added = check.table(main.table, main.depth, "table");
  const int64_t end = main.out_panel + panels_of(main.out_channels);
  for (int64_t i = 0; i < main.depth; ++i) {
    check.require(added[i] / kPanel < main.out_panel || added[i] / kPanel >= end, "table");
  }
}

// After the other checks, which look at what the step does use.
void check_unused(const Step& step, Checker& check) {
  const bool unit = step.kind == StepKind::kUnit, gate = step.kind == StepKind::kGate;
  const bool head = step.kind == StepKind::kHead, stem = step.kind == StepKind::kStem;
  const bool starts = unit || stem || step.kind == StepKind::kImport;
  const bool leaves = step.kind == StepKind::kExport;
  check.require(step.new_buffer == 0 || (starts && step.new_buffer == 1), "new_buffer");
  check.used_or_zero(step.new_buffer == 1, step.buffer_panels, "buffer_panels");
  for (const Branch* const branch : {&step.main, &step.projection}) {
    const bool main = branch == &step.main, there = main || branch->parts != 0;
    const auto has = [&](int64_t part) { return unit && (branch->parts & part) != 0; };
    const bool scales = gate && main && branch->mid_channels != 0;
    const bool adds = gate && main && branch->depth != 0;
    const bool classifies = head && main, dw = has(kDepthwise), pools = has(kPool);
    const bool multiplies = classifies && branch->parts == 0;
    const bool meet = dw && has(kProject);
    check.in_part(main ? "main." : "projection.");
    check.used_or_zero(unit || (classifies && branch->parts == kPool), branch->parts, "parts");
    check.used_or_zero(there, branch->in_channels, "in_channels");
    check.used_or_zero(there && !stem && (!gate || scales), branch->in_table, "in_table");
    check.used_or_zero(dw || pools || scales || classifies, branch->mid_channels, "mid_channels");
    check.used_or_zero(dw, branch->window, "window");
    check.used_or_zero(dw, branch->dilation, "dilation");
    check.used_or_zero(meet || adds, branch->depth, "depth");
    check.used_or_zero(meet || adds, branch->table, "table");
    check.used_or_zero(there, branch->out_channels, "out_channels");
    check.used_or_zero(there && (unit || gate), branch->out_panel, "out_panel");
    check.used_or_zero(has(kProject), branch->added_panels, "added_panels");
    check.used_or_zero(branch->added_panels != 0, branch->added, "added");
    check.used_or_zero(has(kExpand) || scales || multiplies || (stem && main), branch->pw1, "pw1");
    const bool converts =
        main && check.integers() && (stem || step.kind == StepKind::kImport || leaves);
    check.used_or_zero(dw || pools || (gate && main) || converts, branch->dw, "dw");
    check.ungrouped(!unit, branch->pw1, "pw1");
    check.ungrouped(true, branch->dw, "dw");
    check.ungrouped(!unit, branch->pw2, "pw2");
    check.used_or_zero(dw || converts, branch->dw.weights, "dw");
    check.used_or_zero(has(kProject) || scales || classifies, branch->pw2, "pw2");
  }
}

}  // namespace

Plan::Plan(const int64_t* words, int64_t word_count, int64_t weight_count) {
  const int64_t steps = checked_step_count(words, word_count, kPlanMagic, kHeaderWords, kStepWords);
  header_ = reinterpret_cast<const PlanHeader*>(words);
  steps_ = reinterpret_cast<const Step*>(words + kHeaderWords);
  tables_ = words + kHeaderWords + steps * kStepWords;
  if (element() != DType::kFloat32 && element() != DType::kBFloat16 && element() != DType::kUint8) {
    throw std::invalid_argument("plan: element is neither float32 nor bfloat16 nor uint8");
  }
  Checker check(tables_, word_count - kHeaderWords - steps * kStepWords, weight_count, element());

  int64_t panels = 0;  // of the current buffer
  int64_t halvings = 0;
  for (const Step& step : *this) {
    const bool first = check.step() == 0;
    const bool last = check.step() == steps - 1;
    const bool enters = step.kind == StepKind::kImport || step.kind == StepKind::kStem;
    const bool leaves = step.kind == StepKind::kHead || step.kind == StepKind::kExport;
    const bool between = step.kind == StepKind::kExport && !first;
    check.require(first == enters && (last == leaves || between), "wrong kind at this place");
    const Branch& main = step.main;
    check.in_part("main.");
    check.count(main.in_channels, "in_channels");
    check.count(main.out_channels, "out_channels");
    check.in_part("");
    if (step.new_buffer) check.count(step.buffer_panels, "buffer_panels");
    const int64_t out_panels = step.new_buffer ? step.buffer_panels : panels;
    switch (step.kind) {
      case StepKind::kImport:
        check.require(step.new_buffer, "import");
        check.table(main.in_table, main.out_channels, main.in_channels, "main.in_table");
        check.panels(0, main.out_channels, out_panels, "buffer_panels");
        check.conversion(main.dw, 2, main.in_channels, "main.dw");
        break;
      case StepKind::kStem:
        check.require(step.new_buffer, "stem");
        check.layer(main.pw1, main.out_channels, check.words_of(main.in_channels) * 9, "main.pw1");
        check.panels(0, main.out_channels, out_panels, "buffer_panels");
        check.conversion(main.dw, 3, main.in_channels, "main.dw");
        halvings += 2;
        break;
      case StepKind::kUnit:
        check_unit(step, panels, out_panels, check);
        halvings += step.stride == 2;
        break;
      case StepKind::kGate:
        check_gate(step, panels, check);
        break;
      case StepKind::kHead:
        check.count(main.mid_channels, "main.mid_channels");
        if (main.parts == kPool) {
          check.require(!check.integers(), "main.parts");
          check.table(main.in_table, main.in_channels, panels * kPanel, "main.in_table");
          check.require(main.mid_channels == main.in_channels, "main.mid_channels");
        } else {
          check.words(main.in_table, main.in_channels, panels * kPanel, "main.in_table");
          check.layer(main.pw1, main.mid_channels, main.in_channels, "main.pw1");
          const auto activation = static_cast<Activation>(main.pw1.activation);
          check.require(!check.integers() || activation == Activation::kRelu, "main.pw1");
        }
        check.layer(main.pw2, main.out_channels, check.words_of(main.mid_channels), "main.pw2");
        break;
      case StepKind::kExport:
        check.require(main.in_channels == main.out_channels, "export");
        check.table(main.in_table, main.in_channels, panels * kPanel, "main.in_table");
        check.conversion(main.dw, 2, main.in_channels, "main.dw");
        break;
      default:
        check.require(false, "unknown kind");
    }
    check_unused(step, check);
    result_count_ += leaves;
    panels = out_panels;
    check.next_step();
  }
  const Step& tail = steps_[steps - 1];
  if (header_->in_channels != steps_[0].main.in_channels ||
      header_->out_channels != tail.main.out_channels || header_->halvings != halvings ||
      header_->classify != (tail.kind == StepKind::kHead)) {
    throw std::invalid_argument("plan: header does not match the steps");
  }
}

std::vector<PlanResult> results_of(const Plan& plan) {
  std::vector<PlanResult> results;
  int64_t halvings = 0;
  for (const Step& step : plan) {
    halvings += step.kind == StepKind::kStem ? 2 : 0;
    halvings += step.kind == StepKind::kUnit && step.stride == 2;
    if (step.kind == StepKind::kExport || step.kind == StepKind::kHead) {
      results.push_back({step.main.out_channels, halvings});
    }
  }
  return results;
}

}  // namespace snv2
