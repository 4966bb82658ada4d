// A unit's shape, and how it may be cut.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/unit_params.h"
#include "snv2/cuda.h"

namespace snv2::SNV2_GPU {

// True for ReLU after all products, nothing after the convolutions, and windows of 3x3.
inline bool is_papers_unit(const GpuStep& step) {
  const auto papers = [](const GpuWindow& window, const GpuActivation& dw,
                         const GpuActivation& pw) {
    return window.window == 3 && window.dilation == 1 && dw.kind == Activation::kIdentity &&
           pw.kind == Activation::kRelu;
  };
  return step.pw1_activation.kind == Activation::kRelu &&
         papers(step.dw_window, step.dw_activation, step.pw2_activation) &&
         (step.proj_channels == 0 ||
          papers(step.proj_dw_window, step.proj_dw_activation, step.proj_activation));
}

// Where a unit's weights are.
enum class Weights : int64_t { kResident = 1, kDirect = 2, kClustered = 3 };

struct Shape {
  int64_t in, mid, proj, out;
  int64_t batch, height, width, out_height, out_width;
  int64_t row, out_row;    // with their padding
  bool in_planes, result;  // the map is read from planes; the caller's tensor is written
  int64_t vector;          // elements of the caller's tensors that are moved at once
  int64_t passed;          // channels that pass through to the result
  int64_t size;
  int64_t dw_floats[2];  // of a channel, in the parameters of either branch
  int64_t reach;         // of the larger window
  bool any;              // activations and windows
  bool expand, project;  // the main branch's products, one of which may be missing

  int64_t rows() const { return batch * out_height; }
  int64_t branches() const { return proj > 0 ? 2 : 1; }
  bool caller() const { return !in_planes || result; }
  // That registers allow.
  int64_t ctas_per_sm(Weights weights) const {
    return caller() || (any && weights == Weights::kDirect) ? 1 : 2;
  }
};

// How a unit is cut.
struct Cut {
  Weights weights = Weights::kDirect;
  int64_t cluster = 1;
  bool prefetch = false;
  int64_t columns = 0, ring = 0, step_rows = 0, rows_per_cta = 0;
  int64_t ctas = 0;  // of each branch, or clusters
  int64_t threads = kUnitThreads;
  int64_t ctas_per_sm = 0;
  int64_t shared_bytes = 0;
  bool split = false;  // results of a step are more than the columns that read a weight once
  bool last = false;   // for want of a better one: narrow steps, rows convolved one by one
  Places places[2] = {};
};

constexpr int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

// Rows of a matrix that a CTA of a cluster has at most.
inline int64_t share_rows(int64_t rows, int64_t cluster) {
  return std::min(rows, ceil_div(ceil_div(rows, kTileRows), cluster) * kTileRows);
}

// Rows of a step, or of the steps that a row takes.
inline int64_t stretch_rows(const Shape& s, int64_t columns) {
  return std::max<int64_t>(columns / s.row, 1);
}

// CTAs (or clusters) of one branch that run at once. A large cluster has to find its SMs in one
// part of the GPU: where the driver was not asked, an eighth of them may be left over.
inline int64_t slots_of(const Shape& s, const Device& device, const Cut& c, int64_t ctas_per_sm) {
  const bool large = c.cluster > 2;
  int64_t slots = large ? device.clusters_at_once[c.cluster > 4][ctas_per_sm - 1] : 0;
  if (slots == 0) slots = (large ? device.sms * 7 / 8 : device.sms) * ctas_per_sm / c.cluster;
  return std::max<int64_t>(slots / s.branches(), 1);
}

}  // namespace snv2::SNV2_GPU
