// The units of the paper: ReLU after the products, windows of 3x3. They have kernels of their own;
// all others share those of unit_any.cu, and pieces of units those of unit_piece.cu.
#include "cuda/dispatch.h"
#include "cuda/unit_launch.h"

namespace snv2::SNV2_GPU {

void run_unit(const StepCall& call, LaunchInfo* info) {
  const GpuStep& step = *call.step;
  if (step.parts != kWholeBranch) return run_piece(call, info);
  if (!is_papers_unit(step)) return run_any_unit(call, info);
  with_type(call.plan->dtype(), [&](auto zero) {
    using T = decltype(zero);
    if (step.stride == 1) {
      launch_unit<T, 1, Relu>(call, info);
    } else {
      launch_unit<T, 2, Relu>(call, info);
    }
  });
}

}  // namespace snv2::SNV2_GPU
