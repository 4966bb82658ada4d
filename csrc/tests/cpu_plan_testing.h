// Plans of the CPU backend put together by hand, and their layers as loops in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "cpu_testing.h"

using snv2::Activation;
using snv2::Branch;
using snv2::Step;
using snv2::StepKind;

inline constexpr int64_t kIdentity = static_cast<int64_t>(snv2::Activation::kIdentity);

// Two numbers that bfloat16 has, the first in the lower half.
inline float pair_of(float first, float second) {
  uint32_t bits[2];
  std::memcpy(&bits[0], &first, 4), std::memcpy(&bits[1], &second, 4);
  CHECK((bits[0] | bits[1]) << 16 == 0);
  const uint32_t word = bits[0] >> 16 | bits[1];
  float pair;
  std::memcpy(&pair, &word, 4);
  return pair;
}

// A plan as the packing code makes it: import, a stride-2 unit, two stride-1 units, export.
struct Packer {
  DType element;
  std::vector<int64_t> tables;
  std::vector<float> weights;
  std::vector<Step> steps;

  int64_t planes() const { return snv2::planes_in_word(element); }

  int64_t add_table(const std::vector<int64_t>& entries) {
    tables.insert(tables.end(), entries.begin(), entries.end());
    return static_cast<int64_t>(tables.size() - entries.size());
  }
  int64_t add_weights(const std::vector<float>& w, const std::vector<float>& bias) {
    const int64_t outputs = static_cast<int64_t>(bias.size());
    const int64_t depth = static_cast<int64_t>(w.size()) / outputs;
    const int64_t offset = static_cast<int64_t>(weights.size());
    weights.resize(weights.size() + static_cast<size_t>(snv2::packed_floats(outputs, depth)));
    for (int64_t o = 0; o < outputs; ++o) {
      float* panel = &weights[offset + (o / 16) * (depth + 1) * 16 + o % 16];
      panel[0] = bias[o];
      for (int64_t k = 0; k < depth; ++k) panel[(k + 1) * 16] = w[o * depth + k];
    }
    return offset;
  }
  // A matrix whose column k is that of plane columns[k].
  int64_t add_product(const std::vector<float>& w, const std::vector<float>& bias,
                      const std::vector<int64_t>& columns) {
    const int64_t outputs = static_cast<int64_t>(bias.size());
    const int64_t depth = static_cast<int64_t>(columns.size());
    std::vector<float> words;
    for (int64_t o = 0; o < outputs; ++o)
      for (int64_t k = 0; k < depth; k += planes()) {
        const float* const row = &w[o * depth];
        words.push_back(planes() == 1 ? row[columns[k]]
                                      : pair_of(row[columns[k]], row[columns[k + 1]]));
      }
    return add_weights(words, bias);
  }
  // The words of a map's planes and, in their order, which of the given planes is in each.
  std::vector<int64_t> gather(const std::vector<int64_t>& given, std::vector<int64_t>& columns) {
    std::vector<int64_t> words;
    columns.clear();
    for (const int64_t plane : given) {
      if (plane % planes() != 0) continue;
      words.push_back(plane);
      for (int64_t i = 0; i < planes(); ++i) {
        const auto found = std::find(given.begin(), given.end(), plane + i);
        CHECK(found != given.end(), "half a word is read");
        columns.push_back(found - given.begin());
      }
    }
    return words;
  }
  std::vector<int64_t> words(int64_t in, int64_t out, int64_t halvings) const {
    std::vector<int64_t> result = {snv2::kPlanMagic,
                                   static_cast<int64_t>(steps.size()),
                                   in,
                                   out,
                                   halvings,
                                   0,
                                   static_cast<int64_t>(element)};
    const auto* raw = reinterpret_cast<const int64_t*>(steps.data());
    result.insert(result.end(), raw, raw + steps.size() * snv2::kStepWords);
    result.insert(result.end(), tables.begin(), tables.end());
    return result;
  }
};

using Values = std::vector<double>;  // [C][H][W]

