// Units in pieces on the emulator: what of a branch is missing, gates, and maps that leave planes.
#include "gpu_stages.h"

namespace snv2::SNV2_GPU {
namespace {

// A map between two steps.
struct Held {
  Map map;
  int64_t buffer, room;
  std::vector<int64_t> planes;
};

class Pieces : public WrittenPlan {
 public:
  using WrittenPlan::WrittenPlan;

  Held copy(Map x) {
    GpuStep step = step_of(GpuStepKind::kCopy, kCallersMap, x.channels);
    start(x);
    step.in_table = table(planes());
    rooms_.push_back(0);
    Held held{std::move(x), 0, 0, {}};
    write(step, held, 0);
    return held;
  }

  // A step of some parts, and the projection beside it if `first` is asked for. `window` is that of
  // its depthwise convolution.
  Held piece(Held& x, int64_t parts, int64_t stride, int64_t width, Held* first = nullptr) {
    GpuStep step = step_of(GpuStepKind::kUnit, x.buffer, x.map.channels);
    step.parts = parts;
    step.stride = stride;
    const std::vector<int64_t> read(x.planes.rbegin(), x.planes.rend());
    step.in_table = table(read);
    Map main = reversed(x.map);
    Held y{main, x.buffer, x.room, {}};
    if (stride == 2) {
      if (other_ < 0) {
        other_ = static_cast<int64_t>(rooms_.size());
        rooms_.push_back(0);
      }
      y.buffer = 1 - x.buffer, y.room = other_;
    }
    step.dw_window = step.proj_dw_window = {1, 1};
    if (parts & kExpand) {
      const int64_t mid = parts & kProject ? width + 5 : width;
      y.map = product(step.pw1_weights, step.pw1_bias, step.pw1_activation, main, mid);
    }
    step.mid_channels = y.map.channels;
    if (parts & kDepthwise) {
      y.map = convolved(step.dw, step.dw_window, step.dw_activation, y.map, stride);
    }
    if (parts & kProject) {
      y.map = product(step.pw2_weights, step.pw2_bias, step.pw2_activation, y.map, width);
    }
    step.out_channels = y.map.channels;
    if (first == nullptr) {
      write(step, y, 0);
      return y;
    }
    Map projected =
        convolved(step.proj_dw, step.proj_dw_window, step.proj_dw_activation, main, stride);
    step.proj_channels = width + 1;
    Held both{product(step.proj_weights, step.proj_bias, step.proj_activation, projected,
                      step.proj_channels),
              y.buffer,
              y.room,
              {}};
    write(step, y, step.proj_channels);
    both.planes.assign(y.planes.begin(), y.planes.begin() + step.proj_channels);
    y.planes.erase(y.planes.begin(), y.planes.begin() + step.proj_channels);
    *first = both;
    return y;
  }

