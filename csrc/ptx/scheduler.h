// Runs the warps of some clusters to their end.
#pragma once

#include <vector>

#include "ptx/machine.h"

namespace snv2::ptx {

class Scheduler {
 public:
  explicit Scheduler(Launch& launch) : launch_(launch), kernel_(launch.kernel) {}

  // Clusters by their numbers, resident at once.
  void run(const std::vector<uint32_t>& clusters);

 private:
  void begin(const std::vector<uint32_t>& clusters);
  void begin_cta(Cta& cta, Cluster& cluster, uint32_t cluster_number);
  void begin_warp(Warp& w, Cta& cta);
  void run_warp(Warp& w, int64_t slice);
  bool step(Warp& w, const Instruction& i, uint32_t mask);
  void branch(Warp& w, uint32_t target, uint32_t mask);
  bool gather_live(Warp& w, const Instruction& i, uint32_t mask);
  void gather_members(Warp& w, const Instruction& i, uint32_t mask);
  bool at_barrier(Warp& w);
  void arrive_at_cluster(Warp& w, const Instruction& i);
  bool wait_for_cluster(Warp& w, const Instruction& i);
  bool try_wait(Warp& w, const Instruction& i, uint32_t mask);
  void wake(Cluster& cluster);
  Warp& warp_of(const Cta& cta, uint32_t index) {
    return warps_[static_cast<size_t>(&cta - ctas_.data()) * cta.warps + index];
  }
  std::vector<Warp*> warps_of(const Cta& cta);
  void leave(Warp& w, uint32_t mask);
  void release(Cta& cta, Warp::State waiting);
  void release_cluster(Cluster& cluster);
  void count(const Warp& w);
  [[noreturn]] void report_deadlock() const;

  Launch& launch_;
  Kernel& kernel_;
  std::vector<Cluster> clusters_;
  std::vector<Cta> ctas_;
  std::vector<Warp> warps_;  // of the CTAs in their order
  std::vector<Block> registers_;
  std::vector<Warp*> ready_;
};

}  // namespace snv2::ptx
