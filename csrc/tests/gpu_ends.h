// What the tests of the stem and the head share: elements of any dtype, and a network of the two.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/isa.h"
#include "cuda/network.h"

namespace snv2::SNV2_GPU {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
// Elements of 16 bits lie at the same addresses, which is all that a sanitizer sees.
#ifdef SNV2_SANITIZED
constexpr bool kSanitized = true;
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16};
#else
constexpr bool kSanitized = false;
constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
#endif

inline std::mt19937 generator(1);

inline std::vector<float> random(int64_t count, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// Elements of any dtype, seen as floats, that start `offset` elements after a multiple of 256
// bytes.
class Elements {
 public:
  Elements(DType dtype, int64_t count, int64_t offset = 0)
      : dtype_(dtype), offset_(offset), bytes_(static_cast<size_t>((count + offset) * 4 + 512)) {
    const size_t past = reinterpret_cast<uintptr_t>(bytes_.data()) % 256;
    data_ = bytes_.data() + (256 - past) + offset * size_of(dtype);
    for (int64_t i = 0; i < count; ++i) set(i, kNan);
  }
  Elements(DType dtype, const std::vector<float>& values, int64_t offset = 0)
      : Elements(dtype, static_cast<int64_t>(values.size()), offset) {
    for (size_t i = 0; i < values.size(); ++i) set(static_cast<int64_t>(i), values[i]);
  }
  Elements(const Elements&) = delete;

  void* data() { return data_; }
  float operator[](int64_t i) const {
    if (dtype_ == DType::kFloat32) return get<float>(i);
    if (dtype_ == DType::kFloat16) return to_float(get<half_t>(i));
    return to_float(get<bfloat16_t>(i));
  }
  void set(int64_t i, float value) {
    if (dtype_ == DType::kFloat32) return put<float>(i, value);
    if (dtype_ == DType::kFloat16) return put<half_t>(i, value);
    return put<bfloat16_t>(i, value);
  }

 private:
  template <class T>
  T get(int64_t i) const {
    T value;
    std::memcpy(&value, data_ + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }
  template <class T>
  void put(int64_t i, float value) {
    T out;
    from_float(value, out);
    std::memcpy(data_ + i * static_cast<int64_t>(sizeof(T)), &out, sizeof(T));
  }

  DType dtype_;
  int64_t offset_;
  std::vector<unsigned char> bytes_;
  unsigned char* data_;
};

// Half a unit in the last place, relative.
inline double half_unit(DType dtype) {
  return std::ldexp(1.0, dtype == DType::kFloat32 ? -24 : dtype == DType::kFloat16 ? -11 : -8);
}

// `scale`: of the terms that were added up.
inline bool close(DType dtype, float actual, double expected, double scale) {
  if (std::isnan(expected)) return std::isnan(actual);
  if (std::isinf(expected)) return actual == static_cast<float>(expected);
  return std::abs(actual - expected) <= half_unit(dtype) * std::abs(expected) + 2e-6 * scale;
}

// Where element (row, column) of a packed matrix lies (snv2/gpu_plan.h).
inline int64_t packed_place(DType dtype, int64_t depth, int64_t row, int64_t column) {
  const int64_t tile_columns = tile_depth(dtype), tiles = padded_depth(depth, dtype) / tile_columns;
  const int64_t tile = row / 16 * tiles + column / tile_columns;
  const int64_t r = row % 16, c = column % tile_columns;
  if (dtype == DType::kFloat32) return tile * 64 + r % 8 * 8 + c * 2 + r / 8;
  return tile * 256 + (r % 8 * 4 + c % 8 / 2) * 8 + c / 8 * 4 + r / 8 * 2 + c % 2;
}

// A network of a stem and a head: the shortest that has both.
struct Ends {
  DType dtype;
  int64_t channels, width, features, classes;
  std::vector<int64_t> words;
  std::vector<int32_t> tables;
  Elements weights;
  Elements aligned;
  std::vector<float> parameters;
  std::vector<float> stem_weights, pw_weights, fc_weights;  // as rounded

  Ends(DType dtype, int64_t channels, int64_t width, int64_t features = 1, int64_t classes = 1)
      : dtype(dtype),
        channels(channels),
        width(width),
        features(features),
        classes(classes),
        weights(dtype, packed_elements(width, channels * 9, dtype) +
                           packed_elements(features, width, dtype) +
                           packed_elements(classes, features, dtype)),
        aligned(DType::kFloat32,
                padded_rows(width) + padded_rows(features) + padded_rows(classes)) {
    GpuPlanHeader header{};
    header.magic = kGpuPlanMagic;
    header.step_count = 2;
    header.in_channels = channels;
    header.out_channels = classes;
    header.halvings = 2;
    header.classify = 1;
    header.result_count = 1;
    header.dtype = static_cast<int64_t>(dtype);
    GpuStep stem{};
    stem.kind = GpuStepKind::kStem;
    stem.stride = 1;
    stem.in_buffer = kCallersMap;
    stem.out_planes = planes();
    stem.result = kNoResult;
    stem.in_channels = channels;
    stem.out_channels = width;
    stem.pw1_activation.kind = Activation::kRelu;
    GpuStep head = stem;
    head.kind = GpuStepKind::kHead;
    head.in_buffer = 0;
    head.out_buffer = kNoBuffer;
    head.out_planes = 0;
    head.result = 0;
    head.in_channels = width;
    head.mid_channels = features;
    head.out_channels = classes;
    // Planes from the last one down, without the first.
    stem.out_table = channels;
    head.in_table = channels + width;
    for (int64_t i = 0; i < channels; ++i) tables.push_back(static_cast<int32_t>(i));
    for (int64_t i = 0; i < width; ++i) tables.push_back(static_cast<int32_t>(width - i));
    for (int64_t i = 0; i < width; ++i) tables.push_back(static_cast<int32_t>(width - i));
    for (int64_t i = 0; i < header_elements(); ++i) weights.set(i, 0.0f);
    stem_weights = matrix(header, stem.pw1_weights, width, channels * 9);
    stem.pw1_bias = bias(header, width);
    pw_weights = matrix(header, head.pw1_weights, features, width);
    head.pw1_bias = bias(header, features);
    fc_weights = matrix(header, head.pw2_weights, classes, features);
    head.pw2_bias = bias(header, classes);
    for (size_t i = 0; i < parameters.size(); ++i) {
      aligned.set(static_cast<int64_t>(i), parameters[i]);
    }
    const auto append = [&](const void* from, int64_t count) {
      const auto* p = static_cast<const int64_t*>(from);
      words.insert(words.end(), p, p + count);
    };
    append(&header, kGpuHeaderWords);
    append(&stem, kGpuStepWords);
    append(&head, kGpuStepWords);
    words.insert(words.end(), tables.begin(), tables.end());
  }

  int64_t planes() const { return width + 1; }
  int64_t header_elements() const {
    return packed_elements(width, channels * 9, dtype) + packed_elements(features, width, dtype) +
           packed_elements(classes, features, dtype);
  }
  GpuPlan plan() const { return GpuPlan(words.data(), static_cast<int64_t>(words.size())); }
  const GpuStep& stem() const { return *reinterpret_cast<const GpuStep*>(&words[kGpuHeaderWords]); }
  const GpuStep& head() const { return *(&stem() + 1); }
  // In memory aligned as a tensor's.
  PlanArrays arrays() {
    return {weights.data(), static_cast<float*>(aligned.data()), tables.data()};
  }
  const float* bias_of(int64_t offset) const { return parameters.data() + offset; }

 private:
  std::vector<float> matrix(GpuPlanHeader& header, int64_t& at, int64_t rows, int64_t depth) {
    at = header.weight_count;
    header.weight_count += packed_elements(rows, depth, dtype);
    std::vector<float> values = random(rows * depth, 1.0f / std::sqrt(static_cast<float>(depth)));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < depth; ++c) {
        float& value = values[static_cast<size_t>(r * depth + c)];
        const int64_t place = at + packed_place(dtype, depth, r, c);
        weights.set(place, value);
        value = weights[place];
      }
    }
    return values;
  }
  int64_t bias(GpuPlanHeader& header, int64_t rows) {
    const int64_t at = header.parameter_count;
    header.parameter_count += padded_rows(rows);
    parameters.resize(static_cast<size_t>(header.parameter_count));
    const std::vector<float> values = random(rows);
    std::copy(values.begin(), values.end(), parameters.begin() + at);
    return at;
  }
};

// To a GPU of one SM a small batch is a large one.
inline Device device_of(int64_t sms) {
  Device device{};
  device.sms = sms;
  device.shared_per_sm = 228 * 1024;
  device.shared_per_cta = 227 * 1024;
  device.reserved_per_cta = 1024;
  device.l2_bytes = 50 * 1024 * 1024;
  return device;
}

template <class F>
void without_fault(const std::string& what, const F& f) {
  try {
    f();
  } catch (const std::exception& error) {
    CHECK(false, "%s: %s", what.c_str(), error.what());
  }
}

}  // namespace snv2::SNV2_GPU