  // last(x times expand(reduce(means of x)) + source), where x is; with width 0 nothing is scaled.
  void gate(Held& x, int64_t width, Activation reduce, Activation expand, Held* source = nullptr,
            Activation last = Activation::kIdentity) {
    const int64_t channels = x.map.channels, plane = x.map.height * x.map.width;
    std::vector<int64_t> read = x.planes;
    if (source != nullptr) read.insert(read.end(), source->planes.begin(), source->planes.end());
    GpuStep step = step_of(GpuStepKind::kGate, x.buffer, static_cast<int64_t>(read.size()));
    step.mid_channels = width;
    step.in_table = step.out_table = table(read);
    step.out_buffer = x.buffer;
    step.out_channels = channels;
    const After after_all = after(step.dw_activation, last, channels);
    std::vector<double> scales(static_cast<size_t>(x.map.batch * channels), 1.0);
    if (width > 0) scales = gates(step, x.map, reduce, expand);
    for (int64_t n = 0; n < x.map.batch; ++n) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t p = 0; p < plane; ++p) {
          const double value = x.map.at(n, c, p) * scales[static_cast<size_t>(n * channels + c)];
          const double added = source != nullptr ? source->map.at(n, c, p) : 0.0;
          x.map.at(n, c, p) = round(after_all(value + added, c));
        }
      }
    }
    add(step, x.room, x.map);
  }

  void result(const Held& x) {
    GpuStep step = step_of(GpuStepKind::kExport, x.buffer, x.map.channels);
    step.out_buffer = kNoBuffer;
    step.out_channels = step.result_channels = x.map.channels;
    step.in_table = table(x.planes);
    step.result = header_.result_count++;
    add(step, x.room, x.map);
  }

  void halved() { ++header_.halvings; }

 private:
  // [batch][channels] expand(reduce(means of x)).
  std::vector<double> gates(GpuStep& step, Map& x, Activation reduce, Activation expand) {
    const int64_t width = step.mid_channels, channels = x.channels, plane = x.height * x.width;
    const auto w1 = matrix(step.pw1_weights, width, channels);
    const auto b1 = floats(step.pw1_bias, width, padded_rows(width), 1);
    const After after1 = after(step.pw1_activation, reduce, width);
    const auto w2 = matrix(step.pw2_weights, channels, width);
    const auto b2 = floats(step.pw2_bias, channels, padded_rows(channels), 1);
    const After after2 = after(step.pw2_activation, expand, channels);
    std::vector<double> all;
    for (int64_t n = 0; n < x.batch; ++n) {
      std::vector<double> means, hidden;
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0;
        for (int64_t p = 0; p < plane; ++p) sum += x.at(n, c, p);
        means.push_back(sum / static_cast<double>(plane));
      }
      const auto row = [](const auto& w, const auto& b, const auto& v, int64_t r) {
        double sum = b[static_cast<size_t>(r)];
        for (size_t k = 0; k < v.size(); ++k)
          sum += w[static_cast<size_t>(r) * v.size() + k] * v[k];
        return sum;
      };
      for (int64_t r = 0; r < width; ++r) hidden.push_back(after1(row(w1, b1, means, r), r));
      for (int64_t c = 0; c < channels; ++c) all.push_back(after2(row(w2, b2, hidden, c), c));
    }
    return all;
  }

  static Map reversed(const Map& x) {
    Map y = x;
    Map& from = const_cast<Map&>(x);
    for (int64_t n = 0; n < x.batch; ++n) {
      for (int64_t c = 0; c < x.channels; ++c) {
        for (int64_t p = 0; p < x.height * x.width; ++p) {
          y.at(n, c, p) = from.at(n, x.channels - 1 - c, p);
        }
      }
    }
    return y;
  }

  Map product(int64_t& weights, int64_t& bias, GpuActivation& act, Map& x, int64_t rows) {
    const auto w = matrix(weights, rows, x.channels);
    const auto b = floats(bias, rows, padded_rows(rows), 1);
    return pointwise(x, w, b, rows, after(act, after_, rows));
  }
  Map convolved(int64_t& at, GpuWindow& window, GpuActivation& act, Map& x, int64_t stride) {
    window = window_;
    const int64_t count = x.channels * depthwise_floats(window.window);
    const auto w = floats(at, count, count, 1.2f / static_cast<float>(window.window));
    return depthwise(x, w, stride, after(act, after_, x.channels));
  }

  // To planes that nothing was written to before, `extra` of them for another map.
  void write(GpuStep step, Held& y, int64_t extra) {
    int64_t& room = rooms_[static_cast<size_t>(y.room)];
    for (int64_t i = 0; i < y.map.channels + extra; ++i) y.planes.push_back(room++);
    std::reverse(y.planes.begin(), y.planes.end());
    step.out_buffer = y.buffer;
    step.out_table = table(y.planes);
    add(step, y.room, y.map);
  }

  int64_t other_ = -1;  // the room that steps of stride 2 write to
};

// All parts that can be missing, at both strides; both buffers hold maps that are read.
void run_pieces(const Case& c) {
  Pieces plan(c);
  Held x = plan.copy(random_map(plan, c.batch, c.in, c.height, c.width));
  Held a = plan.piece(x, kExpand | kDepthwise, 1, c.half);
  Held b = plan.piece(a, kProject, 1, c.half + 3);
  plan.result(b);
  Held d = plan.piece(b, kDepthwise | kProject, 2, c.half);
  Held first = d;
  Held e = plan.piece(x, kDepthwise | kProject, 2, c.half, &first);
  plan.result(first);
  Held f = plan.piece(d, kDepthwise, 1, c.half);
  Held g = plan.piece(a, kExpand | kDepthwise, 2, c.half);
  plan.result(e);
  plan.result(f);
  plan.result(g);
  plan.halved();
  plan.run(c);
}

// Gates of planes that fit in shared memory and of those that do not, with a cluster or without.
void run_gates(Case c, int64_t reduced, Activation reduce, Activation expand) {
  Pieces plan(c);
  Held x = plan.copy(random_map(plan, c.batch, c.in, c.height, c.width));
  plan.gate(x, reduced, reduce, expand);
  plan.result(x);
  plan.run(c);
}

