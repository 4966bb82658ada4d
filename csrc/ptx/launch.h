// Runs launches, one at a time, and keeps their counts.
#pragma once

#include <vector>

#include "ptx/machine.h"
#include "ptx/ptx.h"

namespace snv2::ptx {

class Launcher {
 public:
  // Launches after it are the same whatever was launched before.
  void set_seed(uint32_t seed) {
    seed_ = seed;
    launches_ = 0;
  }
  void sample(uint32_t apart) { apart_ = apart; }
  void run(Kernel& kernel, const LaunchShape& shape, const std::vector<uint8_t>& parameters,
           std::vector<Buffer> buffers);

  const std::vector<Count>& counts() const { return counts_; }
  void reset_counts() { counts_.clear(); }

 private:
  uint32_t seed_ = 0;
  uint32_t apart_ = 1;  // clusters that are run
  uint64_t launches_ = 0;
  std::vector<Count> counts_;
};

// Adds the executed instructions of a kernel by source lines.
void add_line_counts(const Kernel& kernel, std::vector<Count>& counts);

}  // namespace snv2::ptx
