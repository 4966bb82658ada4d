#include "kernel_testing.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "emulator/convert.h"

namespace snv2::emulated {
namespace {

// Of a result that is rounded once: float32 is summed, so it has more than one rounding.
double tolerance(DType dtype, double value) {
  const double relative = dtype == DType::kFloat32   ? 1e-5
                          : dtype == DType::kFloat16 ? 0x1.1p-11
                                                     : 0x1.1p-8;
  return relative * std::max(std::fabs(value), 0.125);
}

}  // namespace

TestMap::TestMap(DType dtype, Layout layout, int64_t batch, int64_t channels, int64_t height,
                 int64_t width, int skipped)
    : map_{nullptr, dtype, layout, batch, channels, height, width} {
  const int64_t bytes = (map_.numel() + skipped) * size_of(dtype);
  memory_.resize(static_cast<size_t>(ceil_div(bytes, 16) * 2 + 2));
  auto address = reinterpret_cast<uintptr_t>(memory_.data());
  address = (address + 15) / 16 * 16 + static_cast<uintptr_t>(skipped * size_of(dtype));
  map_.data = reinterpret_cast<void*>(address);
}

int64_t TestMap::index(int64_t n, int64_t c, int64_t y, int64_t x) const {
  return n * map_.channels * map_.plane() + c * map_.channel_stride() +
         (y * map_.width + x) * map_.pixel_stride();
}

void TestMap::fill(Random& random) {
  for (int64_t i = 0; i < map_.numel(); ++i) {
    const float value = random.next();
    const uint16_t bits = map_.dtype == DType::kFloat16 ? emulator::float_to_half(value)
                                                        : emulator::float_to_bfloat16(value);
    if (map_.dtype == DType::kFloat32) {
      static_cast<float*>(map_.data)[i] = value;
    } else {
      static_cast<uint16_t*>(map_.data)[i] = bits;
    }
  }
}

double TestMap::at(int64_t n, int64_t c, int64_t y, int64_t x) const {
  const int64_t i = index(n, c, y, x);
  if (map_.dtype == DType::kFloat32) return static_cast<const float*>(map_.data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(map_.data)[i];
  return map_.dtype == DType::kFloat16 ? emulator::half_to_float(bits)
                                       : emulator::bfloat16_to_float(bits);
}

double TestMap::padded(int64_t n, int64_t c, int64_t y, int64_t x) const {
  return y < 0 || y >= map_.height || x < 0 || x >= map_.width ? 0.0 : at(n, c, y, x);
}

std::string TestMap::compare_element(int64_t n, int64_t c, int64_t y, int64_t x,
                                     double wanted) const {
  const double got = at(n, c, y, x);
  if (std::fabs(got - wanted) <= tolerance(map_.dtype, wanted)) return "";
  return "wrong result: out[" + std::to_string(n) + ", " + std::to_string(c) + ", " +
         std::to_string(y) + ", " + std::to_string(x) + "] is " + std::to_string(got) +
         " instead of " + std::to_string(wanted);
}

}  // namespace snv2::emulated
