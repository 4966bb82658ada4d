// How a unit is cut into parts for several threads: over rows, panels or both.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "snv2/types.h"

namespace snv2::cpu {

// What a unit's cut into parts is chosen by, in multiply-adds.
struct UnitWork {
  int64_t stride;
  int64_t reach;     // of the depthwise windows, to each side
  int64_t expand;    // of a row of the input and a panel of the middle map
  int64_t rest;      // of a row of the result and a panel
  int64_t weights;   // floats of all panels
  int64_t exchange;  // floats of the maps that all threads read once, whoever wrote them
};

// A cut of a unit's panels x rows into equal parts for `threads` threads.
struct Grid {
  int64_t panel_parts = 1;
  int64_t row_parts = 1;
  int64_t panels;
  int64_t rows;  // of the result

  Grid(int64_t threads, int64_t panel_count, int64_t row_count, const UnitWork& unit)
      : panels(panel_count), rows(row_count) {
    // Measured: multiply-adds in the time of reading a float of weights, or one that another
    // core wrote, and of a wait for all threads.
    constexpr int64_t kWeight = 4, kForeign = 16, kWait = 100'000;
    int64_t best = std::numeric_limits<int64_t>::max();
    for (int64_t p = 1; p <= std::min(threads, panels); ++p) {
      const int64_t r = std::max<int64_t>(1, std::min(threads / p, rows));
      const int64_t part = ceil_div(rows, r);
      // Rows of the first product that a neighbour makes too: above, and at stride 1 below.
      const int64_t sides = r == 1 ? 0 : r == 2 || unit.stride == 2 ? 1 : 2;
      const int64_t halo = sides * unit.reach;
      const int64_t work = (part * unit.stride + halo) * unit.expand + part * unit.rest;
      const int64_t cost = ceil_div(panels, p) * work + unit.weights / p * kWeight +
                           (p == 1 ? 0 : unit.exchange / r * kForeign + kWait);
      if (cost < best) best = cost, panel_parts = p, row_parts = r;
    }
  }

  int64_t parts() const { return panel_parts * row_parts; }
  Range row_range(int64_t i) const { return part_of(rows, row_parts, i / panel_parts); }
};

}  // namespace snv2::cpu