// The source is added to what was made of it, and stays as it is.
void run_shortcut(Case c, int64_t reduced, Activation last) {
  Pieces plan(c);
  Held x = plan.copy(random_map(plan, c.batch, c.in, c.height, c.width));
  Held y = plan.piece(x, kDepthwise, 1, 0);
  plan.gate(y, reduced, Activation::kRelu, Activation::kSigmoid, &x, last);
  plan.result(y);
  plan.result(x);
  plan.run(c);
}

}  // namespace

TEST(pieces_match_loops_wherever_weights_are) {
  for (const DType dtype : kDTypes) {
    for (const int64_t weights : {kResident, kDirect, kClustered}) {
      const Layout layout = weights == kDirect ? Layout::kChannelsLast : Layout::kContiguous;
      run_pieces({dtype, layout, 3, 10, 20, 9, 7, weights, 1, 0, 0, {3, 1}, Activation::kPrelu});
      run_pieces({dtype, layout, 2, 21, 40, 6, 10, weights, 16, 16, 2, {5, 1}});
    }
  }
}
TEST(pieces_of_odd_extents_match_loops) {
  for (const int64_t weights : {kResident, kClustered}) {
    run_pieces({DType::kFloat16, Layout::kContiguous, 2, 3, 17, 1, 1, weights, 1});
    run_pieces({DType::kFloat32, Layout::kContiguous, 3, 16, 32, 2, 11, weights, 4, 0, 0, {3, 2}});
    run_pieces({DType::kFloat16, Layout::kChannelsLast, 4, 7, 16, 11, 2, weights, 1, 16, 1});
  }
}
TEST(gates_match_loops) {
  for (const DType dtype : kDTypes) {
    for (const int64_t sms : {1, 132}) {
      const auto layout = sms == 1 ? Layout::kContiguous : Layout::kChannelsLast;
      run_gates({dtype, layout, 3, 45, 0, 7, 7, 0, sms}, 11, Activation::kRelu,
                Activation::kSigmoid);
      run_gates({dtype, layout, 2, 130, 0, 5, 9, 0, sms}, 33, Activation::kPrelu,
                Activation::kHardsigmoid);
      run_gates({dtype, layout, 1, 3, 0, 1, 1, 0, sms}, 1, Activation::kHardswish,
                Activation::kSigmoid);
    }
  }
}
TEST(shortcuts_match_loops) {
  for (const DType dtype : kDTypes) {
    for (const int64_t sms : {1, 132}) {  // with 132 an image has more than one CTA
      const auto layout = sms == 1 ? Layout::kChannelsLast : Layout::kContiguous;
      for (const int64_t reduced : {0, 11}) {
        run_shortcut({dtype, layout, 3, 45, 0, 7, 7, 0, sms}, reduced, Activation::kRelu);
        run_shortcut({dtype, layout, 2, 66, 0, 5, 9, 0, sms}, reduced, Activation::kPrelu);
        run_shortcut({dtype, layout, 5, 3, 0, 1, 1, 0, sms}, reduced, Activation::kIdentity);
      }
    }
  }
}
TEST(shortcuts_of_large_planes_match_loops) {
  run_shortcut({DType::kFloat32, Layout::kContiguous, 1, 20, 0, 90, 90, 0, 1}, 5,
               Activation::kHardswish);
  run_shortcut({DType::kFloat16, Layout::kContiguous, 2, 20, 0, 83, 91, 0, 1}, 5,
               Activation::kRelu);
}
TEST(gates_before_an_activation_match_loops) {
  for (const int64_t reduced : {0, 5}) {
    const Case c{DType::kFloat16, Layout::kContiguous, 3, 21, 0, 7, 5, 0, 1};
    Pieces plan(c);
    Held x = plan.copy(random_map(plan, c.batch, c.in, c.height, c.width));
    plan.gate(x, reduced, Activation::kRelu, Activation::kSigmoid, nullptr, Activation::kPrelu);
    plan.result(x);
    plan.run(c);
  }
}
TEST(gates_of_large_planes_match_loops) {
  // 16 planes of 90 x 90 take more than an SM has.
  run_gates({DType::kFloat32, Layout::kContiguous, 1, 20, 0, 90, 90, 0, 1}, 5, Activation::kRelu,
            Activation::kSigmoid);
  run_gates({DType::kFloat16, Layout::kContiguous, 2, 20, 0, 83, 91, 0, 1}, 5, Activation::kSilu,
            Activation::kHardsigmoid);
}

}  // namespace snv2::SNV2_GPU
