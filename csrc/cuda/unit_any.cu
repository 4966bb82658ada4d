// Units with any activations and windows. In a file of its own, to be compiled beside unit.cu.
#include "cuda/dispatch.h"
#include "cuda/unit_launch.h"

namespace snv2::SNV2_GPU {

void run_any_unit(const StepCall& call, LaunchInfo* info) {
  with_type(call.plan->dtype(), [&](auto zero) {
    using T = decltype(zero);
    if (call.step->stride == 1) {
      launch_unit<T, 1, AnyActivation>(call, info);
    } else {
      launch_unit<T, 2, AnyActivation>(call, info);
    }
  });
}

}  // namespace snv2::SNV2_GPU
