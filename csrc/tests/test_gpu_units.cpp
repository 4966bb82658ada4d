// Stages of units on the emulator, with weights in all places where they can be, against loops in
// double that round where the kernels do. Accuracy is a matter for the Python tests; these run
// under sanitizers.
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/network.h"
#include "emulator/emulator.h"
#include "gpu_ends.h"

namespace snv2::SNV2_GPU {
namespace {

constexpr int64_t kResident = 1, kDirect = 2, kClustered = 3;  // Tuning::weights

struct Case {
  DType dtype;
  Layout layout;
  int64_t batch, in, half, height, width;
  int64_t weights, sms;
  int64_t columns = 0, rows_per_cta = 0;

  std::string name() const {
    return "dtype " + std::to_string(static_cast<int>(dtype)) + " layout " +
           std::to_string(static_cast<int>(layout)) + " " + std::to_string(batch) + "x" +
           std::to_string(in) + "x" + std::to_string(height) + "x" + std::to_string(width) +
           " half " + std::to_string(half) + " weights " + std::to_string(weights) + " sms " +
           std::to_string(sms) + " columns " + std::to_string(columns);
  }
};

// A map [n][c][pixel] in double.
struct Map {
  int64_t batch, channels, height, width;
  std::vector<double> values;

  Map(int64_t n, int64_t c, int64_t h, int64_t w)
      : batch(n), channels(c), height(h), width(w), values(static_cast<size_t>(n * c * h * w)) {}
  double& at(int64_t n, int64_t c, int64_t p) {
    return values[static_cast<size_t>((n * channels + c) * height * width + p)];
  }
};

// A plan of a stage as it is written, with what its steps compute.
class Stage {
 public:
  explicit Stage(DType dtype) : dtype_(dtype), rounding_(dtype, 1) {
    header_.magic = kGpuPlanMagic;
    header_.dtype = static_cast<int64_t>(dtype);
  }

  float round(double value) {
    rounding_.set(0, static_cast<float>(value));
    return rounding_[0];
  }
  // A random matrix of the plan; returns its values.
  std::vector<float> matrix(int64_t& at, int64_t rows, int64_t depth) {
    at = header_.weight_count;
    header_.weight_count += packed_elements(rows, depth, dtype_);
    weights_.resize(static_cast<size_t>(header_.weight_count));
    std::vector<float> values = random(rows * depth, 1.5f / std::sqrt(static_cast<float>(depth)));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < depth; ++c) {
        float& value = values[static_cast<size_t>(r * depth + c)];
        value = round(value);
        weights_[static_cast<size_t>(at + packed_place(dtype_, depth, r, c))] = value;
      }
    }
    return values;
  }
  std::vector<float> floats(int64_t& at, int64_t count, int64_t padded, float scale) {
    at = header_.parameter_count;
    header_.parameter_count += ceil_div(padded, 4) * 4;
    const std::vector<float> values = random(count, scale);
    parameters_.insert(parameters_.end(), values.begin(), values.end());
    parameters_.resize(static_cast<size_t>(header_.parameter_count));
    return values;
  }
  int64_t table(const std::vector<int64_t>& entries) {
    const auto at = static_cast<int64_t>(tables_.size());
    tables_.insert(tables_.end(), entries.begin(), entries.end());
    return at;
  }

  // relu(w x + b), rounded; columns of w are channels of x.
  Map pointwise(Map& x, const std::vector<float>& w, const std::vector<float>& b, int64_t out) {
    Map y(x.batch, out, x.height, x.width);
    for (int64_t n = 0; n < x.batch; ++n) {
      for (int64_t p = 0; p < x.height * x.width; ++p) {
        for (int64_t o = 0; o < out; ++o) {
          double sum = b[static_cast<size_t>(o)];
          for (int64_t k = 0; k < x.channels; ++k) {
            sum += w[static_cast<size_t>(o * x.channels + k)] * x.at(n, k, p);
          }
          y.at(n, o, p) = round(std::max(sum, 0.0));
        }
      }
    }
    return y;
  }
  Map depthwise(Map& x, const std::vector<float>& w, int64_t stride) {
    Map y(x.batch, x.channels, conv3x3_extent(x.height, stride), conv3x3_extent(x.width, stride));
    for (int64_t n = 0; n < x.batch; ++n) {
      for (int64_t c = 0; c < x.channels; ++c) {
        for (int64_t p = 0; p < y.height * y.width; ++p) {
          double sum = w[static_cast<size_t>(c * kDepthwiseFloats + 9)];
          for (int64_t k = 0; k < 9; ++k) {
            const int64_t row = p / y.width * stride + k / 3 - 1;
            const int64_t column = p % y.width * stride + k % 3 - 1;
            if (row < 0 || column < 0 || row >= x.height || column >= x.width) continue;
            sum += w[static_cast<size_t>(c * kDepthwiseFloats + k)] *
                   x.at(n, c, row * x.width + column);
          }
          y.at(n, c, p) = round(sum);
        }
      }
    }
    return y;
  }

