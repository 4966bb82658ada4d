#include "snv2/gpu_plan.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "plan_checks.h"

namespace snv2 {
namespace {

constexpr int64_t kAlignedFloats = 4;  // parameters are read in vectors of 16 bytes
constexpr int64_t kMostWindow = 255;
constexpr int64_t kMostDilation = 255;

// Live planes of a buffer, and how often the caller's extent was halved to theirs.
struct Planes {
  std::vector<bool> written;
  int64_t halvings = 0;

  int64_t size() const { return static_cast<int64_t>(written.size()); }
  bool holds(int64_t plane) const {
    return plane >= 0 && plane < size() && written[static_cast<size_t>(plane)];
  }
};

class Checker : public PlanChecker {
 public:
  Checker(const GpuPlanHeader& header, const int64_t* tables, int64_t table_words)
      : PlanChecker(tables, table_words),
        header_(header),
        results_(static_cast<size_t>(header.result_count)) {}

  void check_step(const GpuStep& step, bool first, bool last);
  void all_results_written() const {
    require(std::all_of(results_.begin(), results_.end(), [](bool written) { return written; }),
            "a result that no step writes");
  }
  int64_t halvings() const { return halvings_; }

 private:
  void matrix(int64_t weights, int64_t rows, int64_t depth, const char* what) const {
    const DType dtype = static_cast<DType>(header_.dtype);
    range(weights, packed_elements(rows, depth, dtype), header_.weight_count, what);
    require(weights % packed_elements(1, 1, dtype) == 0, what);
  }
  void floats(int64_t offset, int64_t count, const char* what) const {
    range(offset, count, header_.parameter_count, what);
    require(offset % kAlignedFloats == 0, what);
  }
  void bias(int64_t offset, int64_t rows, const char* what) const {
    floats(offset, padded_rows(rows), what);
  }

  // With `rows` 0 the step has no such layer.
  void activation(const GpuActivation& act, int64_t rows, bool gate, const char* what) const;
  void depthwise(int64_t offset, const GpuWindow& window, int64_t channels, const char* what,
                 const char* what_window) const;

  void buffers(const GpuStep& step, bool first, bool last) const;
  void layers(const GpuStep& step) const;
  void unit(const GpuStep& step) const;
  void gate(const GpuStep& step) const;
  void input(const GpuStep& step) const;
  void output(const GpuStep& step);
  void result(const GpuStep& step, bool last);
  void unused(const GpuStep& step) const;
  bool readable(const GpuStep& step, int64_t plane) const;

