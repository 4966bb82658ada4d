// Stages of units on the emulator, with weights in all places where they can be, against loops in
// double. Accuracy is a matter for the Python tests; these run under sanitizers.
#include <iterator>

#include "gpu_stages.h"

namespace snv2::SNV2_GPU {
namespace {

class Stage : public WrittenPlan {
 public:
  using WrittenPlan::WrittenPlan;

  // Adds a unit: of stride 2, or 1 with the second half as the main one. `last` leaves no planes.
  void unit(int64_t stride, int64_t half, bool result, bool last) {
    Map x = map();
    const int64_t buffer = steps_.empty() ? kCallersMap : steps_.back().out_buffer;
    const int64_t in = stride == 2 ? x.channels : half, skip = x.channels - in;
    GpuStep step{};
    step.kind = GpuStepKind::kUnit;
    step.parts = kWholeBranch;
    step.stride = stride;
    step.in_buffer = buffer;
    step.result = result ? header_.result_count++ : kNoResult;
    step.in_channels = in;
    step.mid_channels = step.out_channels = half;
    step.proj_channels = stride == 2 ? half : 0;
    step.dw_window = window_;
    if (stride == 2) step.proj_dw_window = window_;
    const Activation dw_kind = after_ == Activation::kRelu ? Activation::kIdentity : after_;
    const int64_t dw_floats = depthwise_floats(window_.window);
    const float dw_scale = 1.2f / static_cast<float>(window_.window);

    // Gathered from the last channel down: any order will do.
    std::vector<int64_t> gather;
    Map main(x.batch, in, x.height, x.width);
    for (int64_t k = 0; k < in; ++k) {
      const int64_t channel = x.channels - 1 - k;
      gather.push_back(planes_[static_cast<size_t>(channel)]);
      for (int64_t n = 0; n < x.batch; ++n) {
        for (int64_t p = 0; p < x.height * x.width; ++p) main.at(n, k, p) = x.at(n, channel, p);
      }
    }
    step.in_table = table(gather);
    const auto pw1 = matrix(step.pw1_weights, half, in);
    const auto pw1_bias = floats(step.pw1_bias, half, padded_rows(half), 1);
    const auto dw = floats(step.dw, half * dw_floats, half * dw_floats, dw_scale);
    const auto pw2 = matrix(step.pw2_weights, half, half);
    const auto pw2_bias = floats(step.pw2_bias, half, padded_rows(half), 1);
    Map mid = pointwise(main, pw1, pw1_bias, half, after(step.pw1_activation, after_, half));
    Map convolved = depthwise(mid, dw, stride, after(step.dw_activation, dw_kind, half));
    Map out = pointwise(convolved, pw2, pw2_bias, half, after(step.pw2_activation, after_, half));
    Map first(x.batch, half, out.height, out.width);
    if (stride == 2) {
      const auto proj_dw = floats(step.proj_dw, in * dw_floats, in * dw_floats, dw_scale);
      const auto proj = matrix(step.proj_weights, half, in);
      const auto proj_bias = floats(step.proj_bias, half, padded_rows(half), 1);
      Map projected = depthwise(main, proj_dw, 2, after(step.proj_dw_activation, dw_kind, in));
      first =
          pointwise(projected, proj, proj_bias, half, after(step.proj_activation, after_, half));
    } else {
      for (int64_t n = 0; n < x.batch; ++n) {
        for (int64_t c = 0; c < skip; ++c) {
          for (int64_t p = 0; p < x.height * x.width; ++p) first.at(n, c, p) = x.at(n, c, p);
        }
      }
    }

    // Shuffled: the first half, and the main result after each.
    Map joined(x.batch, 2 * half, out.height, out.width);
    for (int64_t n = 0; n < x.batch; ++n) {
      for (int64_t c = 0; c < half; ++c) {
        for (int64_t p = 0; p < out.height * out.width; ++p) {
          joined.at(n, 2 * c, p) = first.at(n, c, p);
          joined.at(n, 2 * c + 1, p) = out.at(n, c, p);
        }
      }
    }
    step.result_channels = result ? 2 * half : 0;
    std::vector<int64_t> entries;
    for (int64_t c = 0; c < half; ++c) {
      entries.push_back(stride == 2 ? c : -1 - planes_[static_cast<size_t>(c)]);
      entries.push_back(step.proj_channels + c);
    }
    if (result) step.result_table = table(entries);
    step.out_buffer = last ? kNoBuffer : stride == 2 && buffer == 0 ? 1 : stride == 2 ? 0 : buffer;
    if (!last) {
      std::vector<int64_t> fresh, after;
      if (stride == 2) rooms_.push_back(0);
      for (int64_t i = 0; i < step.proj_channels + half; ++i) fresh.push_back(rooms_.back()++);
      std::reverse(fresh.begin(), fresh.end());
      step.out_table = table(fresh);
      for (int64_t c = 0; c < half; ++c) {
        after.push_back(stride == 2 ? fresh[static_cast<size_t>(c)]
                                    : planes_[static_cast<size_t>(c)]);
        after.push_back(fresh[static_cast<size_t>(step.proj_channels + c)]);
      }
      planes_ = after;
    }
    add(step, static_cast<int64_t>(rooms_.size()) - 1, std::move(joined));
    header_.halvings += stride == 2;
  }
};

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