inline double activated(Activation kind, double v, double slope = 0) {
  const double six = std::min(std::max(v + 3, 0.0), 6.0) / 6;
  switch (kind) {
    case Activation::kRelu:
      return std::max(v, 0.0);
    case Activation::kIdentity:
      return v;
    case Activation::kRelu6:
      return std::min(std::max(v, 0.0), 6.0);
    case Activation::kLeakyRelu:
    case Activation::kPrelu:
      return v > 0 ? v : slope * v;
    case Activation::kSilu:
      return v / (1 + std::exp(-v));
    case Activation::kHardswish:
      return v * six;
    case Activation::kSigmoid:
      return 1 / (1 + std::exp(-v));
    case Activation::kHardsigmoid:
      return six;
  }
  return kNan;
}

// What stands behind a layer; slopes for each channel, if any.
struct TestActivation {
  Activation kind = Activation::kRelu;
  std::vector<float> slopes;

  double operator()(double v, int64_t channel) const {
    return activated(kind, v, slopes.empty() ? 0 : slopes[channel]);
  }
};

inline Values pw(const Values& x, const std::vector<float>& w, const std::vector<float>& bias,
                 int64_t pixels, const TestActivation& act = {}) {
  const int64_t outputs = static_cast<int64_t>(bias.size());
  const int64_t depth = static_cast<int64_t>(w.size()) / outputs;
  Values y(outputs * pixels);
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t p = 0; p < pixels; ++p) {
      double sum = bias[o];
      for (int64_t k = 0; k < depth; ++k) sum += x[k * pixels + p] * w[o * depth + k];
      y[o * pixels + p] = act(sum, o);
    }
  return y;
}

inline Values dw(const Values& x, const std::vector<float>& w, const std::vector<float>& bias,
                 int64_t h, int64_t width, int64_t stride, int64_t window = 3, int64_t dilation = 1,
                 const TestActivation& act = {Activation::kIdentity, {}}) {
  const int64_t oh = snv2::conv3x3_extent(h, stride), ow = snv2::conv3x3_extent(width, stride);
  const int64_t taps = window * window, reach = window / 2 * dilation;
  Values y;
  for (size_t c = 0; c < bias.size(); ++c)
    for (int64_t p = 0; p < oh * ow; ++p) {
      double sum = bias[c];
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t yy = p / ow * stride + tap / window * dilation - reach;
        const int64_t xx = p % ow * stride + tap % window * dilation - reach;
        if (yy >= 0 && xx >= 0 && yy < h && xx < width) {
          sum += x[(c * h + yy) * width + xx] * w[c * taps + tap];
        }
      }
      y.push_back(act(sum, static_cast<int64_t>(c)));
    }
  return y;
}

// A plan that is cut short, has too few weights, or has any one word made huge or negative is
// refused, unless that is the stride of a step that has none.
inline void check_broken_plans(const Packer& packer, const std::vector<int64_t>& words) {
  const auto weight_count = static_cast<int64_t>(packer.weights.size());
  const auto count = static_cast<int64_t>(words.size());
  for (int64_t size = 0; size < count; ++size) {
    CHECK_THROWS(snv2::Plan(words.data(), size, weight_count));
  }
  CHECK_THROWS(snv2::Plan(words.data(), count, weight_count - 1));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t step = (i - snv2::kHeaderWords) / snv2::kStepWords;
    const bool stride = i >= snv2::kHeaderWords && (i - snv2::kHeaderWords) % snv2::kStepWords ==
                                                       offsetof(Step, stride) / sizeof(int64_t);
    if (stride && (step == 0 || step == static_cast<int64_t>(packer.steps.size()) - 1)) continue;
    for (const int64_t value :
         {int64_t{-1}, int64_t{1} << 40, std::numeric_limits<int64_t>::max()}) {
      auto broken = words;
      broken[i] = value;
      bool refused = false;
      try {
        const snv2::Plan plan(broken.data(), count, weight_count);
      } catch (const std::invalid_argument&) {
        refused = true;
      }
      CHECK(refused, "word %d", static_cast<int>(i));
    }
  }
}
