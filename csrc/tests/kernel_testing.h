// Maps for calls of the shipped kernels on the emulator.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "snv2/cuda.h"

namespace snv2::emulated {

// Numbers that are the same in each run, in [-1, 1).
class Random {
 public:
  explicit Random(uint32_t seed) : state_(seed * 2654435761u + 1) {}
  float next() {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<float>(state_ >> 8) * 0x1p-23f - 1.0f;
  }
  std::vector<float> values(int64_t count) {
    std::vector<float> result(static_cast<size_t>(count));
    for (float& v : result) v = next();
    return result;
  }

 private:
  uint32_t state_;
};

// A map of random elements, or of none yet, that starts `skipped` elements after a vector.
class TestMap {
 public:
  TestMap(DType dtype, Layout layout, int64_t batch, int64_t channels, int64_t height,
          int64_t width, int skipped);

  void fill(Random& random);
  const FeatureMap& map() const { return map_; }
  double at(int64_t n, int64_t c, int64_t y, int64_t x) const;
  // The same, zero outside of the plane.
  double padded(int64_t n, int64_t c, int64_t y, int64_t x) const;
  // The first element that is not as wanted(n, c, y, x).
  template <class F>
  std::string compare(const F& wanted) const;

 private:
  int64_t index(int64_t n, int64_t c, int64_t y, int64_t x) const;
  std::string compare_element(int64_t n, int64_t c, int64_t y, int64_t x, double wanted) const;

  std::vector<uint64_t> memory_;
  FeatureMap map_;
};

template <class F>
std::string TestMap::compare(const F& wanted) const {
  for (int64_t n = 0; n < map_.batch; ++n) {
    for (int64_t c = 0; c < map_.channels; ++c) {
      for (int64_t y = 0; y < map_.height; ++y) {
        for (int64_t x = 0; x < map_.width; ++x) {
          const std::string wrong = compare_element(n, c, y, x, wanted(n, c, y, x));
          if (!wrong.empty()) return wrong;
        }
      }
    }
  }
  return "";
}

}  // namespace snv2::emulated
