// What deviates from the paper's unit: activations, windows, gates, branches of fewer layers.
#include <numeric>

#include "cpu_plan_testing.h"

namespace {

constexpr int64_t kIn = 20, kMid = 29, kReduced = 7, kOut = 41;

struct TestLayer {
  std::vector<float> weights, bias;
  TestActivation act;
};

// import; pw, dw and pw; a gate; dw alone; pw alone; a shortcut from the gate's result; export.
struct Deviant {
  Packer packer{DType::kFloat32, {}, {}, {}};
  int64_t stride, window, dilation;
  TestLayer pw1, dw1, pw2, reduce, expand, dw2, pw3;
  TestActivation gated, added;

  TestActivation activation(Activation kind, int64_t channels) {
    const bool sloped = kind == Activation::kLeakyRelu || kind == Activation::kPrelu;
    return {kind, sloped ? random(channels, 0.3f) : std::vector<float>{}};
  }

  snv2::Layer add(TestActivation& act, int64_t outputs, Activation kind) {
    act = activation(kind, outputs);
    snv2::Layer packed{0, static_cast<int64_t>(kind), 0};
    if (!act.slopes.empty()) {
      packed.slopes = static_cast<int64_t>(packer.weights.size());
      packer.weights.insert(packer.weights.end(), act.slopes.begin(), act.slopes.end());
      packer.weights.resize(packed.slopes + snv2::panels_of(outputs) * 16);
    }
    return packed;
  }

  snv2::Layer add(TestLayer& layer, int64_t outputs, int64_t depth, Activation kind) {
    layer.weights = random(outputs * depth, 0.4f / std::sqrt(static_cast<float>(depth)) + 0.1f);
    layer.bias = random(outputs);
    snv2::Layer packed = add(layer.act, outputs, kind);
    packed.weights = packer.add_weights(layer.weights, layer.bias);
    return packed;
  }

  int64_t table(int64_t count, int64_t first = 0) {
    std::vector<int64_t> entries(static_cast<size_t>(count));
    std::iota(entries.begin(), entries.end(), first);
    return packer.add_table(entries);
  }

  Step& step(StepKind kind) {
    packer.steps.emplace_back();
    packer.steps.back().kind = kind;
    packer.steps.back().stride = 1;
    return packer.steps.back();
  }

  Deviant(Activation kind, int64_t stride_, int64_t window_, int64_t dilation_)
      : stride(stride_), window(window_), dilation(dilation_) {
    const int64_t out_panels = snv2::panels_of(kOut);
    packer.steps.reserve(8);
    Step& import = step(StepKind::kImport);
    import.new_buffer = 1, import.buffer_panels = snv2::panels_of(kIn);
    import.main.in_channels = import.main.out_channels = kIn;
    import.main.in_table = table(kIn);

    Step& unit = step(StepKind::kUnit);
    unit.stride = stride, unit.new_buffer = 1, unit.buffer_panels = 3 * out_panels;
    Branch& branch = unit.main;
    branch.parts = snv2::kExpand | snv2::kDepthwise | snv2::kProject;
    branch.in_channels = kIn, branch.in_table = table(kIn);
    branch.mid_channels = branch.depth = kMid, branch.table = table(kMid);
    branch.window = window, branch.dilation = dilation;
    branch.out_channels = kOut;
    branch.pw1 = add(pw1, kMid, kIn, kind);
    branch.dw = add(dw1, kMid, window * window, kind);
    branch.pw2 = add(pw2, kOut, kMid, kind);

    Branch& gate = step(StepKind::kGate).main;
    gate.in_channels = gate.out_channels = kOut, gate.mid_channels = kReduced;
    gate.in_table = table(kOut);
    gate.pw1 = add(reduce, kReduced, kOut, kind);
    gate.pw2 = add(expand, kOut, kReduced, Activation::kSigmoid);
    gate.dw = add(gated, kOut, kind);

    Branch& depthwise = step(StepKind::kUnit).main;
    depthwise.parts = snv2::kDepthwise;
    depthwise.in_channels = out_panels, depthwise.in_table = table(out_panels);
    depthwise.mid_channels = depthwise.out_channels = out_panels * 16;
    depthwise.out_panel = out_panels;
    depthwise.window = 3, depthwise.dilation = 1;
    depthwise.dw = add(dw2, out_panels * 16, 9, Activation::kIdentity);

    Branch& last = step(StepKind::kUnit).main;
    last.parts = snv2::kProject;
    last.in_channels = last.out_channels = kOut, last.out_panel = 2 * out_panels;
    last.in_table = table(kOut, out_panels * 16);
    last.pw2 = add(pw3, kOut, kOut, kind);

    Branch& shortcut = step(StepKind::kGate).main;
    shortcut.in_channels = shortcut.out_channels = shortcut.depth = kOut;
    shortcut.out_panel = 2 * out_panels;
    shortcut.table = packer.add_table(crossed());
    shortcut.dw = add(added, kOut, kind);

    Branch& leave = step(StepKind::kExport).main;
    leave.in_channels = leave.out_channels = kOut;
    leave.in_table = table(kOut, 2 * out_panels * 16);
  }

