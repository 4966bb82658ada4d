// The stand-alone ops of the CPU backend against loops in double.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cpu_testing.h"
#include "gradient_loops.h"

namespace {

double dw_at(Map& x, int64_t n, int64_t c, int64_t oy, int64_t ox, int64_t stride, const float* w) {
  double sum = 0;
  for (int64_t tap = 0; tap < 9; ++tap) {
    const int64_t y = oy * stride + tap / 3 - 1, xx = ox * stride + tap % 3 - 1;
    if (y < 0 || xx < 0 || y >= x.map.height || xx >= x.map.width) continue;
    sum += double{x.at(n, c, y, xx)} * w[tap];
  }
  return sum;
}

struct Size {
  int64_t n, c, h, w;
};

// The last are of several groups of channels, and of blocks of rows in each layout.
constexpr Size kSizes[] = {{1, 58, 28, 28}, {2, 29, 7, 7},   {3, 1, 1, 1},   {1, 17, 15, 9},
                           {2, 16, 2, 3},   {1, 5, 1, 13},   {0, 4, 5, 5},   {1, 33, 13, 1},
                           {2, 70, 5, 4},   {1, 6, 40, 300}, {1, 4, 1030, 7}};
constexpr Layout kLayouts[] = {Layout::kContiguous, Layout::kChannelsLast};

TEST(depthwise_ops_match_loops) {
  on_each_isa([](const char* isa) {
    for (const Size& size : kSizes) {
      for (const Layout layout : kLayouts) {
        for (const int64_t stride : {1, 2}) {
          Map x(size.n, size.c, size.h, size.w, layout);
          x.randomize();
          Map y(size.n, size.c, snv2::conv3x3_extent(size.h, stride),
                snv2::conv3x3_extent(size.w, stride), layout);
          const auto w = random(size.c * 9), scale = random(size.c), shift = random(size.c);
          const snv2::Depthwise3x3 dw{w.data(), scale.data(), shift.data(), stride, stride == 2};
          snv2::cpu::dw_conv3x3(x.map, dw, y.map, std_threads(3));
          for (int64_t n = 0; n < size.n; ++n)
            for (int64_t c = 0; c < size.c; ++c)
              for (int64_t i = 0; i < y.map.plane(); ++i) {
                const int64_t oy = i / y.map.width, ox = i % y.map.width;
                double expected = dw_at(x, n, c, oy, ox, stride, &w[c * 9]) * scale[c] + shift[c];
                if (dw.relu) expected = std::max(expected, 0.0);
                CHECK(close(y.at(n, c, oy, ox), expected, 10), "%s", isa);
              }
        }
      }
    }
  });
}

TEST(split_op_matches_loops) {
  on_each_isa([](const char* isa) {
    for (const Size& size : kSizes) {
      for (const Layout layout : kLayouts) {
        Map x(size.n, 2 * size.c, size.h, size.w, layout);
        x.randomize();
        Map y(size.n, 2 * size.c, size.h, size.w, layout);
        const auto w = random(size.c * 9), scale = random(size.c), shift = random(size.c);
        snv2::cpu::split_dw_cat_shuffle(x.map, {w.data(), scale.data(), shift.data(), 1, true},
                                        y.map, std_threads(2));
        for (int64_t n = 0; n < size.n; ++n)
          for (int64_t c = 0; c < size.c; ++c)
            for (int64_t i = 0; i < y.map.plane(); ++i) {
              const int64_t oy = i / size.w, ox = i % size.w;
              const double main = dw_at(x, n, size.c + c, oy, ox, 1, &w[c * 9]);
              CHECK(y.at(n, 2 * c, oy, ox) == x.at(n, c, oy, ox), "%s", isa);
              CHECK(
                  close(y.at(n, 2 * c + 1, oy, ox), std::max(main * scale[c] + shift[c], 0.0), 10),
                  "%s", isa);
            }
      }
    }
  });
}

// A depthwise convolution with a 1 in the middle only converts to float and back.
bool all_close(const std::vector<float>& actual, const std::vector<double>& expected) {
  double scale = 1;
  for (const double value : expected) scale = std::max(scale, std::abs(value));
  for (size_t i = 0; i < actual.size(); ++i) {
    if (!close(actual[i], expected[i], scale)) return false;
  }
  return true;
}

TEST(gradients_match_loops) {
  on_each_isa([](const char* isa) {
    for (const Size& size : kSizes) {
      for (const Layout layout : kLayouts) {
        for (const int64_t stride : {0, 1, 2}) {  // 0: split_dw_cat_shuffle
          const int64_t unit = stride == 0 ? 2 : 1, pass = (unit - 1) * size.c;
          const int64_t step = std::max<int64_t>(stride, 1);
          Map x(size.n, unit * size.c, size.h, size.w, layout);
          Map grad(size.n, unit * size.c, snv2::conv3x3_extent(size.h, step),
                   snv2::conv3x3_extent(size.w, step), layout);
          Map grad_x(size.n, unit * size.c, size.h, size.w, layout);
          x.randomize();
          grad.randomize();
          const auto w = random(size.c * 9), scale = random(size.c), shift = random(size.c);
          const snv2::Depthwise3x3 dw{w.data(), scale.data(), shift.data(), step, stride != 1};
          std::vector<float> weight_out(w.size()), scale_out(scale.size()), shift_out(shift.size()),
              workspace(
                  static_cast<size_t>(snv2::cpu::depthwise_backward_workspace(x.map, size.c)));
          const auto run = stride == 0 ? snv2::cpu::split_dw_cat_shuffle_backward
                                       : snv2::cpu::dw_conv3x3_backward;
          run(grad.map, x.map, dw, grad_x.map,
              {weight_out.data(), scale_out.data(), shift_out.data()}, workspace.data(),
              std_threads(3));
          const GradientLoops expected(
              size.n, size.c, size.h, size.w, dw,
              [&](int64_t n, int64_t c, int64_t row, int64_t column) {
                return double{x.at(n, pass + c, row, column)};
              },
              [&](int64_t n, int64_t c, int64_t row, int64_t column) {
                return double{grad.at(n, unit * c + unit - 1, row, column)};
              });
          CHECK(all_close(weight_out, expected.weight), "%s", isa);
          CHECK(all_close(scale_out, expected.scale), "%s", isa);
          CHECK(all_close(shift_out, expected.shift), "%s", isa);
          for (int64_t i = 0; i < x.map.numel(); ++i) {
            const int64_t plane = i / x.map.plane(), pixel = i % x.map.plane();
            const int64_t n = plane / x.map.channels, c = plane % x.map.channels;
            const int64_t row = pixel / size.w, column = pixel % size.w;
            if (c < pass) {
              CHECK(grad_x.at(n, c, row, column) == grad.at(n, 2 * c, row, column), "%s", isa);
              continue;
            }
            const auto at = static_cast<size_t>((n * size.c + c - pass) * size.h * size.w + pixel);
            CHECK(close(grad_x.at(n, c, row, column), expected.x[at], 10), "%s", isa);
          }
        }
      }
    }
  });
}

TEST(every_half_survives_conversion) {
  on_each_isa([](const char* isa) {
    for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
      std::vector<uint16_t> in(65536), out(65536);
      for (uint32_t i = 0; i < 65536; ++i) in[i] = static_cast<uint16_t>(i);
      const float w[9] = {0, 0, 0, 0, 1, 0, 0, 0, 0}, one = 1, zero = -0.0f;
      // 1 x 1 planes, so that no tap multiplies an infinity by zero
      std::vector<float> weights, scale(65536, one), shift(65536, zero);
      for (int i = 0; i < 65536; ++i) weights.insert(weights.end(), w, w + 9);
      const FeatureMap x{in.data(), dtype, Layout::kContiguous, 1, 65536, 1, 1};
      const FeatureMap y{out.data(), dtype, Layout::kContiguous, 1, 65536, 1, 1};
      snv2::cpu::dw_conv3x3(x, {weights.data(), scale.data(), shift.data(), 1, false}, y, {});
      const uint16_t exponent = dtype == DType::kFloat16 ? 0x7c00 : 0x7f80;
      for (uint32_t i = 0; i < 65536; ++i) {
        const bool nan = (i & 0x7fff) > exponent, zero_in = (i & 0x7fff) == 0;
        const bool same = zero_in ? (out[i] & 0x7fff) == 0 : out[i] == i;
        CHECK(nan ? (out[i] & 0x7fff) > exponent : same, "%s: %x became %x", isa, i, out[i]);
      }
    }
  });
}

