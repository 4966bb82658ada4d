// Pieces of units, with any activations and windows: a pointwise and a depthwise convolution, a
// depthwise and a pointwise one, or one alone.
#include "cuda/dispatch.h"
#include "cuda/unit_launch.h"

namespace snv2::SNV2_GPU {

void run_piece(const StepCall& call, LaunchInfo* info) {
  with_type(call.plan->dtype(), [&](auto zero) {
    using T = decltype(zero);
    if (call.step->stride == 1) {
      launch_unit<T, 1, AnyActivation, true>(call, info);
    } else {
      launch_unit<T, 2, AnyActivation, true>(call, info);
    }
  });
}

}  // namespace snv2::SNV2_GPU
