// A stage of whole units, written beside what it computes: after a copy of the caller's map or from
// it, and before a head or not.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "gpu_stages.h"

namespace snv2::SNV2_GPU {

class Stage : public WrittenPlan {
 public:
  using WrittenPlan::WrittenPlan;

  // Adds the caller's map as planes, from the last one down.
  void copy(Map x) {
    start(std::move(x));
    GpuStep step = step_of(GpuStepKind::kCopy, kCallersMap, map().channels);
    step.in_table = table(planes_);
    std::reverse(planes_.begin(), planes_.end());
    step.out_table = table(planes_);
    rooms_.push_back(step.in_channels);
    add(step, 0, map());
  }

  // Adds a unit: of stride 2, or 1 with the second half as the main one, whose main branch
  // convolves `more` channels than it has. `last` leaves no planes.
  void unit(int64_t stride, int64_t half, bool result, bool last, int64_t more = 0) {
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
    const int64_t wide = half + more;
    step.mid_channels = wide;
    step.out_channels = half;
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
    const auto pw1 = matrix(step.pw1_weights, wide, in);
    const auto pw1_bias = floats(step.pw1_bias, wide, padded_rows(wide), 1);
    const auto dw = floats(step.dw, wide * dw_floats, wide * dw_floats, dw_scale);
    const auto pw2 = matrix(step.pw2_weights, half, wide);
    const auto pw2_bias = floats(step.pw2_bias, half, padded_rows(half), 1);
    Map mid = pointwise(main, pw1, pw1_bias, wide, after(step.pw1_activation, after_, wide));
    Map convolved = depthwise(mid, dw, stride, after(step.dw_activation, dw_kind, wide));
    Map out = pointwise(convolved, pw2, pw2_bias, half, after(step.pw2_activation, after_, half));
    Map first(x.batch, half, out.height, out.width);
    if (stride == 2) {
      const auto proj_dw = floats(step.proj_dw, in * dw_floats, in * dw_floats, dw_scale);
      const auto proj = matrix(step.proj_weights, half, in);
      auto proj_bias = floats(step.proj_bias, half, padded_rows(half), 1);
      if (infinite_) {
        proj_bias[0] = parameters_[static_cast<size_t>(step.proj_bias)] = kInf;
      }
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
      // Planes that hold nothing, as the packing gives them out.
      const auto taken = [&](int64_t plane) {
        return stride == 1 && std::find(planes_.begin(), planes_.end(), plane) != planes_.end();
      };
      for (int64_t plane = 0; static_cast<int64_t>(fresh.size()) < step.proj_channels + half;
           ++plane) {
        if (!taken(plane)) fresh.push_back(plane);
      }
      rooms_.back() = std::max(rooms_.back(), fresh.back() + 1);
      if (!infinite_) std::reverse(fresh.begin(), fresh.end());
      infinite_ = false;
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

  // From here on each step asks for as many planes as its buffer needs until then.
  void grow() { grows_ = true; }

  // The first channel that the next unit projects is infinite, and in the first plane.
  void next_is_infinite() { infinite_ = true; }

  // Adds a head, which ends the plan.
  void head(int64_t features, int64_t classes) {
    GpuStep step = step_of(GpuStepKind::kHead, steps_.back().out_buffer, map().channels);
    step.out_buffer = kNoBuffer;
    step.result = header_.result_count++;
    step.in_table = table(planes_);
    step.mid_channels = features;
    step.out_channels = classes;
    const auto pw1 = matrix(step.pw1_weights, features, step.in_channels);
    const auto pw1_bias = floats(step.pw1_bias, features, padded_rows(features), 1);
    const auto pw2 = matrix(step.pw2_weights, classes, features);
    const auto pw2_bias = floats(step.pw2_bias, classes, padded_rows(classes), 1);
    step.pw1_activation.kind = Activation::kRelu;
    Map y = pointwise(map(), pw1, pw1_bias, features, {Activation::kRelu, {}}, false);
    Map means(y.batch, features, 1, 1);
    const int64_t plane = y.height * y.width;
    for (int64_t n = 0; n < y.batch; ++n) {
      for (int64_t f = 0; f < features; ++f) {
        double sum = 0;
        for (int64_t p = 0; p < plane; ++p) sum += y.at(n, f, p);
        means.at(n, f, 0) = round(sum / static_cast<double>(plane));
      }
    }
    Map scores = pointwise(means, pw2, pw2_bias, classes, {Activation::kIdentity, {}});
    header_.classify = 1;
    add(step, static_cast<int64_t>(rooms_.size()) - 1, std::move(scores));
  }

 private:
  bool infinite_ = false;
};

}  // namespace snv2::SNV2_GPU
