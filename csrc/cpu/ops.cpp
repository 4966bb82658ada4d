// Stand-alone ops: the split into work items.
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"

namespace snv2::cpu {
namespace {

int64_t parts_for(const ParallelFor& parallel_for, int64_t items, int64_t elements) {
  const int64_t useful = 1 + elements / kItemElements;  // less is not worth waking a thread for
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

// The parts' sums as gradients; kDepthwiseSums says how.
void finish(const DepthwiseBackward& op, const Depthwise3x3Gradients& grads) {
  for (int64_t c = 0; c < op.channels; ++c) {
    double sums[kDepthwiseSums] = {};
    for (int64_t part = 0; part < op.parts(); ++part) {
      const float* from = op.sums + (part * op.channels + c) * kDepthwiseSums;
      for (int64_t i = 0; i < kDepthwiseSums; ++i) sums[i] += double{from[i]};
    }
    double scale = 0;
    for (int64_t tap = 0; tap < 9; ++tap) {
      scale += sums[tap] * double{op.dw.weight[c * 9 + tap]};
      grads.weight[c * 9 + tap] = static_cast<float>(sums[tap] * double{op.dw.scale[c]});
    }
    grads.scale[c] = static_cast<float>(scale);
    grads.shift[c] = static_cast<float>(sums[9]);
  }
}

void depthwise_backward(const DepthwiseBackward& op, const Depthwise3x3Gradients& grads,
                        const ParallelFor& parallel_for) {
  run_items(parallel_for, op.items(), op.grad_x.numel(), backward_scratch(op.x, op.channels),
            [&](Range items, float* scratch) { kernels().depthwise_backward(op, items, scratch); });
  finish(op, grads);
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

void cat_shuffle_backward(const FeatureMap& grad, const FeatureMap& grad_a,
                          const FeatureMap& grad_b, const ParallelFor& parallel_for) {
  check_cat_shuffle(grad_a, grad_b, grad);
  run_items(
      parallel_for, item_count(grad, grad_a.channels), grad.numel(), 0,
      [&](Range items, float*) { kernels().cat_shuffle_backward(grad, grad_a, grad_b, items); });
}

int64_t depthwise_backward_workspace(const FeatureMap& x, int64_t channels) {
  return DepthwiseBackward{{}, x, {}, {}, nullptr, channels}.parts() * channels * kDepthwiseSums;
}

void dw_conv3x3_backward(const FeatureMap& grad, const FeatureMap& x, const Depthwise3x3& dw,
                         const FeatureMap& grad_x, const Depthwise3x3Gradients& grads,
                         float* workspace, const ParallelFor& parallel_for) {
  check_dw_conv3x3(x, dw, grad);
  check_gradient_of(x, grad_x);
  depthwise_backward({grad, x, dw, grad_x, workspace, x.channels}, grads, parallel_for);
}

void split_dw_cat_shuffle_backward(const FeatureMap& grad, const FeatureMap& x,
                                   const Depthwise3x3& dw, const FeatureMap& grad_x,
                                   const Depthwise3x3Gradients& grads, float* workspace,
                                   const ParallelFor& parallel_for) {
  check_split_dw_cat_shuffle(x, dw, grad);
  check_gradient_of(x, grad_x);
  depthwise_backward({grad, x, dw, grad_x, workspace, x.channels / 2}, grads, parallel_for);
}

}  // namespace snv2::cpu
