// Stages of units on the emulator, with weights in all places where they can be, against loops in
// double. Accuracy is a matter for the Python tests; these run under sanitizers.
#include <iterator>

#include "gpu_written_stage.h"

namespace snv2::SNV2_GPU {
namespace {

// Two stages: a unit of stride 2 from the caller's tensor, one whose map is also a result; one of
// stride 2 and one between planes, and one to the caller's tensor.
void run_stage(const Case& c) {
  Stage stage(c);
  stage.start(random_map(stage, c.batch, c.in, c.height, c.width));
  stage.unit(2, c.half, false, false);
  stage.unit(1, c.half, true, false);
  stage.unit(2, c.half + 3, false, false);
  stage.unit(1, c.half + 3, false, false);
  stage.unit(1, c.half + 3, true, true);
  stage.run(c);
}

void run_stages(int64_t weights) {
  for (const DType dtype : kDTypes) {
    for (const Layout layout : {Layout::kContiguous, Layout::kChannelsLast}) {
      run_stage({dtype, layout, 3, 10, 20, 13, 9, weights, 1});
      run_stage({dtype, layout, 2, 5, 40, 14, 14, weights, 16});
    }
  }
}

}  // namespace

TEST(stages_with_resident_weights_match_loops) { run_stages(kResident); }
TEST(stages_with_direct_weights_match_loops) { run_stages(kDirect); }
TEST(stages_with_clustered_weights_match_loops) { run_stages(kClustered); }
TEST(stages_of_odd_extents_match_loops) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int64_t weights : {kResident, kClustered}) {
      run_stage({dtype, Layout::kContiguous, 2, 3, 17, 1, 1, weights, 1});
      run_stage({dtype, Layout::kContiguous, 3, 16, 32, 2, 11, weights, 4});
      run_stage({dtype, Layout::kContiguous, 4, 7, 16, 11, 2, weights, 1});
    }
  }
}
TEST(narrow_steps_and_short_ranges_match_loops) {
  for (const int64_t weights : {kResident, kDirect, kClustered}) {
    for (const int64_t rows : {1, 2, 5}) {
      run_stage({DType::kFloat16, Layout::kContiguous, 3, 9, 24, 12, 10, weights, 1, 16, rows});
    }
  }
}
TEST(any_windows_match_loops_wherever_weights_are) {
  constexpr GpuWindow kWindows[] = {{5, 1}, {7, 1}, {3, 2}, {5, 3}};
  for (const GpuWindow& window : kWindows) {
    for (const int64_t weights : {kResident, kDirect, kClustered}) {
      const DType dtype = weights == kDirect ? DType::kFloat32 : DType::kFloat16;
      run_stage({dtype, Layout::kContiguous, 2, 5, 20, 13, 9, weights, 1, 0, 0, window});
      run_stage({dtype, Layout::kContiguous, 3, 4, 16, 10, 12, weights, 1, 16, 2, window});
    }
    run_stage({DType::kFloat32, Layout::kChannelsLast, 2, 3, 17, 2, 3, kResident, 1, 0, 0, window});
  }
}
TEST(any_activations_match_loops_wherever_weights_are) {
  for (const Activation after : {Activation::kIdentity, Activation::kRelu6, Activation::kPrelu,
                                 Activation::kSilu, Activation::kHardswish}) {
    for (const int64_t weights : {kResident, kDirect, kClustered}) {
      const auto turn = static_cast<size_t>(static_cast<int64_t>(after) + weights);
      const DType dtype = kDTypes[turn % std::size(kDTypes)];
      run_stage({dtype, Layout::kContiguous, 2, 5, 40, 7, 9, weights, 1, 0, 0, {3, 1}, after});
    }
  }
}

}  // namespace snv2::SNV2_GPU
