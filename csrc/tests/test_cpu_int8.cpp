// Plans of integers against loops, exactly.
//
// Multipliers are powers of two and offsets multiples of an eighth, so that nothing but the
// rounding to bytes is rounded, and halves are met often.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu_plan_testing.h"

namespace {

using Bytes = std::vector<uint8_t>;  // [C][H][W]

uint8_t byte_of(float value) {
  return static_cast<uint8_t>(std::nearbyint(std::min(std::max(value, 0.0f), 255.0f)));
}

struct Integers {
  int64_t outputs;
  int64_t depth;  // 9 of a depthwise layer
  std::vector<int> weights;
  std::vector<float> multipliers, offsets;

  // Of random numbers, whose results are mostly between 0 and 255, and at times beyond.
  Integers(int64_t outputs, int64_t depth)
      : outputs(outputs), depth(depth), weights(outputs * depth) {
    for (int& weight : weights) weight = static_cast<int>(generator() % 255) - 127;
    // Pairs of the largest, whose products with the largest and least bytes are the largest.
    for (int64_t k = 0; k < depth; ++k) weights[k] = k % 4 < 2 ? -127 : 127;
    for (int64_t o = 0; o < outputs; ++o) {
      const int shift = static_cast<int>(std::log2(30.0 * std::sqrt(static_cast<double>(depth))));
      multipliers.push_back(std::ldexp(1.0f, -shift - static_cast<int>(generator() % 2)));
      offsets.push_back(static_cast<float>(generator() % 1600) / 8.0f - 40.0f);
    }
  }

  float value(int64_t o, int64_t sum) const {
    return static_cast<float>(sum) * multipliers[o] + offsets[o];
  }
};

Bytes pointwise(const Bytes& x, const Integers& layer, int64_t pixels) {
  Bytes y;
  for (int64_t o = 0; o < layer.outputs; ++o)
    for (int64_t p = 0; p < pixels; ++p) {
      int64_t sum = 0;
      for (int64_t k = 0; k < layer.depth; ++k) {
        sum += x[k * pixels + p] * layer.weights[o * layer.depth + k];
      }
      y.push_back(byte_of(layer.value(o, sum)));
    }
  return y;
}

Bytes depthwise(const Bytes& x, const Integers& layer, int64_t h, int64_t w, int64_t stride) {
  const int64_t oh = snv2::conv3x3_extent(h, stride), ow = snv2::conv3x3_extent(w, stride);
  Bytes y;
  for (int64_t c = 0; c < layer.outputs; ++c)
    for (int64_t p = 0; p < oh * ow; ++p) {
      int64_t sum = 0;
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t yy = p / ow * stride + tap / 3 - 1, xx = p % ow * stride + tap % 3 - 1;
        if (yy < 0 || xx < 0 || yy >= h || xx >= w) continue;
        sum += x[(c * h + yy) * w + xx] * layer.weights[c * 9 + tap];
      }
      y.push_back(byte_of(layer.value(c, sum)));
    }
  return y;
}

// Steps as the packing code makes them.
struct IntegerPacker {
  Packer packer{DType::kUint8, {}, {}, {}};

  // Row by row the output that it holds, and word by word four columns, of which -1 is none.
  int64_t add(const Integers& layer, const std::vector<int64_t>& rows,
              const std::vector<int64_t>& columns) {
    const auto depth = static_cast<int64_t>(columns.size()) / 4;
    const auto count = static_cast<int64_t>(rows.size());
    const auto first = static_cast<int64_t>(packer.weights.size());
    packer.weights.resize(first + snv2::packed_floats(count, depth, DType::kUint8));
    for (int64_t i = 0; i < count; ++i) {
      if (rows[i] < 0) continue;
      float* const panel = &packer.weights[first + i / 16 * (depth + 3) * 16 + i % 16];
      panel[0] = layer.multipliers[rows[i]], panel[16] = layer.offsets[rows[i]];
      int32_t sum = 0;
      for (int64_t k = 0; k < layer.depth; ++k) sum += layer.weights[rows[i] * layer.depth + k];
      std::memcpy(panel + 32, &sum, 4);
      for (int64_t k = 0; k < depth; ++k) {
        int8_t word[4] = {};
        for (int j = 0; j < 4; ++j) {
          const int64_t column = columns[4 * k + j];
          if (column >= 0) {
            word[j] = static_cast<int8_t>(layer.weights[rows[i] * layer.depth + column]);
          }
        }
        std::memcpy(panel + (k + 3) * 16, word, 4);
      }
    }
    return first;
  }
  int64_t add_taps(const Integers& layer, const std::vector<int64_t>& rows) {
    return add(layer, rows, {0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1});
  }
  int64_t add_floats(const std::vector<float>& values) {
    packer.weights.insert(packer.weights.end(), values.begin(), values.end());
    return static_cast<int64_t>(packer.weights.size() - values.size());
  }
  // Every word with one of these planes, and the column in each of its four places.
  static std::vector<int64_t> gather(const std::vector<int64_t>& planes,
                                     std::vector<int64_t>& columns) {
    std::vector<int64_t> words;
    columns.clear();
    for (const int64_t plane : planes) words.push_back(plane - plane % 4);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    for (const int64_t word : words)
      for (int64_t i = 0; i < 4; ++i) {
        const auto found = std::find(planes.begin(), planes.end(), word + i);
        columns.push_back(found == planes.end() ? -1 : found - planes.begin());
      }
    return words;
  }
};