  // The map so far, in logical order, and the plane of each channel.
  Map& map() { return maps_.back(); }
  std::vector<int64_t>& planes() { return planes_; }

  void start(Map x) {
    header_.in_channels = x.channels;
    for (int64_t c = 0; c < x.channels; ++c) planes_.push_back(c);
    maps_.push_back(std::move(x));
  }

  // Adds a unit: of stride 2, or 1 with the second half as the main one. `last` leaves no planes.
  void unit(int64_t stride, int64_t half, bool result, bool last) {
    Map x = map();
    const int64_t buffer = steps_.empty() ? kCallersMap : steps_.back().out_buffer;
    const int64_t in = stride == 2 ? x.channels : half, skip = x.channels - in;
    GpuStep step{};
    step.kind = GpuStepKind::kUnit;
    step.stride = stride;
    step.in_buffer = buffer;
    step.result = result ? header_.result_count++ : kNoResult;
    step.in_channels = in;
    step.mid_channels = step.out_channels = half;
    step.proj_channels = stride == 2 ? half : 0;
    step.dw_window.window = 3;
    step.pw1_activation.kind = step.pw2_activation.kind = Activation::kRelu;
    if (stride == 2) {
      step.proj_dw_window.window = 3;
      step.proj_activation.kind = Activation::kRelu;
    }

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
    const auto dw = floats(step.dw, half * kDepthwiseFloats, half * kDepthwiseFloats, 0.4f);
    const auto pw2 = matrix(step.pw2_weights, half, half);
    const auto pw2_bias = floats(step.pw2_bias, half, padded_rows(half), 1);
    Map mid = pointwise(main, pw1, pw1_bias, half);
    Map convolved = depthwise(mid, dw, stride);
    Map out = pointwise(convolved, pw2, pw2_bias, half);
    Map first(x.batch, half, out.height, out.width);
    if (stride == 2) {
      const auto proj_dw = floats(step.proj_dw, in * kDepthwiseFloats, in * kDepthwiseFloats, 0.4f);
      const auto proj = matrix(step.proj_weights, half, in);
      const auto proj_bias = floats(step.proj_bias, half, padded_rows(half), 1);
      Map projected = depthwise(main, proj_dw, 2);
      first = pointwise(projected, proj, proj_bias, half);
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
    steps_.push_back(step);
    room_of_.push_back(static_cast<int64_t>(rooms_.size()) - 1);
    maps_.push_back(std::move(joined));
    if (result) results_.push_back(static_cast<int64_t>(maps_.size()) - 1);
    header_.halvings += stride == 2;
    header_.out_channels = 2 * half;
  }

  void run(const Case& c) {
    header_.step_count = static_cast<int64_t>(steps_.size());
    for (size_t i = 0; i < steps_.size(); ++i) {
      steps_[i].out_planes =
          steps_[i].out_buffer == kNoBuffer ? 0 : rooms_[static_cast<size_t>(room_of_[i])];
    }
    std::vector<int64_t> words;
    const auto append = [&](const void* from, int64_t count) {
      const auto* p = static_cast<const int64_t*>(from);
      words.insert(words.end(), p, p + count);
    };
    append(&header_, kGpuHeaderWords);
    for (const GpuStep& step : steps_) append(&step, kGpuStepWords);
    words.insert(words.end(), tables_.begin(), tables_.end());
    const GpuPlan plan(words.data(), static_cast<int64_t>(words.size()));

    Elements weights(dtype_, weights_);
    Elements parameters(DType::kFloat32, parameters_);
    const std::vector<int32_t> tables(tables_.begin(), tables_.end());
    const PlanArrays arrays{weights.data(), static_cast<float*>(parameters.data()), tables.data()};
    Device device = device_of(c.sms);
    device.cluster = 8;
    device.tuning = {c.columns, c.rows_per_cta, c.weights, 0};

    const auto map_of = [&](const Map& map, Elements& elements) {
      return FeatureMap{elements.data(), dtype_,     c.layout, map.batch,
                        map.channels,    map.height, map.width};
    };
    Elements x(dtype_, static_cast<int64_t>(maps_[0].values.size()), 1);
    for_each(maps_[0], c.layout,
             [&](int64_t at, double& value) { x.set(at, static_cast<float>(value)); });
    std::vector<std::unique_ptr<Elements>> outs;
    std::vector<FeatureMap> results;
    for (const int64_t i : results_) {
      const Map& map = maps_[static_cast<size_t>(i)];
      outs.push_back(
          std::make_unique<Elements>(dtype_, static_cast<int64_t>(map.values.size()), 1));
      results.push_back(map_of(map, *outs.back()));
    }
    Image image{};
    image.map = map_of(maps_[0], x);
    const int64_t bytes = workspace_bytes(plan, c.batch, c.height, c.width, device);
    Elements workspace(DType::kFloat32, bytes / 4);
    emulator::reset_counters();
    without_fault(c.name(), [&] {
      run_network(plan, arrays, image, results.data(), header_.result_count, workspace.data(),
                  bytes, device, nullptr);
    });
    CHECK(emulator::counters().launches == header_.step_count, "%s", c.name().c_str());
    for (size_t r = 0; r < results_.size(); ++r) {
      Map& map = maps_[static_cast<size_t>(results_[r])];
      double most = 0, worst = 0;
      for_each(map, c.layout, [&](int64_t at, double& value) {
        const double error = std::abs((*outs[r])[at] - value);
        most = std::max(most, std::abs(value));
        worst = error <= worst ? worst : error;  // NaN is the worst
      });
      CHECK(worst <= 8 * half_unit(dtype_) * most, "%s: result %zu is off by %g of %g",
            c.name().c_str(), r, worst, most);
    }
  }

 private:
  // Calls f(place in memory, value).
  template <class F>
  static void for_each(Map& map, Layout layout, const F& f) {
    const int64_t plane = map.height * map.width;
    for (int64_t n = 0; n < map.batch; ++n) {
      for (int64_t c = 0; c < map.channels; ++c) {
        for (int64_t p = 0; p < plane; ++p) {
          f(layout == Layout::kContiguous ? (n * map.channels + c) * plane + p
                                          : (n * plane + p) * map.channels + c,
            map.at(n, c, p));
        }
      }
    }
  }

  DType dtype_;
  Elements rounding_;
  GpuPlanHeader header_{};
  std::vector<GpuStep> steps_;
  std::vector<float> weights_, parameters_;
  std::vector<int64_t> tables_;
  std::vector<int64_t> planes_;
  std::vector<Map> maps_;         // before and after each step, in logical order
  std::vector<int64_t> results_;  // of maps_
  std::vector<int64_t> rooms_;    // planes of a buffer, for each stride-2 unit that starts one
  std::vector<int64_t> room_of_;  // of each step
};

// Two stages: a unit of stride 2 from the caller's tensor, one whose map is also a result; one of
// stride 2 and one between planes, and one to the caller's tensor.
void run_stage(const Case& c) {
  Stage stage(c.dtype);
  Map x(c.batch, c.in, c.height, c.width);
  const std::vector<float> values = random(static_cast<int64_t>(x.values.size()));
  for (size_t i = 0; i < values.size(); ++i) x.values[i] = stage.round(values[i]);
  stage.start(std::move(x));
  stage.unit(2, c.half, false, false);
  stage.unit(1, c.half, true, false);
  stage.unit(2, c.half + 3, false, false);
  stage.unit(1, c.half + 3, false, false);
  stage.unit(1, c.half + 3, true, true);
  stage.run(c);
}

}  // namespace

TEST(stages_match_loops_wherever_weights_are) {
  for (const DType dtype : kDTypes) {
    for (const int64_t weights : {kResident, kDirect, kClustered}) {
      for (const Layout layout : {Layout::kContiguous, Layout::kChannelsLast}) {
        run_stage({dtype, layout, 3, 10, 20, 13, 9, weights, 1});
        run_stage({dtype, layout, 2, 5, 40, 14, 14, weights, 16});
      }
    }
  }
}
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

}  // namespace snv2::SNV2_GPU