  const GpuPlanHeader& header_;
  std::vector<bool> results_;  // those written so far
  Planes buffers_[2];
  int64_t halvings_ = 0;  // of what the step before wrote
};

void Checker::check_step(const GpuStep& step, bool first, bool last) {
  buffers(step, first, last);
  count(step.in_channels, "in_channels");
  count(step.out_channels, "out_channels");
  input(step);
  halvings_ = first ? 0 : buffers_[step.in_buffer].halvings;
  switch (step.kind) {
    case GpuStepKind::kCopy:
      require(first && step.in_channels == step.out_channels, "copy");
      break;
    case GpuStepKind::kExport:
      require(!first && step.in_channels == step.out_channels, "export");
      break;
    case GpuStepKind::kStem:
      require(first && step.in_channels == header_.in_channels, "stem");
      matrix(step.pw1_weights, step.out_channels, step.in_channels * 9, "pw1_weights");
      bias(step.pw1_bias, step.out_channels, "pw1_bias");
      halvings_ += 2;
      break;
    case GpuStepKind::kUnit:
      unit(step);
      halvings_ += step.stride == 2;
      break;
    case GpuStepKind::kGate:
      gate(step);
      break;
    case GpuStepKind::kPool:
      require(step.parts == kPool || step.parts == (kPool | kPoolInside), "parts");
      require(step.in_buffer != kCallersMap && step.in_channels == step.out_channels, "pool");
      require(step.stride == 1 || step.stride == 2, "stride is not 1 or 2");
      halvings_ += step.stride == 2;
      break;
    case GpuStepKind::kHead:
      require(!first && last, "head");
      count(step.mid_channels, "mid_channels");
      matrix(step.pw1_weights, step.mid_channels, step.in_channels, "pw1_weights");
      bias(step.pw1_bias, step.mid_channels, "pw1_bias");
      matrix(step.pw2_weights, step.out_channels, step.mid_channels, "pw2_weights");
      bias(step.pw2_bias, step.out_channels, "pw2_bias");
      break;
    default:
      require(false, "unknown kind");
  }
  layers(step);
  unused(step);
  result(step, last);
  output(step);
}

void Checker::unused(const GpuStep& step) const {
  const bool unit = step.kind == GpuStepKind::kUnit, gate = step.kind == GpuStepKind::kGate;
  const bool head = step.kind == GpuStepKind::kHead, stem = step.kind == GpuStepKind::kStem;
  const bool pool = step.kind == GpuStepKind::kPool;
  const bool maps = !head && step.result != kNoResult, projects = unit && step.proj_channels > 0;
  const auto has = [&](int64_t part) { return unit && (step.parts & part) != 0; };
  const bool products = head || (gate && step.mid_channels > 0);
  const bool pw1 = products || stem || has(kExpand), pw2 = products || has(kProject);
  used_or_zero(unit || pool, step.parts, "parts");
  require(unit || pool || step.stride == 1, "stride");
  used_or_zero(unit || products, step.mid_channels, "mid_channels");
  used_or_zero(unit, step.proj_channels, "proj_channels");
  used_or_zero(step.out_buffer != kNoBuffer, step.out_table, "out_table");
  used_or_zero(maps, step.result_channels, "result_channels");
  used_or_zero(maps && unit, step.result_table, "result_table");
  used_or_zero(pw1, step.pw1_weights, "pw1_weights");
  used_or_zero(pw1, step.pw1_bias, "pw1_bias");
  used_or_zero(pw2, step.pw2_weights, "pw2_weights");
  used_or_zero(pw2, step.pw2_bias, "pw2_bias");
  used_or_zero(projects, step.proj_weights, "proj_weights");
  used_or_zero(projects, step.proj_bias, "proj_bias");
  used_or_zero(has(kDepthwise), step.dw, "dw");
  used_or_zero(projects, step.proj_dw, "proj_dw");
}

void Checker::activation(const GpuActivation& act, int64_t rows, bool gate,
                         const char* what) const {
  if (act.kind == Activation::kPrelu && rows > 0) return bias(act.slopes, rows, what);
  const bool of_gate =
      gate && (act.kind == Activation::kSigmoid || act.kind == Activation::kHardsigmoid);
  const bool known = of_gate || act.kind == Activation::kRelu || act.kind == Activation::kRelu6 ||
                     act.kind == Activation::kSilu || act.kind == Activation::kHardswish;
  require(act.slopes == 0 && (act.kind == Activation::kIdentity || (known && rows > 0)), what);
}

void Checker::depthwise(int64_t offset, const GpuWindow& window, int64_t channels, const char* what,
                        const char* what_window) const {
  if (channels == 0) return require(window.window == 1 && window.dilation == 1, what_window);
  require(window.window >= 3 && window.window <= kMostWindow && window.window % 2 == 1 &&
              window.dilation >= 1 && window.dilation <= kMostDilation,
          what_window);
  floats(offset, channels * depthwise_floats(window.window), what);
}

// After the other checks: channels are known to be in range.
void Checker::layers(const GpuStep& step) const {
  const auto has = [&](int64_t part) { return (step.parts & part) != 0; };
  const bool gate = step.kind == GpuStepKind::kGate, pool = step.kind == GpuStepKind::kPool;
  const int64_t mid = step.mid_channels, out = step.out_channels, proj = step.proj_channels;
  const int64_t pw1 = step.kind == GpuStepKind::kStem                           ? out
                      : has(kExpand) || gate || step.kind == GpuStepKind::kHead ? mid
                                                                                : 0;
  const int64_t pw2 = has(kProject) || (gate && mid > 0) ? out : 0;
  const int64_t dw = has(kDepthwise) ? mid : 0, proj_dw = proj > 0 ? step.in_channels : 0;
  activation(step.pw1_activation, pw1, gate, "pw1_activation");
  activation(step.dw_activation, gate || pool ? out : dw, false, "dw_activation");
  activation(step.pw2_activation, pw2, gate, "pw2_activation");
  activation(step.proj_dw_activation, proj_dw, false, "proj_dw_activation");
  activation(step.proj_activation, proj, false, "proj_activation");
  depthwise(step.dw, step.dw_window, dw, "dw", "dw_window");
  depthwise(step.proj_dw, step.proj_dw_window, proj_dw, "proj_dw", "proj_dw_window");
}

// A kUnit of stride 1 stays in its buffer. What a kExport or the last step reads is left as it is.
void Checker::buffers(const GpuStep& step, bool first, bool last) const {
  if (first) {
    require(step.in_buffer == kCallersMap, "in_buffer");
  } else {
    require((step.in_buffer == 0 || step.in_buffer == 1) && buffers_[step.in_buffer].size() > 0,
            "in_buffer");
  }
  if (last || step.kind == GpuStepKind::kExport) {
    require(step.out_buffer == kNoBuffer && step.out_planes == 0, "out_buffer");
    return;
  }
  require(step.out_buffer == 0 || step.out_buffer == 1, "out_buffer");
  if ((step.kind == GpuStepKind::kUnit || step.kind == GpuStepKind::kPool) && !first) {
    require((step.out_buffer == step.in_buffer) == (step.stride == 1), "out_buffer");
  }
  // Each plane is in a table of those that are written, which bounds what is allocated here.
  require(step.out_planes >= 1 && step.out_planes <= table_words(), "out_planes");
}

void Checker::unit(const GpuStep& step) const {
  const int64_t parts = step.parts;
  const bool expand = (parts & kExpand) != 0, depthwise = (parts & kDepthwise) != 0;
  const bool project = (parts & kProject) != 0;
  require(parts == (parts & kWholeBranch) && (depthwise || (project && !expand)), "parts");
  // What reads or writes the caller's maps is compiled for whole branches.
  require(parts == kWholeBranch || (step.in_buffer != kCallersMap && step.result == kNoResult),
          "parts");
  require(step.stride == 1 || (step.stride == 2 && depthwise), "stride is not 1 or 2");
  count(step.mid_channels, "mid_channels");
  if (expand) {
    matrix(step.pw1_weights, step.mid_channels, step.in_channels, "pw1_weights");
    bias(step.pw1_bias, step.mid_channels, "pw1_bias");
  } else {
    require(step.mid_channels == step.in_channels, "mid_channels");
  }
  if (project) {
    matrix(step.pw2_weights, step.out_channels, step.mid_channels, "pw2_weights");
    bias(step.pw2_bias, step.out_channels, "pw2_bias");
  } else {
    require(step.out_channels == step.mid_channels, "out_channels");
  }
  if (step.proj_channels == 0) return;
  // Beside a first product only kernels of whole units project, at stride 2.
  require(parts == kWholeBranch ? step.stride == 2 : depthwise && !expand, "proj_channels");
  count(step.proj_channels, "proj_channels");
  matrix(step.proj_weights, step.proj_channels, step.in_channels, "proj_weights");
  bias(step.proj_bias, step.proj_channels, "proj_bias");
}

// Each plane that is written belongs to one CTA, or cluster, and image.
void Checker::gate(const GpuStep& step) const {
  const int64_t in = step.in_channels, mid = step.mid_channels, out = step.out_channels;
  require(step.in_buffer != kCallersMap && step.out_buffer == step.in_buffer &&
              (in == out || in == 2 * out),
          "gate");
  if (mid != 0 || (in == out && step.dw_activation.kind == Activation::kIdentity)) {
    count(mid, "mid_channels");
    matrix(step.pw1_weights, mid, out, "pw1_weights");
    bias(step.pw1_bias, mid, "pw1_bias");
    matrix(step.pw2_weights, out, mid, "pw2_weights");
    bias(step.pw2_bias, out, "pw2_bias");
  }
  const int64_t* const read = table(step.in_table, in, "in_table");
  const int64_t* const written = table(step.out_table, out, "out_table");
  require(std::equal(written, written + out, read), "out_table");
}

bool Checker::readable(const GpuStep& step, int64_t plane) const {
  if (step.in_buffer == kCallersMap) return plane >= 0 && plane < header_.in_channels;
  return buffers_[step.in_buffer].holds(plane);
}

void Checker::input(const GpuStep& step) const {
  const int64_t* const planes = table(step.in_table, step.in_channels, "in_table");
  for (int64_t i = 0; i < step.in_channels; ++i) require(readable(step, planes[i]), "in_table");
}

void Checker::result(const GpuStep& step, bool last) {
  const bool exports = step.kind == GpuStepKind::kExport;
  if (step.result == kNoResult) {
    require(!last && !exports, "result");
    return;
  }
  const int64_t index = step.result;
  require(index >= 0 && index < header_.result_count && !results_[static_cast<size_t>(index)] &&
              last == (index == header_.result_count - 1),
          "result");
  results_[static_cast<size_t>(index)] = true;
  if (step.kind == GpuStepKind::kHead) return;
  if (exports) return require(step.result_channels == step.in_channels, "result_channels");
  require(step.kind == GpuStepKind::kUnit, "result");
  count(step.result_channels, "result_channels");
  const int64_t* const rows = table(step.result_table, step.result_channels, "result_table");
  for (int64_t i = 0; i < step.result_channels; ++i) {
    if (rows[i] >= 0) {
      require(rows[i] < step.proj_channels + step.out_channels, "result_table");
    } else {
      require(step.stride == 1 && readable(step, -(rows[i] + 1)), "result_table");
    }
  }
}

// After the other checks, which ask for the planes as they were before this step.
void Checker::output(const GpuStep& step) {
  if (step.out_buffer == kNoBuffer) return;
  const int64_t written = step.proj_channels + step.out_channels;
  const int64_t* const fresh = table(step.out_table, written, "out_table");
  Planes& planes = buffers_[step.out_buffer];
  if (planes.halvings != halvings_) planes = {};
  planes.halvings = halvings_;
  require(step.out_planes >= planes.size(), "out_planes");
  planes.written.resize(static_cast<size_t>(step.out_planes));
  // CTAs read planes while others write theirs.
  std::vector<bool> taken(static_cast<size_t>(step.out_planes));
  if (step.out_buffer == step.in_buffer) {
    const int64_t in_place = step.kind == GpuStepKind::kGate ? step.out_channels : 0;
    const int64_t* const read = table(step.in_table, step.in_channels, "in_table");
    for (int64_t i = in_place; i < step.in_channels; ++i)
      taken[static_cast<size_t>(read[i])] = true;
    if (step.result != kNoResult) {
      const int64_t* const rows = table(step.result_table, step.result_channels, "result_table");
      for (int64_t i = 0; i < step.result_channels; ++i) {
        if (rows[i] < 0) taken[static_cast<size_t>(-(rows[i] + 1))] = true;
      }
    }
  }
  for (int64_t i = 0; i < written; ++i) {
    require(fresh[i] >= 0 && fresh[i] < step.out_planes && !taken[static_cast<size_t>(fresh[i])],
            "out_table");
    taken[static_cast<size_t>(fresh[i])] = planes.written[static_cast<size_t>(fresh[i])] = true;
  }
}

void check_header(const GpuPlanHeader& header) {
  constexpr int64_t kMost = int64_t{1} << 40;
  const bool sizes = header.weight_count >= 0 && header.weight_count <= kMost &&
                     header.parameter_count >= 0 && header.parameter_count <= kMost;
  const bool dtype = header.dtype >= static_cast<int64_t>(DType::kFloat32) &&
                     header.dtype <= static_cast<int64_t>(DType::kBFloat16);
  const bool results = header.result_count >= 1 && header.result_count <= header.step_count;
  const bool channels = header.in_channels >= 1 && header.in_channels <= int64_t{1} << 24;
  if (!sizes || !dtype || !results || !channels) {
    throw std::invalid_argument("plan: the header is damaged");
  }
}

}  // namespace

GpuPlan::GpuPlan(const int64_t* words, int64_t word_count) {
  const int64_t steps =
      checked_step_count(words, word_count, kGpuPlanMagic, kGpuHeaderWords, kGpuStepWords);
  header_ = reinterpret_cast<const GpuPlanHeader*>(words);
  steps_ = reinterpret_cast<const GpuStep*>(words + kGpuHeaderWords);
  tables_ = words + kGpuHeaderWords + steps * kGpuStepWords;
  table_count_ = word_count - kGpuHeaderWords - steps * kGpuStepWords;
  check_header(*header_);
  Checker check(*header_, tables_, table_count_);
  for (const GpuStep& step : *this) {
    check.check_step(step, &step == begin(), &step == end() - 1);
    check.next_step();
  }
  check.all_results_written();
  const GpuStep& tail = steps_[steps - 1];
  const bool classify = tail.kind == GpuStepKind::kHead;
  if (header_->out_channels != (classify ? tail.out_channels : tail.result_channels) ||
      header_->halvings != check.halvings() || header_->classify != int64_t{classify}) {
    throw std::invalid_argument("plan: header does not match the steps");
  }
}

std::vector<PlanResult> results_of(const GpuPlan& plan) {
  std::vector<PlanResult> results(static_cast<size_t>(plan.header().result_count));
  int64_t halved_to[2] = {0, 0};  // the maps of the two buffers
  for (const GpuStep& step : plan) {
    int64_t halvings = step.in_buffer == kCallersMap ? 0 : halved_to[step.in_buffer];
    halvings += step.kind == GpuStepKind::kStem ? 2 : step.stride == 2;
    if (step.out_buffer != kNoBuffer) halved_to[step.out_buffer] = halvings;
    if (step.result == kNoResult) continue;
    const bool scores = step.kind == GpuStepKind::kHead;
    results[static_cast<size_t>(step.result)] = {scores ? step.out_channels : step.result_channels,
                                                 halvings};
  }
  return results;
}

}  // namespace snv2