std::vector<int64_t> range(int64_t first, int64_t count) {
  std::vector<int64_t> entries;
  for (int64_t i = 0; i < count; ++i) entries.push_back(first + i);
  return entries;
}

struct Unit {
  Integers pw1, dw, pw2, side_dw, side_pw;
};

// Import, a unit of stride 2, two of stride 1, export: floats that are bytes times an eighth
// less 3.
struct IntegerStage {
  IntegerPacker p;
  int64_t channels;
  std::vector<Unit> units;

  IntegerStage(int64_t in, int64_t c) : channels(2 * c) {
    const int64_t panels = snv2::panels_of(c);
    Step import{};
    import.kind = StepKind::kImport;
    import.new_buffer = 1, import.buffer_panels = snv2::panels_of(in);
    import.main.in_channels = import.main.out_channels = in;
    import.main.in_table = p.packer.add_table(range(0, in));
    std::vector<float> conversion(2 * in, 8.0f);
    std::fill(conversion.begin() + in, conversion.end(), 24.0f);
    import.main.dw.weights = p.add_floats(conversion);
    p.packer.steps.push_back(import);
    std::vector<int64_t> table = range(0, in);
    for (int i = 0; i < 3; ++i) {
      const int64_t k = i == 0 ? in : c;
      const Unit u{{c, k}, {c, 9}, {c, c}, {in, 9}, {c, in}};
      Step step{};
      step.kind = StepKind::kUnit;
      step.stride = i == 0 ? 2 : 1;
      const std::vector<int64_t> main(i == 0 ? table.begin() : table.begin() + c, table.end());
      std::vector<int64_t> columns;
      const auto words_of = [&](const std::vector<int64_t>& planes) {
        return IntegerPacker::gather(planes, columns);
      };
      Branch& branch = step.main;
      branch.parts = snv2::kExpand | snv2::kDepthwise | snv2::kProject;
      branch.window = 3, branch.dilation = 1;
      const auto read = words_of(main);
      branch.in_channels = static_cast<int64_t>(read.size());
      branch.in_table = p.packer.add_table(read);
      branch.mid_channels = branch.out_channels = c;
      branch.pw1.weights = p.add(u.pw1, range(0, c), columns);
      branch.dw.activation = kIdentity;
      branch.dw.weights = p.add_taps(u.dw, range(0, c));
      const auto middle = words_of(range(0, c));
      branch.depth = static_cast<int64_t>(middle.size());
      branch.table = p.packer.add_table(middle);
      branch.pw2.weights = p.add(u.pw2, range(0, c), columns);
      std::vector<int64_t> first(table.begin(), table.begin() + (i == 0 ? 0 : c));
      if (i == 0) {
        step.new_buffer = 1, step.buffer_panels = 4 * panels;
        Branch& side = step.projection;
        side.parts = snv2::kDepthwise | snv2::kProject;
        side.window = 3, side.dilation = 1;
        side.in_channels = snv2::panels_of(in);
        side.in_table = p.packer.add_table(range(0, side.in_channels));
        side.mid_channels = side.in_channels * 16, side.out_channels = c;
        std::vector<int64_t> rows = range(0, in);
        rows.resize(side.mid_channels, -1);
        side.dw.activation = kIdentity;
        side.dw.weights = p.add_taps(u.side_dw, rows);
        const auto words = words_of(range(0, in));
        side.depth = static_cast<int64_t>(words.size());
        side.table = p.packer.add_table(words);
        side.pw2.weights = p.add(u.side_pw, range(0, c), columns);
        first = range(0, c);
      }
      branch.out_panel = (i + 1) * panels;
      p.packer.steps.push_back(step);
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
    leave.main.in_table = p.packer.add_table(table);
    std::vector<float> back(4 * c, 0.125f);
    std::fill(back.begin() + 2 * c, back.end(), -3.0f);
    leave.main.dw.weights = p.add_floats(back);
    p.packer.steps.push_back(leave);
  }

  std::vector<int64_t> words(int64_t in) const { return p.packer.words(in, channels, 1); }

  Bytes expected(Bytes map, int64_t h, int64_t w) const {
    for (size_t i = 0; i < units.size(); ++i) {
      const Unit& u = units[i];
      const int64_t stride = i == 0 ? 2 : 1;
      const int64_t pixels = h * w;
      const int64_t oh = snv2::conv3x3_extent(h, stride), ow = snv2::conv3x3_extent(w, stride);
      const size_t half = i == 0 ? 0 : map.size() / 2;
      const Bytes main(map.begin() + half, map.end());
      const Bytes branch =
          pointwise(depthwise(pointwise(main, u.pw1, pixels), u.dw, h, w, stride), u.pw2, oh * ow);
      const Bytes side = i == 0 ? pointwise(depthwise(map, u.side_dw, h, w, 2), u.side_pw, oh * ow)
                                : Bytes(map.begin(), map.begin() + half);
      map.clear();
      for (int64_t c = 0; c < channels / 2; ++c) {
        for (const Bytes* from : {&side, &branch}) {
          map.insert(map.end(), from->begin() + c * oh * ow, from->begin() + (c + 1) * oh * ow);
        }
      }
      h = oh, w = ow;
    }
    return map;
  }
};

TEST(integer_stage_equals_loops_for_any_number_of_threads) {
  struct Case {
    int64_t in, c, n, h, w;
  };
  for (const Case& s : {Case{24, 58, 1, 17, 20},
                        {20, 29, 5, 7, 7},
                        {3, 116, 2, 14, 13},
                        {5, 3, 1, 1, 1},
                        {16, 40, 1, 2, 1},
                        {9, 41, 1, 9, 55}}) {
    const IntegerStage stage(s.in, s.c);
    const auto words = stage.words(s.in);
    const std::vector<float>& weights = stage.p.packer.weights;
    const snv2::Plan plan(words.data(), static_cast<int64_t>(words.size()),
                          static_cast<int64_t>(weights.size()));
    Map x(s.n, s.in, s.h, s.w, Layout::kContiguous);
    const int64_t image = s.in * s.h * s.w;
    Bytes bytes;
    for (float& value : x.values) {
      const auto byte = static_cast<uint8_t>(generator() % 256);
      bytes.push_back(generator() % 2 ? byte : byte < 128 ? 0 : 255);
      value = static_cast<float>(bytes.back()) / 8.0f - 3.0f;
    }
    // What is beyond the ends becomes the nearest byte.
    x.values[0] = -1e30f, bytes[0] = 0;
    if (x.values.size() > 1) x.values[1] = 1e30f, bytes[1] = 255;
    on_each_isa([&](const char* isa) {
      for (const int64_t threads : {1, 2, 3, 8}) {
        const int64_t size = snv2::cpu::workspace_bytes(plan, s.n, s.h, s.w, threads);
        std::vector<float> memory(static_cast<size_t>(size / 4), kNan);
        Map y(s.n, 2 * s.c, (s.h + 1) / 2, (s.w + 1) / 2, Layout::kContiguous);
        snv2::cpu::run_network(plan, weights.data(), x.map, y.map, memory.data(), size,
                               std_threads(threads));
        for (int64_t n = 0; n < s.n; ++n) {
          const Bytes expected = stage.expected(
              {bytes.begin() + n * image, bytes.begin() + (n + 1) * image}, s.h, s.w);
          for (size_t i = 0; i < expected.size(); ++i) {
            const float want = static_cast<float>(expected[i]) / 8.0f - 3.0f;
            const float actual = y.values[n * expected.size() + i];
            CHECK(actual == want, "%s, %d threads, c %d: %f, not %f at %d", isa,
                  static_cast<int>(threads), static_cast<int>(s.c), actual, want,
                  static_cast<int>(i));
          }
        }
      }
    });
  }
}

// A stem and a head, whose features are means that are rounded once.
struct IntegerClassifier {
  static constexpr int64_t kIn = 3, kStem = 24, kFeatures = 41, kClasses = 19;
  IntegerPacker p;
  Integers stem{kStem, 9 * kIn}, features{kFeatures, kStem}, fc{kClasses, kFeatures};
  std::vector<float> factors, summands, padding;

