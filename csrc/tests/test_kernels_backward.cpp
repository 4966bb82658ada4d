// The gradients' kernels on the emulator, against loops in double.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "gradient_loops.h"
#include "kernel_testing.h"

namespace snv2::emulated {
namespace {

struct Size {
  int64_t batch, channels, height, width;
};

std::string compare(const char* name, const std::vector<float>& got,
                    const std::vector<double>& wanted) {
  double most = 1.0;
  for (const double w : wanted) most = std::max(most, std::fabs(w));
  for (size_t i = 0; i < got.size(); ++i) {
    if (!(std::fabs(double{got[i]} - wanted[i]) <= 1e-5 * most)) {
      return std::string("wrong result: ") + name + "[" + std::to_string(i) + "] is " +
             std::to_string(got[i]) + " instead of " + std::to_string(wanted[i]);
    }
  }
  return "";
}

std::string run_cat(DType dtype, Layout layout, const Size& s) {
  Random random(6);
  TestMap grad(dtype, layout, s.batch, 2 * s.channels, s.height, s.width, 1);
  grad.fill(random);
  const TestMap a(dtype, layout, s.batch, s.channels, s.height, s.width, 0);
  const TestMap b(dtype, layout, s.batch, s.channels, s.height, s.width, 3);
  cat_shuffle_backward(grad.map(), a.map(), b.map(), nullptr);
  for (int64_t half = 0; half < 2; ++half) {
    const std::string wrong =
        (half == 0 ? a : b).compare([&](int64_t n, int64_t c, int64_t y, int64_t x) {
          return grad.at(n, 2 * c + half, y, x);
        });
    if (!wrong.empty()) return wrong;
  }
  return "";
}

template <bool kPassthrough, int64_t kStride>
std::string run_depthwise(DType dtype, Layout layout, const Size& s) {
  Random random(7);
  const int64_t unit = kPassthrough ? 2 : 1, pass = s.channels * (unit - 1);
  TestMap x(dtype, layout, s.batch, unit * s.channels, s.height, s.width, 1);
  TestMap grad(dtype, layout, s.batch, unit * s.channels, conv3x3_extent(s.height, kStride),
               conv3x3_extent(s.width, kStride), 2);
  const TestMap grad_x(dtype, layout, s.batch, unit * s.channels, s.height, s.width, 3);
  x.fill(random);
  grad.fill(random);
  const std::vector<float> weight = random.values(9 * s.channels),
                           scale = random.values(s.channels), shift = random.values(s.channels);
  const Depthwise3x3 dw{weight.data(), scale.data(), shift.data(), kStride, true};
  std::vector<float> grad_weight(weight.size()), grad_scale(scale.size()), grad_shift(shift.size()),
      workspace(static_cast<size_t>(depthwise_backward_workspace(x.map(), s.channels)));
  const auto run = kPassthrough ? split_dw_cat_shuffle_backward : dw_conv3x3_backward;
  run(grad.map(), x.map(), dw, grad_x.map(),
      {grad_weight.data(), grad_scale.data(), grad_shift.data()}, workspace.data(), nullptr);

  const GradientLoops wanted(
      s.batch, s.channels, s.height, s.width, dw,
      [&](int64_t n, int64_t c, int64_t row, int64_t column) {
        return x.at(n, pass + c, row, column);
      },
      [&](int64_t n, int64_t c, int64_t row, int64_t column) {
        return grad.at(n, unit * c + unit - 1, row, column);
      });
  const std::string results[] = {
      grad_x.compare([&](int64_t n, int64_t c, int64_t row, int64_t column) {
        if (c < pass) return grad.at(n, 2 * c, row, column);
        const int64_t plane = n * s.channels + c - pass;
        return wanted.x[static_cast<size_t>((plane * s.height + row) * s.width + column)];
      }),
      compare("grad_weight", grad_weight, wanted.weight),
      compare("grad_scale", grad_scale, wanted.scale),
      compare("grad_shift", grad_shift, wanted.shift)};
  for (const std::string& wrong : results) {
    if (!wrong.empty()) return wrong;
  }
  return "";
}

bool add_tests() {
  const struct {
    const char* name;
    std::string (*run)(DType, Layout, const Size&);
  } ops[] = {{"cat_shuffle_backward", run_cat},
             {"dw_conv3x3_backward", run_depthwise<false, 1>},
             {"dw_conv3x3_stride2_backward", run_depthwise<false, 2>},
             {"split_dw_cat_shuffle_backward", run_depthwise<true, 1>}};
  const struct {
    const char* name;
    Layout layout;
  } layouts[] = {{"contiguous", Layout::kContiguous}, {"channels_last", Layout::kChannelsLast}};
  const struct {
    const char* name;
    Size size;
    DType dtype;
  } cases[] = {
      {"plane/float32", {2, 5, 7, 9}, DType::kFloat32},
      {"plane/float16", {2, 5, 7, 9}, DType::kFloat16},
      {"plane/bfloat16", {2, 5, 7, 9}, DType::kBFloat16},
      {"point/float32", {1, 3, 1, 1}, DType::kFloat32},
      {"tiles/float32", {2, 42, 14, 14}, DType::kFloat32},   // groups of channels, two tiles each
      {"blocks/float32", {1, 1, 96, 130}, DType::kFloat32},  // too large for shared memory
      {"narrow_blocks/float16", {1, 2, 3, 8200}, DType::kFloat16},
  };
  for (const auto& op : ops) {
    for (const auto& layout : layouts) {
      for (const auto& c : cases) {
        all_tests().push_back({std::string(op.name) + "/" + layout.name + "/" + c.name, [=] {
                                 const std::string wrong = op.run(c.dtype, layout.layout, c.size);
                                 CHECK(wrong.empty(), "%s", wrong.c_str());
                               }});
      }
    }
  }
  return true;
}

const bool tests_added = add_tests();

}  // namespace
}  // namespace snv2::emulated
