// Plans that are written step by step beside what the steps compute: loops in double that round
// where the kernels do.
#pragma once

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

constexpr int64_t kResident = 1, kDirect = 2, kClustered = 3;  // Tuning::weights

struct Case {
  DType dtype;
  Layout layout;
  int64_t batch, in, half, height, width;
  int64_t weights, sms;
  int64_t columns = 0, rows_per_cta = 0;
  GpuWindow window = {3, 1};
  Activation after = Activation::kRelu;  // every layer, but for ReLU after depthwise convolutions
  int64_t stages = 0;                    // Tuning::stages
  int64_t launches = 0;                  // that the plan takes; 0: one for each step

  std::string name() const {
    return "dtype " + std::to_string(static_cast<int>(dtype)) + " layout " +
           std::to_string(static_cast<int>(layout)) + " " + std::to_string(batch) + "x" +
           std::to_string(in) + "x" + std::to_string(height) + "x" + std::to_string(width) +
           " half " + std::to_string(half) + " weights " + std::to_string(weights) + " sms " +
           std::to_string(sms) + " columns " + std::to_string(columns) + " window " +
           std::to_string(window.window) + " dilation " + std::to_string(window.dilation) +
           " activation " + std::to_string(static_cast<int>(after)) + " stages " +
           std::to_string(stages);
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

// A plan as it is written, with what its steps compute.
class WrittenPlan {
 public:
  explicit WrittenPlan(const Case& c)
      : dtype_(c.dtype), window_(c.window), after_(c.after), rounding_(c.dtype, 1) {
    header_.magic = kGpuPlanMagic;
    header_.dtype = static_cast<int64_t>(c.dtype);
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

  // The activation of a layer of the plan, as a function.
  struct After {
    Activation kind;
    std::vector<float> slopes;

    double operator()(double x, int64_t row) const {
      switch (kind) {
        case Activation::kRelu:
          return std::max(x, 0.0);
        case Activation::kRelu6:
          return std::min(std::max(x, 0.0), 6.0);
        case Activation::kPrelu:
          return x > 0 ? x : x * slopes[static_cast<size_t>(row)];
        case Activation::kSilu:
          return x / (1 + std::exp(-x));
        case Activation::kHardswish:
          return x * std::min(std::max(x + 3, 0.0), 6.0) / 6;
        case Activation::kHardsigmoid:
          return std::min(std::max(x + 3, 0.0), 6.0) / 6;
        case Activation::kSigmoid:
          return 1 / (1 + std::exp(-x));
        default:
          return x;
      }
    }
  };
  After after(GpuActivation& act, Activation kind, int64_t rows) {
    act.kind = kind;
    if (kind != Activation::kPrelu) return {kind, {}};
    return {kind, floats(act.slopes, rows, padded_rows(rows), 0.5f)};
  }

  // after(w x + b), rounded or not; columns of w are channels of x.
  Map pointwise(Map& x, const std::vector<float>& w, const std::vector<float>& b, int64_t out,
                const After& after, bool rounds = true) {
    Map y(x.batch, out, x.height, x.width);
    for (int64_t n = 0; n < x.batch; ++n) {
      for (int64_t p = 0; p < x.height * x.width; ++p) {
        for (int64_t o = 0; o < out; ++o) {
          double sum = b[static_cast<size_t>(o)];
          for (int64_t k = 0; k < x.channels; ++k) {
            sum += w[static_cast<size_t>(o * x.channels + k)] * x.at(n, k, p);
          }
          y.at(n, o, p) = rounds ? round(after(sum, o)) : after(sum, o);
        }
      }
    }
    return y;
  }
  Map depthwise(Map& x, const std::vector<float>& w, int64_t stride, const After& after) {
    const int64_t window = window_.window, taps = window * window;
    Map y(x.batch, x.channels, conv3x3_extent(x.height, stride), conv3x3_extent(x.width, stride));
    for (int64_t n = 0; n < x.batch; ++n) {
      for (int64_t c = 0; c < x.channels; ++c) {
        for (int64_t p = 0; p < y.height * y.width; ++p) {
          double sum = w[static_cast<size_t>(c * (taps + 1) + taps)];
          for (int64_t k = 0; k < taps; ++k) {
            const int64_t row =
                p / y.width * stride + k / window * window_.dilation - window_.reach();
            const int64_t column =
                p % y.width * stride + k % window * window_.dilation - window_.reach();
            if (row < 0 || column < 0 || row >= x.height || column >= x.width) continue;
            sum += w[static_cast<size_t>(c * (taps + 1) + k)] * x.at(n, c, row * x.width + column);
          }
          y.at(n, c, p) = round(after(sum, c));
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

  static Device device(const Case& c) {
    Device device = device_of(c.sms);
    device.cluster = 8;
    device.tuning = {c.columns, c.rows_per_cta, c.weights, 0, c.stages};
    return device;
  }
  // As words of this object.
  GpuPlan plan() {
    header_.step_count = static_cast<int64_t>(steps_.size());
    for (size_t i = 0; i < steps_.size(); ++i) {
      steps_[i].out_planes = steps_[i].out_buffer == kNoBuffer ? 0
                             : grows_ ? grown_[i]
                                      : rooms_[static_cast<size_t>(room_of_[i])];
    }
    words_.clear();
    const auto append = [&](const void* from, int64_t count) {
      const auto* p = static_cast<const int64_t*>(from);
      words_.insert(words_.end(), p, p + count);
    };
    append(&header_, kGpuHeaderWords);
    for (const GpuStep& step : steps_) append(&step, kGpuStepWords);
    words_.insert(words_.end(), tables_.begin(), tables_.end());
    return GpuPlan(words_.data(), static_cast<int64_t>(words_.size()));
  }

  // Runs the plan, compares its results with what its steps compute, and returns them.
  std::vector<std::vector<float>> run(const Case& c) {
    const GpuPlan plan = this->plan();
    Elements weights(dtype_, weights_);
    Elements parameters(DType::kFloat32, parameters_);
    const std::vector<int32_t> tables(tables_.begin(), tables_.end());
    const PlanArrays arrays{weights.data(), static_cast<float*>(parameters.data()), tables.data()};
    const Device device = this->device(c);
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
    CHECK(emulator::counters().launches == (c.launches > 0 ? c.launches : header_.step_count), "%s",
          c.name().c_str());
    std::vector<std::vector<float>> all;
    for (size_t r = 0; r < results_.size(); ++r) {
      Map& map = maps_[static_cast<size_t>(results_[r])];
      double most = 0, worst = 0;
      all.emplace_back();
      for_each(map, c.layout, [&](int64_t at, double& value) {
        const float actual = (*outs[r])[at];
        all.back().push_back(actual);
        if (std::isnan(value) ? std::isnan(actual) : std::isinf(value) && actual == value) return;
        const double error = std::abs(actual - value);
        if (!std::isnan(value)) most = std::max(most, std::abs(value));
        worst = error <= worst ? worst : error;  // NaN is the worst
      });
      CHECK(worst <= 8 * half_unit(dtype_) * most, "%s: result %zu is off by %g of %g",
            c.name().c_str(), r, worst, most);
    }
    return all;
  }

  // Adds a step that writes to a room, and the map that it makes.
  void add(const GpuStep& step, int64_t room, Map map) {
    steps_.push_back(step);
    room_of_.push_back(room);
    grown_.push_back(rooms_.empty() ? 0 : rooms_[static_cast<size_t>(room)]);
    maps_.push_back(std::move(map));
    if (step.result == kNoResult) return;
    results_.push_back(static_cast<int64_t>(maps_.size()) - 1);
    header_.out_channels =
        step.kind == GpuStepKind::kHead ? step.out_channels : step.result_channels;
  }

 protected:
  static GpuStep step_of(GpuStepKind kind, int64_t buffer, int64_t channels) {
    GpuStep step{};
    step.kind = kind;
    step.stride = 1;
    step.in_buffer = buffer;
    step.in_channels = channels;
    step.out_channels = channels;
    step.result = kNoResult;
    return step;
  }
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
  GpuWindow window_;
  Activation after_;
  Elements rounding_;
  GpuPlanHeader header_{};
  std::vector<GpuStep> steps_;
  std::vector<float> weights_, parameters_;
  std::vector<int64_t> tables_;
  std::vector<int64_t> words_;
  std::vector<int64_t> planes_;
  std::vector<Map> maps_;         // before and after each step, in logical order
  std::vector<int64_t> results_;  // of maps_
  std::vector<int64_t> rooms_;    // planes of a buffer, for each step that starts one
  std::vector<int64_t> room_of_;  // of each step
  std::vector<int64_t> grown_;    // planes of its buffer after each step
  bool grows_ = false;            // whether steps ask for as many, not for those of all its steps
};

inline Map random_map(WrittenPlan& plan, int64_t n, int64_t c, int64_t h, int64_t w) {
  Map x(n, c, h, w);
  const std::vector<float> values = random(static_cast<int64_t>(x.values.size()));
  for (size_t i = 0; i < values.size(); ++i) x.values[i] = plan.round(values[i]);
  return x;
}

}  // namespace snv2::SNV2_GPU