  explicit IntegerClassifier(bool takes_bytes) {
    for (int64_t c = 0; c < kIn; ++c) {
      factors.push_back(takes_bytes ? 1.0f : 16.0f);
      summands.push_back(takes_bytes ? 0.0f : static_cast<float>(100 + c));
      padding.push_back(static_cast<float>(100 + c));
    }
    Step first{};
    first.kind = StepKind::kStem;
    first.new_buffer = 1, first.buffer_panels = snv2::panels_of(kStem);
    first.main.in_channels = kIn, first.main.out_channels = kStem;
    std::vector<int64_t> columns;
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t c = 0; c < 4; ++c) columns.push_back(c < kIn ? 9 * c + tap : -1);
    first.main.pw1.weights = p.add(stem, range(0, kStem), columns);
    first.main.dw.weights = p.add_floats(factors);
    p.add_floats(summands), p.add_floats(padding);
    Step head{};
    head.kind = StepKind::kHead;
    const auto words = IntegerPacker::gather(range(0, kStem), columns);
    head.main.in_channels = static_cast<int64_t>(words.size());
    head.main.in_table = p.packer.add_table(words);
    head.main.mid_channels = kFeatures, head.main.out_channels = kClasses;
    head.main.pw1.weights = p.add(features, range(0, kFeatures), columns);
    IntegerPacker::gather(range(0, kFeatures), columns);
    head.main.pw2.activation = kIdentity;
    head.main.pw2.weights = p.add(fc, range(0, kClasses), columns);
    p.packer.steps = {first, head};
  }