TEST(rounding_is_to_nearest_even) {
  on_each_isa([](const char* isa) {
    struct Case {
      DType dtype;
      float scale;  // of the input 1
      uint16_t expected;
    };
    const Case cases[] = {
        {DType::kFloat16, 1.0f + 0x1p-11f, 0x3c00},      // tie, to even
        {DType::kFloat16, 1.0f + 3 * 0x1p-11f, 0x3c02},  // tie, to even
        {DType::kFloat16, 1.0f + 0x1p-11f + 0x1p-20f, 0x3c01},
        {DType::kFloat16, 65519.0f, 0x7bff},
        {DType::kFloat16, 65520.0f, 0x7c00},
        {DType::kFloat16, 0x1p-25f, 0x0000},  // tie with zero
        {DType::kFloat16, 0x1.8p-25f, 0x0001},
        {DType::kFloat16, 0x1p-14f - 0x1p-26f, 0x0400},  // subnormal to normal
        {DType::kBFloat16, 1.0f + 0x1p-8f, 0x3f80},
        {DType::kBFloat16, 1.0f + 3 * 0x1p-8f, 0x3f82},
        {DType::kBFloat16, 3.4028235e38f, 0x7f80},
    };
    for (const Case& c : cases) {
      uint16_t in = c.dtype == DType::kFloat16 ? 0x3c00 : 0x3f80, out = 0;
      const float w[9] = {0, 0, 0, 0, 1, 0, 0, 0, 0}, shift = 0;
      const FeatureMap x{&in, c.dtype, Layout::kContiguous, 1, 1, 1, 1};
      const FeatureMap y{&out, c.dtype, Layout::kContiguous, 1, 1, 1, 1};
      snv2::cpu::dw_conv3x3(x, {w, &c.scale, &shift, 1, false}, y, {});
      CHECK(out == c.expected, "%s: %a became %x", isa, c.scale, out);
    }
  });
}

