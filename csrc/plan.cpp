#include "snv2/plan.h"

#include <stdexcept>

#include "plan_checks.h"

namespace snv2 {
namespace {

class Checker : public PlanChecker {
 public:
  Checker(const int64_t* tables, int64_t table_words, int64_t weight_count, int64_t word_planes)
      : PlanChecker(tables, table_words), weight_count_(weight_count), word_planes_(word_planes) {}

  // A table of words of `limit` planes.
  void words(int64_t offset, int64_t length, int64_t limit, const char* what) const {
    table(offset, length, limit, what);
    const int64_t* const entries = table(offset, length, what);
    for (int64_t i = 0; i < length; ++i) require(entries[i] % word_planes_ == 0, what);
  }

  // Words of consecutive channels.
  int64_t words_of(int64_t channels) const { return ceil_div(channels, word_planes_); }

  void weights(int64_t offset, int64_t outputs, int64_t depth, const char* what) const {
    range(offset, packed_floats(outputs, depth), weight_count_, what);
  }

  void panels(int64_t first, int64_t channels, int64_t limit, const char* what) const {
    require(first >= 0 && first <= limit - panels_of(channels), what);
  }

 private:
  int64_t weight_count_;
  int64_t word_planes_;
};

void check_unit(const Step& step, int64_t in_panels, int64_t out_panels, const Checker& check) {
  check.require(step.stride == 1 || step.stride == 2, "stride is not 1 or 2");
  check.require(step.stride == 1 || step.new_buffer, "stride 2 needs a new buffer");
  check.count(step.mid_channels, "mid_channels");
  check.words(step.in_table, step.in_channels, in_panels * kPanel, "in_table");
  check.weights(step.pw1_weights, step.mid_channels, step.in_channels, "pw1_weights");
  check.weights(step.dw_weights, step.mid_channels, 9, "dw_weights");
  check.weights(step.pw2_weights, step.out_channels, check.words_of(step.mid_channels),
                "pw2_weights");
  check.panels(step.out_panel, step.out_channels, out_panels, "out_panel");
  if (step.proj_channels == 0) {
    check.require(step.proj_panels == 0 && step.proj_depth == 0, "half a projection");
    return;
  }
  check.count(step.proj_channels, "proj_channels");
  check.count(step.proj_panels, "proj_panels");
  check.count(step.proj_depth, "proj_depth");
  check.table(step.proj_panel_table, step.proj_panels, in_panels, "proj_panel_table");
  check.words(step.proj_table, step.proj_depth, step.proj_panels * kPanel, "proj_table");
  check.weights(step.proj_dw_weights, step.proj_panels * kPanel, 9, "proj_dw_weights");
  check.weights(step.proj_pw_weights, step.proj_channels, step.proj_depth, "proj_pw_weights");
  check.panels(step.proj_out_panel, step.proj_channels, out_panels, "proj_out_panel");
}

}  // namespace

Plan::Plan(const int64_t* words, int64_t word_count, int64_t weight_count) {
  const int64_t steps = checked_step_count(words, word_count, kPlanMagic, kHeaderWords, kStepWords);
  header_ = reinterpret_cast<const PlanHeader*>(words);
  steps_ = reinterpret_cast<const Step*>(words + kHeaderWords);
  tables_ = words + kHeaderWords + steps * kStepWords;
  if (element() != DType::kFloat32 && element() != DType::kBFloat16) {
    throw std::invalid_argument("plan: element is neither float32 nor bfloat16");
  }
  Checker check(tables_, word_count - kHeaderWords - steps * kStepWords, weight_count,
                planes_in_word(element()));

  int64_t panels = 0;  // of the current buffer
  int64_t halvings = 0;
  for (const Step& step : *this) {
    const bool first = check.step() == 0;
    const bool last = check.step() == steps - 1;
    const bool enters = step.kind == StepKind::kImport || step.kind == StepKind::kStem;
    const bool leaves = step.kind == StepKind::kHead || step.kind == StepKind::kExport;
    check.require(first == enters && last == leaves, "wrong kind at this place");
    check.count(step.in_channels, "in_channels");
    check.count(step.out_channels, "out_channels");
    if (step.new_buffer) check.count(step.buffer_panels, "buffer_panels");
    const int64_t out_panels = step.new_buffer ? step.buffer_panels : panels;
    switch (step.kind) {
      case StepKind::kImport:
        check.require(step.new_buffer, "import");
        check.table(step.in_table, step.out_channels, step.in_channels, "in_table");
        check.panels(0, step.out_channels, out_panels, "buffer_panels");
        break;
      case StepKind::kStem:
        check.require(step.new_buffer, "stem");
        check.weights(step.pw1_weights, step.out_channels, check.words_of(step.in_channels) * 9,
                      "pw1_weights");
        check.panels(0, step.out_channels, out_panels, "buffer_panels");
        halvings += 2;
        break;
      case StepKind::kUnit:
        check_unit(step, panels, out_panels, check);
        halvings += step.stride == 2;
        break;
      case StepKind::kHead:
        check.count(step.mid_channels, "mid_channels");
        check.words(step.in_table, step.in_channels, panels * kPanel, "in_table");
        check.weights(step.pw1_weights, step.mid_channels, step.in_channels, "pw1_weights");
        check.weights(step.pw2_weights, step.out_channels, check.words_of(step.mid_channels),
                      "pw2_weights");
        break;
      case StepKind::kExport:
        check.require(step.in_channels == step.out_channels, "export");
        check.table(step.in_table, step.in_channels, panels * kPanel, "in_table");
        break;
      default:
        check.require(false, "unknown kind");
    }
    panels = out_panels;
    check.next_step();
  }
  const Step& tail = steps_[steps - 1];
  if (header_->in_channels != steps_[0].in_channels || header_->out_channels != tail.out_channels ||
      header_->halvings != halvings || header_->classify != (tail.kind == StepKind::kHead)) {
    throw std::invalid_argument("plan: header does not match the steps");
  }
}

}  // namespace snv2