  std::vector<int64_t> words() const {
    std::vector<int64_t> result = p.packer.words(kIn, kClasses, 2);
    result[offsetof(snv2::PlanHeader, classify) / sizeof(int64_t)] = 1;
    return result;
  }

  std::vector<float> expected(const Bytes& x, int64_t h, int64_t w) const {
    const int64_t ch = snv2::conv3x3_extent(h, 2), cw = snv2::conv3x3_extent(w, 2);
    const int64_t ph = snv2::conv3x3_extent(ch, 2), pw = snv2::conv3x3_extent(cw, 2);
    Bytes pooled(kStem * ph * pw);
    for (int64_t o = 0; o < kStem; ++o)
      for (int64_t y = 0; y < ch; ++y)
        for (int64_t xx = 0; xx < cw; ++xx) {
          int64_t sum = 0;
          for (int64_t k = 0; k < 9 * kIn; ++k) {
            const int64_t c = k / 9, row = 2 * y + k % 9 / 3 - 1, column = 2 * xx + k % 3 - 1;
            const bool inside = row >= 0 && column >= 0 && row < h && column < w;
            const int64_t byte =
                inside ? x[(c * h + row) * w + column] : static_cast<int64_t>(padding[c]);
            sum += byte * stem.weights[o * 9 * kIn + k];
          }
          const uint8_t value = byte_of(stem.value(o, sum));
          // The windows that it is in.
          for (int64_t py = y / 2; py <= (y + 1) / 2 && py < ph; ++py)
            for (int64_t px = xx / 2; px <= (xx + 1) / 2 && px < pw; ++px) {
              uint8_t& most = pooled[(o * ph + py) * pw + px];
              most = std::max(most, value);
            }
        }
    const int64_t pixels = ph * pw;
    Bytes means;
    for (int64_t o = 0; o < kFeatures; ++o) {
      float sum = 0;
      for (int64_t p = 0; p < pixels; ++p) {
        int64_t product = 0;
        for (int64_t k = 0; k < kStem; ++k) {
          product += pooled[k * pixels + p] * features.weights[o * kStem + k];
        }
        sum += std::max(features.value(o, product), 0.0f);
      }
      means.push_back(byte_of(sum * (1.0f / static_cast<float>(pixels))));
    }
    std::vector<float> scores;
    for (int64_t o = 0; o < kClasses; ++o) {
      int64_t sum = 0;
      for (int64_t k = 0; k < kFeatures; ++k) sum += means[k] * fc.weights[o * kFeatures + k];
      scores.push_back(fc.value(o, sum));
    }
    return scores;
  }
};