  // Planes of the first unit's result, in an order of their own.
  static std::vector<int64_t> crossed() {
    std::vector<int64_t> planes(kOut);
    for (int64_t i = 0; i < kOut; ++i) planes[i] = i * 17 % kOut;
    return planes;
  }

  std::vector<int64_t> words() const { return packer.words(kIn, kOut, stride - 1); }

  Values expected(const std::vector<float>& x, int64_t h, int64_t w) const {
    const int64_t oh = snv2::conv3x3_extent(h, stride), ow = snv2::conv3x3_extent(w, stride);
    const int64_t pixels = oh * ow;
    Values y = pw(Values(x.begin(), x.end()), pw1.weights, pw1.bias, h * w, pw1.act);
    y = dw(y, dw1.weights, dw1.bias, h, w, stride, window, dilation, dw1.act);
    y = pw(y, pw2.weights, pw2.bias, pixels, pw2.act);
    Values means;
    for (int64_t c = 0; c < kOut; ++c) {
      const auto plane = y.begin() + c * pixels;
      means.push_back(std::accumulate(plane, plane + pixels, 0.0) / static_cast<double>(pixels));
    }
    const Values scales = pw(pw(means, reduce.weights, reduce.bias, 1, reduce.act), expand.weights,
                             expand.bias, 1, expand.act);
    for (int64_t i = 0; i < kOut * pixels; ++i) y[i] = gated(y[i] * scales[i / pixels], i / pixels);
    const Values source = y;
    const std::vector<float> bias(dw2.bias.begin(), dw2.bias.begin() + kOut);
    y = pw(dw(y, dw2.weights, bias, oh, ow, 1), pw3.weights, pw3.bias, pixels, pw3.act);
    for (int64_t i = 0; i < kOut * pixels; ++i) {
      y[i] = added(y[i] + source[crossed()[i / pixels] * pixels + i % pixels], i / pixels);
    }
    return y;
  }
};

TEST(deviations_match_loops_for_any_number_of_threads) {
  const int64_t shapes[][2] = {{9, 14}, {23, 5}, {1, 1}, {4, 51}};
  const int64_t windows[][2] = {{3, 1}, {5, 1}, {7, 1}, {3, 2}, {9, 3}};
  for (int64_t i = 0; i < 20; ++i) {
    const auto kind = static_cast<Activation>(i % 9);
    const Deviant plan_of(kind, 1 + i / 9 % 2, windows[i % 5][0], windows[i % 5][1]);
    const int64_t h = shapes[i % 4][0], w = shapes[i % 4][1];
    const auto words = plan_of.words();
    const snv2::Plan plan(words.data(), static_cast<int64_t>(words.size()),
                          static_cast<int64_t>(plan_of.packer.weights.size()));
    Map x(2, kIn, h, w, Layout::kContiguous);
    x.randomize();
    const int64_t image = kIn * h * w;
    std::vector<Values> expected;
    for (int64_t n = 0; n < 2; ++n) {
      const auto from = x.values.begin() + n * image;
      expected.push_back(plan_of.expected({from, from + image}, h, w));
    }
    on_each_isa([&](const char* isa) {
      for (const int64_t threads : {1, 2, 5}) {
        const int64_t bytes = snv2::cpu::workspace_bytes(plan, 2, h, w, threads);
        std::vector<float> memory(static_cast<size_t>(bytes / 4), kNan);
        Map y(2, kOut, snv2::conv3x3_extent(h, plan_of.stride),
              snv2::conv3x3_extent(w, plan_of.stride), Layout::kContiguous);
        snv2::cpu::run_network(plan, plan_of.packer.weights.data(), x.map, y.map, memory.data(),
                               bytes, std_threads(threads));
        for (size_t k = 0; k < y.values.size(); ++k) {
          const double want = expected[k / expected[0].size()][k % expected[0].size()];
          CHECK(close(y.values[k], want, 10 + std::abs(want)), "%s, case %d, %d threads", isa,
                static_cast<int>(i), static_cast<int>(threads));
        }
      }
    });
  }
}

TEST(each_word_of_a_deviant_plan_is_checked) {
  const Deviant deviant(Activation::kPrelu, 2, 5, 2);
  const auto weight_count = static_cast<int64_t>(deviant.packer.weights.size());
  const auto refuses = [&](size_t step, auto&& change) {
    Packer packer = deviant.packer;
    change(packer.steps[step]);
    const auto words = packer.words(kIn, kOut, 1);
    CHECK_THROWS(snv2::Plan(words.data(), static_cast<int64_t>(words.size()), weight_count));
  };
  constexpr size_t kUnit = 1, kGate = 2, kAlone = 3, kLast = 4, kShortcut = 5;
  for (const int64_t window : {0, 1, 4, 33}) {
    refuses(kUnit, [&](Step& step) { step.main.window = window; });
  }
  for (const int64_t dilation : {0, 65}) {
    refuses(kUnit, [&](Step& step) { step.main.dilation = dilation; });
  }
  for (const int64_t parts : {0, 1, 4, 5, 8, 15}) {
    refuses(kUnit, [&](Step& step) { step.main.parts = parts; });
  }
  for (const int64_t activation : {-1, 9}) {
    refuses(kUnit, [&](Step& step) { step.main.pw1.activation = activation; });
    refuses(kUnit, [&](Step& step) { step.main.dw.activation = activation; });
    refuses(kGate, [&](Step& step) { step.main.pw2.activation = activation; });
    refuses(kLast, [&](Step& step) { step.main.pw2.activation = activation; });
    refuses(kGate, [&](Step& step) { step.main.dw.activation = activation; });
  }
  for (const int64_t slopes : {int64_t{-1}, weight_count - 31, weight_count}) {
    refuses(kUnit, [&](Step& step) { step.main.pw1.slopes = slopes; });
    refuses(kUnit, [&](Step& step) { step.main.dw.slopes = slopes; });
    refuses(kUnit, [&](Step& step) { step.main.pw2.slopes = slopes; });
    refuses(kLast, [&](Step& step) { step.main.pw2.slopes = slopes; });
    refuses(kShortcut, [&](Step& step) { step.main.dw.slopes = slopes; });
  }
  refuses(kGate, [](Step& step) { step.new_buffer = 1, step.buffer_panels = 9; });
  refuses(kGate, [](Step& step) { step.main.mid_channels = -1; });
  refuses(kGate, [](Step& step) { step.main.out_panel = 7; });
  refuses(kGate, [](Step& step) { step.main.out_channels = 32; });  // of which it reads 41
  refuses(kGate, [&](Step& step) { step.main.pw1.slopes = weight_count; });
  for (const int64_t depth : {int64_t{-1}, kOut - 1, kOut + 1}) {
    refuses(kShortcut, [&](Step& step) { step.main.depth = depth; });
  }
  refuses(kShortcut, [](Step& step) { step.main.table = -1; });
  refuses(kShortcut, [](Step& step) { step.main.out_panel = 0; });  // what it adds lies there
  refuses(kShortcut, [&](Step& step) { step.main.table = 0, step.main.out_panel = 1; });
  refuses(kAlone, [](Step& step) { step.main.mid_channels = kOut; });
  refuses(kAlone, [](Step& step) { step.main.out_channels = kOut; });
  refuses(kAlone, [](Step& step) { step.main.depth = 1; });
  refuses(kAlone, [](Step& step) { step.main.in_table = 0, step.main.in_channels = 12; });
  refuses(kLast, [](Step& step) { step.stride = 2, step.new_buffer = 1, step.buffer_panels = 9; });
  refuses(kLast, [](Step& step) { step.main.depth = 1; });
  refuses(kLast, [](Step& step) { step.main.out_panel = 7; });
  refuses(kLast, [](Step& step) { step.projection.in_channels = 1; });
}

}  // namespace
