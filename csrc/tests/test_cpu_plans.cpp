// Plans of the CPU backend against loops in double.
#include <cstddef>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "cpu_plan_testing.h"

namespace {

// Two entries of +-1/2 in each row, so that a unit's results have at most two bits more than its
// input.
std::vector<float> few_bits(int64_t rows, int64_t columns) {
  std::vector<float> weights(static_cast<size_t>(rows * columns));
  for (int64_t row = 0; row < rows; ++row)
    for (int i = 0; i < 2; ++i) {
      weights[row * columns + static_cast<int64_t>(generator() % columns)] =
          generator() % 2 ? 0.5f : -0.5f;
    }
  return weights;
}

// One tap of +-1 in each.
std::vector<float> one_tap(int64_t channels) {
  std::vector<float> weights(static_cast<size_t>(channels * 9));
  for (int64_t c = 0; c < channels; ++c) {
    weights[c * 9 + static_cast<int64_t>(generator() % 9)] = generator() % 2 ? 1.0f : -1.0f;
  }
  return weights;
}

std::vector<float> halves(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = 0.5f * (static_cast<float>(generator() % 3) - 1.0f);
  return values;
}

double same(double value) { return value; }

// Rounded to bfloat16, halves to even.
double rounded(double value) {
  if (value == 0 || std::isnan(value)) return value;
  int exponent;
  const double mantissa = std::frexp(value, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, 8)), exponent - 8);
}

Values each(double (*f)(double), Values values) {
  for (double& value : values) value = f(value);
  return values;
}

// A stage by hand. Of bfloat16 its sums are numbers of float32: c must be a multiple of 8 then, in
// even.
struct Stage {
  Packer packer;
  int64_t channels;  // in and out
  // Results with maps rounded by `round` where they are stored.
  Values expected(const std::vector<float>& x, int64_t h, int64_t w,
                  double (*round)(double) = same) const;

  struct Unit {
    std::vector<float> w1, b1, wd, bd, w2, b2, pd, pbd, pw, pb;
  };
  std::vector<Unit> units;

  explicit Stage(int64_t in, int64_t c, DType element = DType::kFloat32)
      : packer{element, {}, {}, {}}, channels(2 * c) {
    const bool exact = element == DType::kBFloat16;
    const auto matrix = [&](int64_t rows, int64_t columns) {
      return exact ? few_bits(rows, columns) : random(rows * columns, 0.2f);
    };
    const auto bias = [&](int64_t count) { return exact ? halves(count) : random(count); };
    const auto taps = [&](int64_t count) {
      return exact ? one_tap(count) : random(count * 9, 0.3f);
    };
    const auto zeros_if_exact = [&](int64_t count) {
      return exact ? std::vector<float>(static_cast<size_t>(count)) : random(count);
    };
    const auto range = [](int64_t first, int64_t count) {
      std::vector<int64_t> entries;
      for (int64_t i = 0; i < count; ++i) entries.push_back(first + i);
      return entries;
    };
    const int64_t panels = snv2::panels_of(c);
    Step import{};
    import.kind = StepKind::kImport;
    import.new_buffer = 1, import.buffer_panels = snv2::panels_of(in);
    import.main.in_channels = import.main.out_channels = in;
    import.main.in_table = packer.add_table(range(0, in));
    packer.steps.push_back(import);
    std::vector<int64_t> table = range(0, in);
    for (int i = 0; i < 3; ++i) {
      const int64_t k = i == 0 ? in : c;
      Unit u{matrix(c, k), bias(c), taps(c), zeros_if_exact(c), matrix(c, c), bias(c), {},
             {},           {},      {}};
      Step step{};
      step.kind = StepKind::kUnit;
      step.stride = i == 0 ? 2 : 1;
      const std::vector<int64_t> main(i == 0 ? table.begin() : table.begin() + c, table.end());
      std::vector<int64_t> columns;
      Branch& branch = step.main;
      branch.parts = snv2::kExpand | snv2::kDepthwise | snv2::kProject;
      branch.window = 3, branch.dilation = 1;
      branch.dw.activation = kIdentity;
      branch.in_table = packer.add_table(packer.gather(main, columns));
      branch.in_channels = k / packer.planes();
      branch.mid_channels = branch.out_channels = c;
      branch.pw1.weights = packer.add_product(u.w1, u.b1, columns);
      branch.dw.weights = packer.add_weights(u.wd, u.bd);
      branch.table = packer.add_table(packer.gather(range(0, c), columns));
      branch.depth = snv2::ceil_div(c, packer.planes());
      branch.pw2.weights = packer.add_product(u.w2, u.b2, range(0, c));
      std::vector<int64_t> first(table.begin(), table.begin() + (i == 0 ? 0 : c));
      if (i == 0) {
        step.new_buffer = 1, step.buffer_panels = 4 * panels;
        u.pd = taps(in), u.pbd = zeros_if_exact(in);
        u.pw = matrix(c, in), u.pb = bias(c);
        Branch& projection = step.projection;
        projection = branch;
        projection.pw1 = {};
        projection.parts = snv2::kDepthwise | snv2::kProject;
        projection.in_channels = snv2::panels_of(in), projection.out_channels = c;
        projection.mid_channels = projection.in_channels * 16;
        projection.depth = in / packer.planes();
        projection.in_table = packer.add_table(range(0, projection.in_channels));
        projection.table = packer.add_table(packer.gather(range(0, in), columns));
        auto spread = u.pd, shift = u.pbd;
        spread.resize(projection.mid_channels * 9), shift.resize(projection.mid_channels);
        projection.dw.weights = packer.add_weights(spread, shift);
        projection.pw2.weights = packer.add_product(u.pw, u.pb, columns);
        first = range(0, c);
      }
      branch.out_panel = (i + 1) * panels;
      packer.steps.push_back(step);
      table.clear();
      for (int64_t j = 0; j < c; ++j) {
        table.push_back(first[j]);
        table.push_back(branch.out_panel * 16 + j);
      }
      units.push_back(u);
    }
    Step leave{};
    leave.kind = StepKind::kExport;
    leave.main.in_channels = leave.main.out_channels = 2 * c;
    leave.main.in_table = packer.add_table(table);
    packer.steps.push_back(leave);
  }
};