TEST(arguments_that_do_not_fit_are_refused) {
  Map a(1, 4, 3, 3, Layout::kContiguous), b(1, 4, 3, 2, Layout::kContiguous);
  Map y(1, 8, 3, 3, Layout::kContiguous), z(1, 8, 3, 3, Layout::kChannelsLast);
  CHECK_THROWS(snv2::cpu::cat_shuffle(a.map, b.map, y.map, {}));
  CHECK_THROWS(snv2::cpu::cat_shuffle(a.map, a.map, z.map, {}));
  CHECK_THROWS(snv2::cpu::cat_shuffle_backward(y.map, a.map, b.map, {}));
  const std::vector<float> p(36, 1.0f);
  CHECK_THROWS(snv2::cpu::dw_conv3x3(a.map, {p.data(), p.data(), p.data(), 3, false}, a.map, {}));
  CHECK_THROWS(snv2::cpu::dw_conv3x3(a.map, {p.data(), p.data(), p.data(), 2, false}, a.map, {}));
  CHECK(!snv2::cpu::set_isa("quantum"));
}

#if defined(SNV2_RUN_BY_EMULATOR) && defined(__aarch64__)
// Tests on each instruction set would pass by one that is missing.
TEST(the_emulated_processor_has_each_instruction_set) {
  std::string names;
  on_each_isa([&](const char* isa) { names += std::string(isa) + " "; });
  CHECK(names == "neon_bf16 neon_dot neon ", "%s", names.c_str());
}
#endif

}  // namespace

int main() { return run_all_tests(); }
