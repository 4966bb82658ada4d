// cat_shuffle, dw_conv3x3 and split_dw_cat_shuffle on the emulator, against loops in double. All
// cases run on the kernels as they are, and some on copies with a fault (mutants.cmake).
#include "check.h"
#include "kernel_testing.h"

namespace snv2::emulated {
namespace {

struct Size {
  int64_t batch, channels, height, width;
};

struct Weights {
  std::vector<float> weight, scale, shift;
  Depthwise3x3 dw;

  Weights(int64_t channels, int64_t stride, bool relu, Random& random)
      : weight(random.values(channels * 9)),
        scale(random.values(channels)),
        shift(random.values(channels)),
        dw{weight.data(), scale.data(), shift.data(), stride, relu} {}
};

// Channel `c` of the convolution, which reads channel `source` of x.
double convolved(const TestMap& x, const Weights& w, int64_t n, int64_t c, int64_t source,
                 int64_t y0, int64_t x0) {
  double sum = 0.0;
  for (int64_t tap = 0; tap < 9; ++tap) {
    sum += static_cast<double>(w.weight[static_cast<size_t>(c * 9 + tap)]) *
           x.padded(n, source, y0 * w.dw.stride + tap / 3 - 1, x0 * w.dw.stride + tap % 3 - 1);
  }
  const double y = sum * w.scale[static_cast<size_t>(c)] + w.shift[static_cast<size_t>(c)];
  return w.dw.relu && y < 0.0 ? 0.0 : y;
}

std::string run_cat(DType dtype, Layout layout, const Size& s) {
  Random random(1);
  TestMap a(dtype, layout, s.batch, s.channels, s.height, s.width, 0);
  TestMap b(dtype, layout, s.batch, s.channels, s.height, s.width, 1);
  a.fill(random);
  b.fill(random);
  const TestMap out(dtype, layout, s.batch, 2 * s.channels, s.height, s.width, 3);
  cat_shuffle(a.map(), b.map(), out.map(), nullptr);
  return out.compare([&](int64_t n, int64_t c, int64_t y, int64_t x) {
    return (c % 2 == 0 ? a : b).at(n, c / 2, y, x);
  });
}

template <int64_t kStride>
std::string run_dw(DType dtype, Layout layout, const Size& s) {
  Random random(2);
  TestMap x(dtype, layout, s.batch, s.channels, s.height, s.width, 1);
  x.fill(random);
  const Weights w(s.channels, kStride, kStride == 2, random);
  const TestMap out(dtype, layout, s.batch, s.channels, conv3x3_extent(s.height, kStride),
                    conv3x3_extent(s.width, kStride), 2);
  dw_conv3x3(x.map(), w.dw, out.map(), nullptr);
  return out.compare([&](int64_t n, int64_t c, int64_t y0, int64_t x0) {
    return convolved(x, w, n, c, c, y0, x0);
  });
}

std::string run_split(DType dtype, Layout layout, const Size& s) {
  Random random(3);
  TestMap x(dtype, layout, s.batch, 2 * s.channels, s.height, s.width, 1);
  x.fill(random);
  const Weights w(s.channels, 1, true, random);
  const TestMap out(dtype, layout, s.batch, 2 * s.channels, s.height, s.width, 0);
  split_dw_cat_shuffle(x.map(), w.dw, out.map(), nullptr);
  return out.compare([&](int64_t n, int64_t c, int64_t y0, int64_t x0) {
    return c % 2 == 0 ? x.at(n, c / 2, y0, x0)
                      : convolved(x, w, n, c / 2, s.channels + c / 2, y0, x0);
  });
}

bool add_tests() {
  const struct {
    const char* name;
    std::string (*run)(DType, Layout, const Size&);
  } ops[] = {{"cat_shuffle", run_cat},
             {"dw_conv3x3", run_dw<1>},
             {"dw_conv3x3_stride2", run_dw<2>},
             {"split_dw_cat_shuffle", run_split}};
  const struct {
    const char* name;
    Layout layout;
  } layouts[] = {{"contiguous", Layout::kContiguous}, {"channels_last", Layout::kChannelsLast}};
  const struct {
    const char* name;
    Size size;
    bool all_dtypes;
  } sizes[] = {
      {"plane", {2, 5, 7, 9}, true},      {"point", {1, 3, 1, 1}, true},
      {"tiles", {2, 42, 14, 14}, false},   // several for each image
      {"pairs", {3, 44, 13, 10}, true},    // of channels, in words
      {"march", {1, 38, 40, 45}, true},    // down a strip, with a ring of rows
      {"strips", {1, 2, 96, 130}, false},  // too large for shared memory
      {"direct", {1, 1, 3, 8200}, false},  // not even three rows fit
  };
  const struct {
    const char* name;
    DType dtype;
  } dtypes[] = {
      {"float32", DType::kFloat32}, {"float16", DType::kFloat16}, {"bfloat16", DType::kBFloat16}};
  for (const auto& op : ops) {
    for (const auto& layout : layouts) {
      for (const auto& size : sizes) {
        for (const auto& dtype : dtypes) {
          if (!size.all_dtypes && dtype.dtype != DType::kFloat32) continue;
          all_tests().push_back(
              {std::string(op.name) + "/" + layout.name + "/" + size.name + "/" + dtype.name, [=] {
                 const std::string wrong = op.run(dtype.dtype, layout.layout, size.size);
                 CHECK(wrong.empty(), "%s", wrong.c_str());
               }});
        }
      }
    }
  }
  return true;
}

const bool tests_added = add_tests();

}  // namespace
}  // namespace snv2::emulated
