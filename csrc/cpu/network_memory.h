// The workspace of a network: how large each of its parts must be for all steps of a plan.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"

namespace snv2::cpu {

constexpr int64_t kAlign = 16;  // floats in a cache line

constexpr int64_t aligned(int64_t floats) { return ceil_div(floats, kAlign) * kAlign; }

// Floats of each part of the workspace.
struct Memory {
  int64_t buffer = 0;     // one of the two feature map buffers of an image
  int64_t depthwise = 0;  // depthwise results of a unit
  int64_t offsets = 0;    // int32 offset lists of a step, of one thread
  int64_t scratch = 0;    // rows of one thread
  int64_t features = 0;   // pooled features of all images
  int64_t classes = 0;

  int64_t per_image(int64_t threads) const {
    return 2 * buffer + depthwise + threads * (offsets + scratch);
  }
};

struct Extent {
  int64_t height;
  int64_t width;

  int64_t pixels() const { return height * width; }
  Extent strided(int64_t stride) const {
    return {conv3x3_extent(height, stride), conv3x3_extent(width, stride)};
  }
};

inline Extent extent_after(const Step& step, Extent in) {
  if (step.kind == StepKind::kStem) return in.strided(2).strided(2);
  return step.kind == StepKind::kUnit ? in.strided(step.stride) : in;
}

inline DepthwiseShape depthwise_shape(const Branch& branch, Extent extent, int64_t stride) {
  return {extent.height, extent.width, stride, branch.window, branch.dilation};
}

// Whether all of the depthwise result must be there before the last product reads it.
inline bool meets(const Branch& branch) {
  return (branch.parts & kDepthwise) != 0 && (branch.parts & kProject) != 0;
}

// Means, what is left of them, and scales.
inline int64_t gate_floats(const Branch& gate) {
  return (2 * panels_of(gate.out_channels) + panels_of(gate.mid_channels)) * kPanel;
}

inline void grow(int64_t& value, int64_t floats) { value = std::max(value, aligned(floats)); }

inline Memory plan_memory(const Plan& plan, int64_t batch, Extent extent) {
  const int64_t planes = planes_in_word(plan.element());
  const auto map = [&](int64_t panels, int64_t pixels) {
    return panels * pixels * (kPanel / planes);
  };
  Memory memory;
  int64_t buffer_panels = 0;
  for (const Step& step : plan) {
    const Extent out = extent_after(step, extent);
    if (step.new_buffer) {
      buffer_panels = step.buffer_panels;
      grow(memory.buffer, map(buffer_panels, out.pixels()));
    }
    const Branch& main = step.main;
    switch (step.kind) {
      case StepKind::kStem:
        grow(memory.offsets, main.in_channels * 9);
        grow(memory.scratch,
             stem_scratch(ceil_div(main.in_channels, planes), extent.width, main.out_channels));
        break;
      case StepKind::kUnit: {
        int64_t offsets = 0, panels = 0;
        for (const Branch* branch : {&main, &step.projection}) {
          offsets += branch->in_channels + branch->depth;
          if (meets(*branch)) panels += panels_of(branch->mid_channels);
          if ((branch->parts & kDepthwise) == 0) continue;
          grow(memory.scratch, depthwise_scratch(depthwise_shape(*branch, extent, step.stride)));
        }
        grow(memory.offsets, offsets);
        grow(memory.depthwise, map(panels, out.pixels()));
        break;
      }
      case StepKind::kGate:
        grow(memory.depthwise, gate_floats(main));
        grow(memory.offsets, main.depth);
        break;
      case StepKind::kHead:
        grow(memory.offsets, main.in_channels);
        if ((main.parts & kPool) != 0) grow(memory.depthwise, buffer_panels * kPanel);
        memory.features = aligned(map(panels_of(main.mid_channels), batch));
        memory.classes = panels_of(main.out_channels) * kPanel * batch;
        break;
      case StepKind::kExport:
        grow(memory.offsets, main.in_channels);
        break;
      default:
        break;
    }
    extent = out;
  }
  return memory;
}

}  // namespace snv2::cpu
