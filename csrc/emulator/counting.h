// What the accesses of a warp cost.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator/sites.h"

namespace snv2::emulator {

// One access of one lane. `what` is the same for the lanes of one instruction.
struct Access {
  static constexpr uint64_t kSkipped = ~uint64_t{0};  // as an address: turned off by a predicate

  uint64_t address;
  uint32_t what;

  static uint32_t pack(uint32_t site, int bytes, bool shared, bool write) {
    return site << 7 | uint32_t{write} << 6 | uint32_t{shared} << 5 | static_cast<uint32_t>(bytes);
  }
  uint32_t site() const { return what >> 7; }
  bool write() const { return (what >> 6 & 1) != 0; }
  bool shared() const { return (what >> 5 & 1) != 0; }
  int bytes() const { return static_cast<int>(what & 31); }
};

// Groups the accesses of a warp's lanes into the warp's instructions, adds their cost, and empties
// the lists. Lanes that diverged are taken to meet again in the order of the source; where one
// skips a statement of a loop that others execute, that pairs different iterations.
void count_accesses(std::vector<Access> (&lanes)[32], const Sites& sites, Counters& counters);

}  // namespace snv2::emulator
