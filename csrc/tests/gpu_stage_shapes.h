// Plans whose units may share launches: a copy, stages of units, and a step that stays apart.
#pragma once

#include <string>
#include <vector>

#include "gpu_written_stage.h"

namespace snv2::SNV2_GPU {

struct StagesShape {
  int64_t batch, in, height, width, half;
  std::vector<int64_t>
      units;             // of each stage, which has 3 channels more in each half than the last
  int64_t cluster;       // of its last launch
  int64_t more = 0;      // channels of a main branch beyond its half
  bool head = false;     // what stays apart: a head, or a unit of stride 2
  bool doubles = false;  // whether a stage has twice as many channels, not 3 more
  bool grows = false;    // whether the buffer of a stage grows from unit to unit

  Case with(DType dtype, int64_t stages) const {
    Case c{dtype, Layout::kContiguous, batch, in, half, height, width, 0, 132};
    c.stages = stages;
    return c;
  }
  std::string name() const {
    std::string text = with(DType::kFloat16, 2).name() + " more " + std::to_string(more) + " units";
    for (const int64_t count : units) text += " " + std::to_string(count);
    return text;
  }
};

inline void write(Stage& stage, const StagesShape& s, Map x) {
  stage.copy(std::move(x));
  if (s.grows) stage.grow();
  int64_t half = s.half;
  for (const int64_t units : s.units) {
    for (int64_t i = 0; i < units; ++i) stage.unit(i == 0 ? 2 : 1, half, false, false, s.more);
    half += s.doubles ? half : 3;
  }
  if (s.head) {
    stage.head(20, 10);
  } else {
    stage.unit(2, half, true, true);
  }
}

}  // namespace snv2::SNV2_GPU
