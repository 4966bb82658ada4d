// Who touched which byte of memory when, and what that costs a warp.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulator/machine.h"

namespace snv2::emulator {

// When and by whom: two accesses are ordered if one thread made both or a barrier that both of
// their threads took part in lies between.
struct Stamp {
  uint32_t thread = 0;  // of the grid, counted from one; 0 for nobody
  uint32_t cta = 0;
  uint32_t cluster = 0;
  uint32_t warp = 0;  // of the grid
  uint32_t grid_epoch = 0;
  uint32_t cluster_epoch = 0;
  uint32_t cta_epoch = 0;
  uint32_t lane = 0;
  uint32_t lane_epoch = 0;               // counts the thread's sync_warp
  const uint32_t* seen_lanes = nullptr;  // epoch up to which it sees what each lane did
  Site site{nullptr, 0};

  bool before(const Stamp& later) const {
    return thread == later.thread || grid_epoch < later.grid_epoch ||
           (cluster == later.cluster && cluster_epoch < later.cluster_epoch) ||
           (cta == later.cta && cta_epoch < later.cta_epoch) ||
           (warp == later.warp && lane_epoch < later.seen_lanes[lane]);
  }
};

std::string name_of(const Site& site);

// History of memory that threads share, in granules of two bytes. Reports are returned, empty for
// none.
class Shadow {
 public:
  Shadow(int64_t bytes, bool initialised) : cells_(static_cast<size_t>((bytes + 1) / 2)) {
    if (initialised) {
      for (Cell& cell : cells_) cell.initialised = true;
    }
  }

  std::string read(int64_t offset, int bytes, const Stamp& now);
  std::string write(int64_t offset, int bytes, const Stamp& now);
  // While a cp.async is under way to bytes already marked as written.
  void begin_copy(int64_t offset, int bytes);
  void end_copy(int64_t offset, int bytes, const Stamp& now);

 private:
  struct Cell {
    Stamp write;
    Stamp read;   // the latest
    Stamp other;  // another thread's, of another warp if there was one
    bool initialised = false;
    bool copying = false;
  };
  std::vector<Cell> cells_;
};

// One instruction of one lane.
struct Access {
  uintptr_t address;
  Site site;
  int16_t bytes;
  bool shared;
  bool write;
};

// Groups the accesses of a warp's lanes into the warp's instructions, adds their cost, and empties
// the lists. Lanes that diverged are taken to meet again in the order of the source; where one
// skips a statement of a loop that others execute, that pairs different iterations.
void count_accesses(std::vector<Access>* lanes, int lane_count, Counters& counters);

}  // namespace snv2::emulator