TEST(integer_classifier_equals_loops_on_floats_and_bytes) {
  struct Case {
    int64_t n, h, w;
  };
  for (const Case& s : {Case{1, 33, 70}, {3, 12, 17}, {2, 1, 1}, {1, 47, 3}})
    for (const bool takes_bytes : {false, true})
      for (const Layout layout : {Layout::kContiguous, Layout::kChannelsLast}) {
        const IntegerClassifier net(takes_bytes);
        const auto words = net.words();
        const std::vector<float>& weights = net.p.packer.weights;
        const snv2::Plan plan(words.data(), static_cast<int64_t>(words.size()),
                              static_cast<int64_t>(weights.size()));
        Map x(s.n, 3, s.h, s.w, layout);
        Bytes bytes(x.values.size()), ordered;  // as x lies, and image by image [C][H][W]
        for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator() % 256);
        for (int64_t n = 0; n < s.n; ++n)
          for (int64_t c = 0; c < 3; ++c)
            for (int64_t p = 0; p < s.h * s.w; ++p) {
              const int64_t at =
                  n * 3 * s.h * s.w + c * x.map.channel_stride() + p * x.map.pixel_stride();
              ordered.push_back(bytes[at]);
              x.values[at] = (static_cast<float>(bytes[at]) - static_cast<float>(100 + c)) / 16.0f;
            }
        FeatureMap in = x.map;
        if (takes_bytes) in.data = bytes.data(), in.dtype = DType::kUint8;
        on_each_isa([&](const char* isa) {
          for (const int64_t threads : {1, 3}) {
            const int64_t size = snv2::cpu::workspace_bytes(plan, s.n, s.h, s.w, threads);
            std::vector<float> memory(static_cast<size_t>(size / 4), kNan);
            Map y(s.n, net.kClasses, 1, 1, Layout::kContiguous);
            snv2::cpu::run_network(plan, weights.data(), in, y.map, memory.data(), size,
                                   std_threads(threads));
            for (int64_t n = 0; n < s.n; ++n) {
              const int64_t image = 3 * s.h * s.w;
              const auto expected = net.expected(
                  {ordered.begin() + n * image, ordered.begin() + (n + 1) * image}, s.h, s.w);
              for (int64_t i = 0; i < net.kClasses; ++i) {
                CHECK(y.values[n * net.kClasses + i] == expected[i],
                      "%s, %d threads, bytes %d: %f, not %f", isa, static_cast<int>(threads),
                      takes_bytes, y.values[n * net.kClasses + i], expected[i]);
              }
            }
          }
        });
      }
}

TEST(bytes_go_into_whole_networks_of_integers_only) {
  const IntegerStage stage(8, 8);
  const auto words = stage.words(8);
  const snv2::Plan plan(words.data(), static_cast<int64_t>(words.size()),
                        static_cast<int64_t>(stage.p.packer.weights.size()));
  Bytes x(8 * 5 * 5);
  Map y(1, 16, 3, 3, Layout::kContiguous);
  const int64_t size = snv2::cpu::workspace_bytes(plan, 1, 5, 5, 1);
  std::vector<float> memory(static_cast<size_t>(size / 4));
  const FeatureMap in{x.data(), DType::kUint8, Layout::kChannelsLast, 1, 8, 5, 5};
  CHECK_THROWS(snv2::cpu::run_network(plan, stage.p.packer.weights.data(), in, y.map, memory.data(),
                                      size, one_thread(1)));
}

TEST(broken_plans_of_integers_are_refused) {
  const IntegerStage stage(20, 29);
  check_broken_plans(stage.p.packer, stage.words(20));
  const IntegerClassifier net(true);
  check_broken_plans(net.p.packer, net.words());
  // What no kernel of integers does.
  const auto refused = [&](const char* what, const auto& change) {
    Packer packer = stage.p.packer;
    change(packer.steps[1]);
    const auto words = packer.words(20, stage.channels, 1);
    bool threw = false;
    try {
      const snv2::Plan plan(words.data(), static_cast<int64_t>(words.size()),
                            static_cast<int64_t>(packer.weights.size()));
    } catch (const std::invalid_argument&) {
      threw = true;
    }
    CHECK(threw, "%s", what);
  };
  refused("window", [](Step& step) { step.main.window = 5; });
  refused("dilation", [](Step& step) { step.main.dilation = 2; });
  refused("activation",
          [](Step& step) { step.main.pw1.activation = static_cast<int64_t>(Activation::kSilu); });
}

}  // namespace
