// Plans for GPUs that are right, to be checked as they are and with one thing wrong.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "snv2/gpu_plan.h"

namespace snv2 {

struct Packer {
  GpuPlanHeader header = {};
  std::vector<GpuStep> steps;
  std::vector<int64_t> tables;

  explicit Packer(int64_t in_channels, DType dtype) {
    header.magic = kGpuPlanMagic;
    header.in_channels = in_channels;
    header.dtype = static_cast<int64_t>(dtype);
  }

  int64_t table(const std::vector<int64_t>& entries) {
    tables.insert(tables.end(), entries.begin(), entries.end());
    return static_cast<int64_t>(tables.size() - entries.size());
  }
  int64_t matrix(int64_t rows, int64_t depth) {
    const int64_t offset = header.weight_count;
    header.weight_count += packed_elements(rows, depth, static_cast<DType>(header.dtype));
    return offset;
  }
  int64_t floats(int64_t count) {
    const int64_t offset = header.parameter_count;
    header.parameter_count += ceil_div(count, 16) * 16;
    return offset;
  }
  int64_t bias(int64_t rows) { return floats(padded_rows(rows)); }
  GpuActivation prelu(int64_t rows) { return {Activation::kPrelu, bias(rows)}; }

  GpuStep& add(GpuStepKind kind, int64_t in, int64_t out, int64_t planes) {
    GpuStep step = {};
    step.kind = kind;
    step.stride = 1;
    step.in_buffer = in;
    step.out_buffer = out;
    step.out_planes = planes;
    step.result = kNoResult;
    steps.push_back(step);
    return steps.back();
  }

  void stem(int64_t channels) {
    GpuStep& step = add(GpuStepKind::kStem, kCallersMap, 0, channels);
    step.in_channels = header.in_channels;
    step.in_table = table(range(0, header.in_channels));
    step.out_channels = channels;
    step.out_table = table(range(0, channels));
    step.pw1_weights = matrix(channels, header.in_channels * 9);
    step.pw1_bias = bias(channels);
    step.pw1_activation = prelu(channels);
    header.halvings += 2;
  }

  // The main branch reads `main`, all channels at stride 2.
  GpuStep& unit(int64_t stride, int64_t in, int64_t out, const std::vector<int64_t>& main,
                const std::vector<int64_t>& fresh, int64_t planes, int64_t width) {
    GpuStep& step = add(GpuStepKind::kUnit, in, out, planes);
    step.parts = kWholeBranch;
    step.stride = stride;
    step.in_channels = static_cast<int64_t>(main.size());
    step.in_table = table(main);
    step.mid_channels = width + 1;
    step.out_channels = width;
    if (out != kNoBuffer) step.out_table = table(fresh);
    step.pw1_weights = matrix(width + 1, step.in_channels);
    step.pw1_bias = bias(width + 1);
    step.dw = floats((width + 1) * depthwise_floats(5));
    step.dw_window = {5, 2};
    step.pw1_activation = {Activation::kHardswish};
    step.dw_activation = prelu(width + 1);
    step.pw2_activation = {Activation::kRelu6};
    step.pw2_weights = matrix(width, width + 1);
    step.pw2_bias = bias(width);
    if (stride == 2) {
      step.proj_channels = width;
      step.proj_dw = floats(step.in_channels * kDepthwiseFloats);
      step.proj_dw_window = {3, 1};
      step.proj_dw_activation = prelu(step.in_channels);
      step.proj_activation = {Activation::kSilu};
      step.proj_weights = matrix(width, step.in_channels);
      step.proj_bias = bias(width);
      ++header.halvings;
    }
    return step;
  }

  // A piece of a unit from planes to planes, whose depthwise convolution is 3x3.
  GpuStep& piece(int64_t parts, int64_t stride, int64_t in, int64_t out,
                 const std::vector<int64_t>& read, const std::vector<int64_t>& fresh,
                 int64_t planes) {
    GpuStep& step = add(GpuStepKind::kUnit, in, out, planes);
    step.parts = parts;
    step.stride = stride;
    step.in_channels = static_cast<int64_t>(read.size());
    step.in_table = table(read);
    step.out_channels = static_cast<int64_t>(fresh.size());
    if (out != kNoBuffer) step.out_table = table(fresh);
    step.mid_channels = parts & kExpand ? step.out_channels : step.in_channels;
    if (parts & kExpand) {
      step.pw1_weights = matrix(step.mid_channels, step.in_channels);
      step.pw1_bias = bias(step.mid_channels);
    }
    step.dw_window = {1, 1};
    step.proj_dw_window = {1, 1};
    if (parts & kDepthwise) {
      step.dw = floats(step.mid_channels * kDepthwiseFloats);
      step.dw_window = {3, 1};
    }
    if (parts & kProject) {
      step.pw2_weights = matrix(step.out_channels, step.mid_channels);
      step.pw2_bias = bias(step.out_channels);
    }
    return step;
  }

  // The first `rows` rows of a piece's table are those of a projection.
  void project(GpuStep& step, int64_t rows) {
    step.proj_channels = rows;
    step.out_channels -= rows;
    step.proj_dw = floats(step.in_channels * kDepthwiseFloats);
    step.proj_dw_window = {3, 1};
    step.proj_weights = matrix(rows, step.in_channels);
    step.proj_bias = bias(rows);
  }

  void gate(int64_t buffer, const std::vector<int64_t>& read, int64_t planes, int64_t width) {
    GpuStep& step = add(GpuStepKind::kGate, buffer, buffer, planes);
    step.in_channels = step.out_channels = static_cast<int64_t>(read.size());
    step.in_table = step.out_table = table(read);
    step.mid_channels = width;
    step.pw1_weights = matrix(width, step.in_channels);
    step.pw1_bias = bias(width);
    step.pw1_activation = prelu(width);
    step.pw2_weights = matrix(step.in_channels, width);
    step.pw2_bias = bias(step.in_channels);
    step.pw2_activation = {Activation::kSigmoid};
  }

