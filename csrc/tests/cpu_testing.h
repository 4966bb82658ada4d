// What the tests of the CPU backend share: random numbers, maps, threads, and each instruction set.
#pragma once

#include <chrono>
#include <cmath>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "snv2/cpu.h"

using snv2::DType;
using snv2::FeatureMap;
using snv2::Layout;

inline std::mt19937 generator(1);

inline std::vector<float> random(int64_t count, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A float32 map with its memory, filled with NaN unless given.
struct Map {
  std::vector<float> values;
  FeatureMap map;

  Map(int64_t n, int64_t c, int64_t h, int64_t w, Layout layout)
      : values(static_cast<size_t>(n * c * h * w), kNan),
        map{values.data(), DType::kFloat32, layout, n, c, h, w} {}
  Map(const Map&) = delete;

  float& at(int64_t n, int64_t c, int64_t y, int64_t x) {
    return values[static_cast<size_t>(n * map.channels * map.plane() + c * map.channel_stride() +
                                      (y * map.width + x) * map.pixel_stride())];
  }
  void randomize() { values = random(map.numel()), map.data = values.data(); }
};

inline snv2::ParallelFor std_threads(int64_t threads) {
  snv2::ParallelFor pool;
  pool.threads = threads;
  pool.run = [](void*, int64_t count, snv2::ParallelFor::Body body, void* arg) {
    std::vector<std::thread> workers;
    for (int64_t i = 0; i < count; ++i) workers.emplace_back(body, arg, i);
    for (std::thread& worker : workers) worker.join();
  };
  return pool;
}

// A pool of one thread, which takes the last first.
inline snv2::ParallelFor one_thread(int64_t threads) {
  snv2::ParallelFor pool;
  pool.threads = threads;
  pool.run = [](void*, int64_t count, snv2::ParallelFor::Body body, void* arg) {
    for (int64_t i = count; i-- > 0;) body(arg, i);
  };
  return pool;
}

// Threads that start while others are in the middle of the work.
inline snv2::ParallelFor late_threads(int64_t threads) {
  snv2::ParallelFor pool;
  pool.threads = threads;
  pool.run = [](void*, int64_t count, snv2::ParallelFor::Body body, void* arg) {
    std::vector<std::thread> workers;
    for (int64_t i = 0; i < count; ++i) {
      workers.emplace_back([=] {
        std::this_thread::sleep_for(std::chrono::microseconds(i * 37 % 200));
        body(arg, i);
      });
    }
    for (std::thread& worker : workers) worker.join();
  };
  return pool;
}

template <class F>
void on_each_isa(const F& f) {
  for (const char* const* name = snv2::cpu::available_isas(); *name != nullptr; ++name) {
    CHECK(snv2::cpu::set_isa(*name));
    f(*name);
  }
}

inline bool close(double actual, double expected, double scale) {
  return std::abs(actual - expected) <= 2e-6 * scale;  // NaN is not
}