Values Stage::expected(const std::vector<float>& x, int64_t h, int64_t w,
                       double (*round)(double)) const {
  const auto stored = [&](const Values& values) { return each(round, values); };
  Values map(x.begin(), x.end());
  for (size_t i = 0; i < units.size(); ++i) {
    const Unit& u = units[i];
    const int64_t stride = i == 0 ? 2 : 1;
    const int64_t oh = snv2::conv3x3_extent(h, stride), ow = snv2::conv3x3_extent(w, stride);
    const size_t half = i == 0 ? 0 : map.size() / 2;
    const Values main(map.begin() + half, map.end());
    const Values mid = stored(dw(pw(main, u.w1, u.b1, h * w), u.wd, u.bd, h, w, stride));
    const Values b = stored(pw(mid, u.w2, u.b2, oh * ow));
    const Values a = i == 0 ? stored(pw(stored(dw(map, u.pd, u.pbd, h, w, 2)), u.pw, u.pb, oh * ow))
                            : Values(map.begin(), map.begin() + half);
    map.clear();
    for (int64_t c = 0; c < channels / 2; ++c) {
      for (const Values* from : {&a, &b}) {
        map.insert(map.end(), from->begin() + c * oh * ow, from->begin() + (c + 1) * oh * ow);
      }
    }
    h = oh, w = ow;
  }
  return map;
}

TEST(stage_matches_loops_for_any_number_of_threads) {
  struct Case {
    int64_t in, c, n, h, w;
  };
  for (const Case& s : {Case{24, 58, 1, 17, 20},
                        {20, 29, 5, 7, 7},
                        {3, 116, 2, 14, 13},
                        {5, 3, 1, 1, 1},
                        {16, 40, 1, 2, 1},
                        {9, 41, 1, 9, 5}}) {
    const Stage stage(s.in, s.c);
    const auto words = stage.packer.words(s.in, 2 * s.c, 1);
    const snv2::Plan plan(words.data(), static_cast<int64_t>(words.size()),
                          static_cast<int64_t>(stage.packer.weights.size()));
    Map x(s.n, s.in, s.h, s.w, Layout::kContiguous);
    x.randomize();
    const int64_t image = s.in * s.h * s.w;
    std::vector<Values> expected;
    for (int64_t n = 0; n < s.n; ++n) {
      expected.push_back(stage.expected(
          {x.values.begin() + n * image, x.values.begin() + (n + 1) * image}, s.h, s.w));
    }
    on_each_isa([&](const char* isa) {
      for (const int64_t threads : {1, 2, 3, 8}) {
        const int64_t bytes = snv2::cpu::workspace_bytes(plan, s.n, s.h, s.w, threads);
        std::vector<float> memory(static_cast<size_t>(bytes / 4), kNan);
        Map y(s.n, 2 * s.c, (s.h + 1) / 2, (s.w + 1) / 2, Layout::kContiguous);
        for (const auto pool : {std_threads, one_thread, late_threads}) {
          std::fill(memory.begin(), memory.end(), kNan);
          Map y(s.n, 2 * s.c, (s.h + 1) / 2, (s.w + 1) / 2, Layout::kContiguous);
          snv2::cpu::run_network(plan, stage.packer.weights.data(), x.map, y.map, memory.data(),
                                 bytes, pool(threads));
          for (int64_t n = 0; n < s.n; ++n)
            for (size_t i = 0; i < expected[n].size(); ++i) {
              const double want = expected[n][i];
              CHECK(close(y.values[n * expected[n].size() + i], want, 10 + std::abs(want)),
                    "%s, %d threads", isa, static_cast<int>(threads));
            }
        }
        CHECK_THROWS(snv2::cpu::run_network(plan, stage.packer.weights.data(), x.map, y.map,
                                            memory.data(), bytes - 64, std_threads(threads)));
      }
    });
  }
}

