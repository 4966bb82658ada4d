// Stand-alone ops: the split into work items.
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"

namespace snv2::cpu {
namespace {

// Work below this is not worth waking a thread for.
constexpr int64_t kMinElements = 16 * 1024;

int64_t parts_for(const ParallelFor& parallel_for, int64_t items, int64_t elements) {
  const int64_t useful = 1 + elements / kMinElements;
  const int64_t parts = parallel_for.threads < useful ? parallel_for.threads : useful;
  return parts < items ? parts : items;
}

// Planes of `channels` each, or rows of `y`.
int64_t item_count(const FeatureMap& y, int64_t channels) {
  return y.batch * (y.layout == Layout::kContiguous ? channels : y.height);
}

// f(items, scratch) on equal parts of the items.
template <class F>
void run_items(const ParallelFor& parallel_for, int64_t items, int64_t elements,
               int64_t scratch_floats, const F& f) {
  if (elements == 0) return;
  const int64_t parts = parts_for(parallel_for, items, elements);
  std::vector<float> scratch(static_cast<size_t>(parts * scratch_floats));
  parallel_for(
      parts, [&](int64_t i) { f(part_of(items, parts, i), scratch.data() + i * scratch_floats); });
}

}  // namespace

void cat_shuffle(const FeatureMap& a, const FeatureMap& b, const FeatureMap& out,
                 const ParallelFor& parallel_for) {
  check_cat_shuffle(a, b, out);
  run_items(parallel_for, item_count(out, a.channels), out.numel(), 0,
            [&](Range items, float*) { kernels().cat_shuffle(a, b, out, items); });
}

void dw_conv3x3(const FeatureMap& x, const Depthwise3x3& dw, const FeatureMap& out,
                const ParallelFor& parallel_for) {
  check_dw_conv3x3(x, dw, out);
  run_items(parallel_for, item_count(out, out.channels), out.numel(), plane_op_scratch(x),
            [&](Range items, float* scratch) { kernels().dw_conv3x3(x, dw, out, items, scratch); });
}

void split_dw_cat_shuffle(const FeatureMap& x, const Depthwise3x3& dw, const FeatureMap& out,
                          const ParallelFor& parallel_for) {
  check_split_dw_cat_shuffle(x, dw, out);
  run_items(parallel_for, item_count(out, x.channels / 2), out.numel(), plane_op_scratch(x),
            [&](Range items, float* scratch) {
              kernels().split_dw_cat_shuffle(x, dw, out, items, scratch);
            });
}

}  // namespace snv2::cpu
