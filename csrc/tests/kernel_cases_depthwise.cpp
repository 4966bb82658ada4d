// cat_shuffle, dw_conv3x3 and split_dw_cat_shuffle.
#include "kernel_cases.h"
#include "race_reports.h"

namespace snv2::emulated {
namespace {

struct Size {
  int64_t batch, channels, height, width;
};

enum class Op { kCat, kDw, kDwStride2, kSplit };

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

std::string run_dw(DType dtype, Layout layout, const Size& s, int64_t stride) {
  Random random(2);
  TestMap x(dtype, layout, s.batch, s.channels, s.height, s.width, 1);
  x.fill(random);
  const Weights w(s.channels, stride, stride == 2, random);
  const TestMap out(dtype, layout, s.batch, s.channels, conv3x3_extent(s.height, stride),
                    conv3x3_extent(s.width, stride), 2);
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

}  // namespace

std::vector<KernelCase> depthwise_cases() {
  const struct {
    Op op;
    const char* name;
  } ops[] = {{Op::kCat, "cat_shuffle"},
             {Op::kDw, "dw_conv3x3"},
             {Op::kDwStride2, "dw_conv3x3_stride2"},
             {Op::kSplit, "split_dw_cat_shuffle"}};
  const struct {
    DType dtype;
    const char* name;
  } dtypes[] = {
      {DType::kFloat32, "float32"}, {DType::kFloat16, "float16"}, {DType::kBFloat16, "bfloat16"}};
  // A thread costs ThreadSanitizer half a millisecond, so it gets few of them: none of `direct`,
  // where each goes its own way.
  const int64_t some = kTsan ? 1 : 2;
  const struct {
    const char* name;
    Size size;
    bool all_dtypes, for_tsan;
  } sizes[] = {
      {"plane", {2, 5, 7, 9}, true, true},         {"point", {1, 3, 1, 1}, true, true},
      {"tiles", {some, 42, 14, 14}, false, true},   // several for each image
      {"strips", {1, some, 96, 130}, false, true},  // too large for shared memory
      {"direct", {1, 1, 3, 8200}, false, false},    // not even three rows fit
  };
  std::vector<KernelCase> cases;
  for (const auto& op : ops) {
    for (const Layout layout : {Layout::kContiguous, Layout::kChannelsLast}) {
      for (const auto& size : sizes) {
        for (const auto& dtype : dtypes) {
          if (!size.all_dtypes && dtype.dtype != DType::kFloat32) continue;
          if (kTsan && !size.for_tsan) continue;
          const std::string name =
              std::string(op.name) +
              (layout == Layout::kContiguous ? "/contiguous/" : "/channels_last/") + size.name +
              "/" + dtype.name;
          const Size s = size.size;
          const DType d = dtype.dtype;
          cases.push_back({name, [op = op.op, layout, s, d] {
                             switch (op) {
                               case Op::kCat:
                                 return run_cat(d, layout, s);
                               case Op::kDw:
                                 return run_dw(d, layout, s, 1);
                               case Op::kDwStride2:
                                 return run_dw(d, layout, s, 2);
                               case Op::kSplit:
                                 return run_split(d, layout, s);
                             }
                             return std::string();
                           }});
        }
      }
    }
  }
  return cases;
}

}  // namespace snv2::emulated