// Numbers of eight bits, as many as bfloat16 has.
std::vector<float> eight_bits(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) {
    value = 0x1p-7f * (static_cast<float>(generator() % 511) - 255.0f);
  }
  return values;
}

// Float32 has all sums on the way, so that nothing is rounded but stored maps, and the results are
// equal. Half of what a stored number has beyond eight bits lies in the middle of two.
TEST(bfloat16_stage_equals_loops_for_any_number_of_threads) {
  struct Case {
    int64_t in, c, n, h, w;
  };
  for (const Case& s : {Case{24, 56, 1, 17, 20},
                        {20, 40, 5, 7, 7},
                        {2, 104, 2, 14, 13},
                        {6, 8, 1, 1, 1},
                        {16, 64, 3, 2, 1},
                        {34, 24, 1, 5, 31}}) {
    const Stage stage(s.in, s.c, DType::kBFloat16);
    const auto words = stage.packer.words(s.in, 2 * s.c, 1);
    const snv2::Plan plan(words.data(), static_cast<int64_t>(words.size()),
                          static_cast<int64_t>(stage.packer.weights.size()));
    const int64_t image = s.in * s.h * s.w;
    std::vector<float> input = eight_bits(s.n * image);
    if (s.h > 9) input[0] = kNan;
    std::vector<uint16_t> x, y(s.n * 2 * s.c * ((s.h + 1) / 2) * ((s.w + 1) / 2));
    for (const float value : input) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      x.push_back(static_cast<uint16_t>(bits >> 16));
    }
    const FeatureMap x_map{x.data(), DType::kBFloat16, Layout::kContiguous, s.n, s.in, s.h, s.w};
    const FeatureMap y_map{y.data(), DType::kBFloat16, Layout::kContiguous, s.n,
                           2 * s.c,  (s.h + 1) / 2,    (s.w + 1) / 2};
    on_each_isa([&](const char* isa) {
      for (const int64_t threads : {1, 2, 3, 8}) {
        const int64_t bytes = snv2::cpu::workspace_bytes(plan, s.n, s.h, s.w, threads);
        std::vector<float> memory(static_cast<size_t>(bytes / 4), kNan);
        std::fill(y.begin(), y.end(), 0x5555);
        const auto run = [&] {
          snv2::cpu::run_network(plan, stage.packer.weights.data(), x_map, y_map, memory.data(),
                                 bytes, std_threads(threads));
        };
        if (!snv2::cpu::has_bfloat16()) {
          CHECK_THROWS(run());
          continue;
        }
        run();
        for (int64_t n = 0; n < s.n; ++n) {
          const Values expected = stage.expected(
              {input.begin() + n * image, input.begin() + (n + 1) * image}, s.h, s.w, rounded);
          for (size_t i = 0; i < expected.size(); ++i) {
            const uint32_t bits = uint32_t{y[n * expected.size() + i]} << 16;
            float actual;
            std::memcpy(&actual, &bits, 4);
            const bool same = std::isnan(expected[i]) ? std::isnan(actual) : actual == expected[i];
            CHECK(same, "%s, %d threads: %f, not %f", isa, static_cast<int>(threads), actual,
                  expected[i]);
          }
        }
      }
    });
  }
}