  void exported(int64_t buffer, const std::vector<int64_t>& read) {
    GpuStep& step = add(GpuStepKind::kExport, buffer, kNoBuffer, 0);
    step.in_channels = step.out_channels = step.result_channels = header.out_channels =
        static_cast<int64_t>(read.size());
    step.in_table = table(read);
    step.result = header.result_count++;
  }

  void result(GpuStep& step, const std::vector<int64_t>& rows) {
    step.result = header.result_count++;
    step.result_channels = static_cast<int64_t>(rows.size());
    step.result_table = table(rows);
    header.out_channels = step.result_channels;
  }

  void head(int64_t in, const std::vector<int64_t>& planes, int64_t features, int64_t classes) {
    GpuStep& step = add(GpuStepKind::kHead, in, kNoBuffer, 0);
    step.in_channels = static_cast<int64_t>(planes.size());
    step.in_table = table(planes);
    step.mid_channels = features;
    step.out_channels = header.out_channels = classes;
    step.pw1_weights = matrix(features, step.in_channels);
    step.pw1_bias = bias(features);
    step.pw1_activation = {Activation::kRelu};
    step.pw2_weights = matrix(classes, features);
    step.pw2_bias = bias(classes);
    step.result = header.result_count++;
    header.classify = 1;
  }

  static std::vector<int64_t> range(int64_t begin, int64_t end) {
    std::vector<int64_t> entries;
    for (int64_t i = begin; i < end; ++i) entries.push_back(i);
    return entries;
  }

  std::vector<int64_t> words() {
    header.step_count = static_cast<int64_t>(steps.size());
    std::vector<int64_t> all(kGpuHeaderWords + steps.size() * kGpuStepWords);
    std::memcpy(all.data(), &header, sizeof header);
    std::memcpy(all.data() + kGpuHeaderWords, steps.data(), steps.size() * sizeof(GpuStep));
    all.insert(all.end(), tables.begin(), tables.end());
    return all;
  }

  void check() {
    const auto all = words();
    const GpuPlan plan(all.data(), static_cast<int64_t>(all.size()));
  }
};

// Stem, a unit of each stride, the latter tapped, and a head.
inline Packer network(DType dtype) {
  Packer p(3, dtype);
  p.stem(5);
  p.unit(2, 0, 1, Packer::range(0, 5), Packer::range(0, 8), 12, 4);
  GpuStep& tapped = p.unit(1, 1, 1, Packer::range(4, 8), Packer::range(8, 12), 12, 4);
  p.result(tapped, {-1, 0, -2, 1, -3, 2, -4, 3});
  p.head(1, {0, 8, 1, 9, 2, 10, 3, 11}, 20, 7);
  return p;
}

// One unit of stride 1, from the caller's map to the caller's.
inline Packer single_unit() {
  Packer p(8, DType::kFloat32);
  GpuStep& step = p.unit(1, kCallersMap, kNoBuffer, Packer::range(4, 8), {}, 0, 4);
  p.result(step, {-1, 0, -2, 1, -3, 2, -4, 3});
  return p;
}

// A copy, a unit in place, one that goes over to the other buffer.
inline Packer stage() {
  Packer p(4, DType::kFloat16);
  GpuStep& copy = p.add(GpuStepKind::kCopy, kCallersMap, 0, 6);
  copy.in_channels = copy.out_channels = 4;
  copy.in_table = p.table(Packer::range(0, 4));
  copy.out_table = p.table(Packer::range(0, 4));
  p.unit(1, 0, 0, {2, 3}, {4, 5}, 6, 2);
  GpuStep& last = p.unit(2, 0, kNoBuffer, {0, 1, 4, 5}, {}, 0, 3);
  p.result(last, {0, 3, 1, 4, 2, 5});
  return p;
}

// Units in pieces: one of stride 1, whose map is exported; one of stride 2, whose projection is a
// step of its own; one of stride 2 again, whose projection is beside its first piece.
inline Packer pieces() {
  Packer p(4, DType::kBFloat16);
  GpuStep& copy = p.add(GpuStepKind::kCopy, kCallersMap, 0, 7);
  copy.in_channels = copy.out_channels = 4;
  copy.in_table = copy.out_table = p.table(Packer::range(0, 4));
  p.piece(kExpand | kDepthwise, 1, 0, 0, {2, 3}, {4, 5, 6}, 7);
  p.gate(0, {4, 5, 6}, 7, 2);
  p.piece(kProject, 1, 0, 0, {4, 5, 6}, {2, 3}, 7);
  p.exported(0, {0, 2, 1, 3});
  p.piece(kDepthwise | kProject, 2, 0, 1, {0, 1, 2, 3}, {0, 1, 2}, 7);
  p.piece(kExpand | kDepthwise | kProject, 2, 0, 1, {0, 1, 2, 3}, {3, 4}, 7);
  p.piece(kDepthwise, 1, 1, 1, {3, 4}, {5, 6}, 7);
  p.project(p.piece(kDepthwise | kProject, 2, 1, 0, {0, 1, 2, 5, 6}, {0, 1, 2, 3}, 5), 3);
  p.exported(0, {3, 2, 1, 0});
  p.header.halvings = 2;
  return p;
}

// Refused with the name of what is wrong.
inline void refused(Packer p, const char* what) {
  std::string message;
  try {
    p.check();
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  CHECK(message.find(what) != std::string::npos, "'%s' instead of '%s'", message.c_str(), what);
}

}  // namespace snv2