TEST(results_on_the_way) {
  Stage stage(20, 29);
  const auto words = stage.packer.words(20, 58, 1);
  // The map as it was imported is a result, and the last one twice.
  Step first = stage.packer.steps.back();
  first.main.in_table = stage.packer.steps[0].main.in_table;
  first.main.in_channels = first.main.out_channels = 20;
  stage.packer.steps.insert(stage.packer.steps.begin() + 1, first);
  stage.packer.steps.push_back(Step(stage.packer.steps.back()));
  const auto tapped_words = stage.packer.words(20, 58, 1);
  const auto plan_of = [&](const std::vector<int64_t>& words) {
    return snv2::Plan(words.data(), static_cast<int64_t>(words.size()),
                      static_cast<int64_t>(stage.packer.weights.size()));
  };
  const snv2::Plan plain = plan_of(words), tapped = plan_of(tapped_words);
  CHECK(plain.result_count() == 1 && tapped.result_count() == 3);
  const float* const weights = stage.packer.weights.data();
  Map x(3, 20, 9, 7, Layout::kContiguous), y(3, 58, 5, 4, Layout::kContiguous);
  x.randomize();
  for (const int64_t threads : {1, 2, 4}) {
    const int64_t bytes = snv2::cpu::workspace_bytes(tapped, 3, 9, 7, threads);
    std::vector<float> memory(static_cast<size_t>(bytes / 4), kNan);
    snv2::cpu::run_network(plain, weights, x.map, y.map, memory.data(), bytes,
                           std_threads(threads));
    Map copy(3, 20, 9, 7, Layout::kContiguous);
    Map one(3, 58, 5, 4, Layout::kContiguous), other(3, 58, 5, 4, Layout::kContiguous);
    const auto run = [&](const std::vector<snv2::FeatureMap>& results) {
      snv2::cpu::run_network(tapped, weights, x.map, results.data(),
                             static_cast<int64_t>(results.size()), memory.data(), bytes,
                             std_threads(threads));
    };
    run({copy.map, one.map, other.map});
    CHECK(copy.values == x.values && one.values == y.values && other.values == y.values);
    CHECK_THROWS(run({copy.map, one.map}));
    CHECK_THROWS(run({one.map, copy.map, other.map}));
  }
}

TEST(broken_plans_are_refused) {
  CHECK_THROWS(snv2::Plan(nullptr, 0, 0));
  for (const DType element : {DType::kFloat32, DType::kBFloat16}) {
    const Stage stage(20, element == DType::kFloat32 ? 29 : 32, element);
    check_broken_plans(stage.packer, stage.packer.words(20, stage.channels, 1));
  }
}

TEST(kernel_times_are_of_the_calls_between) {
  const Stage stage(20, 29);
  const auto words = stage.packer.words(20, 58, 1);
  const float* const weights = stage.packer.weights.data();
  const snv2::Plan plan(words.data(), static_cast<int64_t>(words.size()),
                        static_cast<int64_t>(stage.packer.weights.size()));
  Map x(2, 20, 9, 9, Layout::kContiguous), y(2, 58, 5, 5, Layout::kContiguous);
  x.randomize();
  const int64_t bytes = snv2::cpu::workspace_bytes(plan, 2, 9, 9, 2);
  std::vector<float> memory(static_cast<size_t>(bytes / 4));
  const auto run = [&] {
    snv2::cpu::run_network(plan, weights, x.map, y.map, memory.data(), bytes, std_threads(2));
  };
  on_each_isa([&](const char* isa) {
    snv2::cpu::start_kernel_times();
    run();
    snv2::cpu::start_kernel_times();
    run();
    CHECK(std::strcmp(snv2::cpu::isa(), isa) == 0);
    const auto times = snv2::cpu::stop_kernel_times();
    for (const Step& step : stage.packer.steps) {
      if (step.kind != StepKind::kUnit) continue;
      const auto begins = [&](const snv2::cpu::KernelTime& time) {
        return time.weights == weights + step.main.pw1.weights && time.calls == 2;
      };
      CHECK(std::count_if(times.begin(), times.end(), begins) == 1, "%s", isa);
    }
    for (const snv2::cpu::KernelTime& time : times) CHECK(time.nanoseconds > 0);
    run();
    CHECK(snv2::cpu::stop_kernel_times().empty());
    CHECK(snv2::cpu::run_multiply_adds(1000) >= 1000);
    if (snv2::cpu::has_bfloat16()) {
      CHECK(snv2::cpu::run_multiply_adds(1000, DType::kBFloat16) >= 1000);
    } else {
      CHECK_THROWS(snv2::cpu::run_multiply_adds(1000, DType::kBFloat16));
    }
  });
}

}  // namespace
