// The order of warps, their divergence and their barriers.
//
// The lanes of a warp that stand at one instruction run together: those at the lowest place in the
// code go on, and take up others where they meet them. Lanes that wait for others of their warp
// step back until they have come. A warp runs until it waits for other warps, or for as long as the
// seed says.
#include "ptx/scheduler.h"

#include <algorithm>

namespace snv2::ptx {
namespace {

constexpr int64_t kLongSlice = 1 << 20;
constexpr uint32_t kMaxShortSlice = 400;
constexpr uint64_t kMostInstructions = 20'000'000'000;  // of a launch: it will not end

void find_next_pc(Warp& w) {
  w.next_pc = UINT32_MAX;
  for (const LaneGroup& g : w.others) {
    if (!g.waits) w.next_pc = std::min(w.next_pc, g.pc);
  }
}

// Lanes of the groups at the warp's place join its current ones, those that wait too or not.
void join(Warp& w, bool those_that_wait) {
  const auto joins = [&](const LaneGroup& g) {
    return g.pc == w.pc && (those_that_wait || !g.waits);
  };
  for (const LaneGroup& g : w.others) {
    if (joins(g)) w.mask |= g.mask;
  }
  w.others.erase(std::remove_if(w.others.begin(), w.others.end(), joins), w.others.end());
  find_next_pc(w);
}

void step_back(Warp& w, uint32_t pc, uint32_t mask, bool waits) {
  if (mask == 0) return;
  const auto same = std::find_if(w.others.begin(), w.others.end(), [&](const LaneGroup& g) {
    return g.pc == pc && g.waits == waits;
  });
  if (same != w.others.end()) {
    same->mask |= mask;
  } else {
    w.others.push_back({pc, mask, waits});
  }
  find_next_pc(w);
}

// Lanes that have stepped back from a barrier that counts ask it again.
void ask_again(Warp& w) {
  for (LaneGroup& g : w.others) {
    if (w.kernel->code[g.pc].flow == Flow::kTransactionWait) g.waits = false;
  }
  find_next_pc(w);
}

// The lanes at the lowest place become the current ones. False if none can go on.
bool choose_lowest(Warp& w) {
  if (w.next_pc == UINT32_MAX) ask_again(w);
  if (w.next_pc == UINT32_MAX) return false;
  w.pc = w.next_pc;
  w.mask = 0;
  join(w, false);
  return true;
}

[[noreturn]] void report_stuck(const Warp& w, const Instruction& i) {
  std::string lanes;
  for (const LaneGroup& g : w.others) {
    const Instruction& at = w.kernel->code[g.pc];
    lanes += "; " + std::to_string(__builtin_popcount(g.mask)) + " of them at `" +
             std::string(at.text) + "`";
  }
  fault(w, i, 0, "lanes wait for each other" + lanes);
}

// The current lanes wait for others of the warp.
void wait_for_lanes(Warp& w, const Instruction& i) {
  step_back(w, w.pc, w.mask, true);
  w.mask = 0;
  if (!choose_lowest(w)) report_stuck(w, i);
}

}  // namespace

void Scheduler::run(const std::vector<uint32_t>& clusters) {
  begin(clusters);
  size_t turn = 0;
  for (size_t live = warps_.size(); live > 0;) {
    if (ready_.empty()) report_deadlock();
    Random& random = launch_.random;
    int64_t slice = kLongSlice;
    if (random.seed != 0) {
      turn = random.next();
      slice = 1 + random.next() % kMaxShortSlice;
    }
    turn %= ready_.size();
    Warp& w = *ready_[turn];
    run_warp(w, slice);
    if (w.state == Warp::State::kDone) --live;
    if (w.state == Warp::State::kReady) {
      ++turn;
    } else {
      ready_.erase(std::find(ready_.begin(), ready_.end(), &w));
    }
  }
}

void Scheduler::begin(const std::vector<uint32_t>& clusters) {
  const LaunchShape& shape = launch_.shape;
  const uint32_t warps = (shape.threads + kLanes - 1) / kLanes;
  // No element moves once others point to it.
  clusters_.assign(clusters.size(), {});
  ctas_.resize(clusters.size() * shape.cluster);
  warps_.assign(ctas_.size() * warps, {});
  // Registers and shared memory hold anything.
  const uint8_t anything = launch_.random.seed % 3 == 1 ? 0x00 : 0xff;
  Block filled;
  std::fill(std::begin(filled.bytes), std::end(filled.bytes), anything);
  registers_.assign(warps_.size() * kernel_.register_blocks, filled);
  ready_.clear();
  for (size_t c = 0; c < clusters.size(); ++c) {
    clusters_[c].live_threads = shape.cluster * shape.threads;
    for (uint32_t rank = 0; rank < shape.cluster; ++rank) {
      Cta& cta = ctas_[c * shape.cluster + rank];
      cta.rank = rank;
      cta.warps = cta.live_warps = warps;
      begin_cta(cta, clusters_[c], clusters[c]);
      std::fill(cta.shared.begin(), cta.shared.end(), anything);
      clusters_[c].ctas.push_back(&cta);
    }
  }
}

void Scheduler::begin_cta(Cta& cta, Cluster& cluster, uint32_t cluster_number) {
  const LaunchShape& shape = launch_.shape;
  const size_t end = kSharedBase + shape.shared_bytes;
  cta.shared.resize(end);
  cta.written.assign(end, 0);
  cta.writers.assign(end / 2 + 1, {});
  cta.readers.assign(end / 2 + 1, {});
  cta.cluster = &cluster;
  const uint32_t clusters_in_row = shape.grid_x / shape.cluster;
  cta.x = cluster_number % clusters_in_row * shape.cluster + cta.rank;
  cta.y = cluster_number / clusters_in_row;
  cta.arrived_warps = cta.barriers = 0;
  cta.transaction_barriers.clear();
  cta.read_times.clear();
  const size_t first = static_cast<size_t>(&cta - ctas_.data()) * cta.warps;
  for (uint32_t i = 0; i < cta.warps; ++i) {
    Warp& w = warps_[first + i];
    w.index = i;
    begin_warp(w, cta);
    ready_.push_back(&w);
  }
}

void Scheduler::begin_warp(Warp& w, Cta& cta) {
  w.kernel = &kernel_;
  w.launch = &launch_;
  w.cta = &cta;
  const size_t number = static_cast<size_t>(&w - warps_.data());
  w.registers = registers_[number * kernel_.register_blocks].bytes;
  w.constants = kernel_.constants.empty() ? nullptr : kernel_.constants[0].bytes;
  const uint32_t threads = launch_.shape.threads - kLanes * w.index;
  w.live = w.mask = threads >= kLanes ? kAllLanes : (1u << threads) - 1;
  w.next_pc = UINT32_MAX;
  for (const Kernel::Special& special : kernel_.specials) {
    uint32_t values[kLanes];
    for (uint32_t l = 0; l < kLanes; ++l) values[l] = special_value(special.index, w, l);
    put(w, special.place, values, kAllLanes);
  }
}

void Scheduler::count(const Warp& w) {
  ++kernel_.executed[w.pc];
  if (++launch_.instructions > kMostInstructions) {
    fault(w, kernel_.code[w.pc], 0, "the kernel does not end");
  }
}

void Scheduler::run_warp(Warp& w, int64_t slice) {
  for (; slice > 0; --slice) {
    if (w.mask == 0 || w.pc >= w.next_pc) {
      step_back(w, w.pc, w.mask, false);
      if (!choose_lowest(w)) report_stuck(w, kernel_.code[w.others[0].pc]);
    }
    const Instruction& i = kernel_.code[w.pc];
    uint32_t mask = w.mask;
    if (i.predicate != kNowhere) {
      const uint32_t p = predicate_at(w, i.predicate);
      mask &= i.negated ? ~p : p;
    }
    if (!step(w, i, mask)) return;
  }
}

// False if other warps are to run.
bool Scheduler::step(Warp& w, const Instruction& i, uint32_t mask) {
  if (mask == 0) {  // issued for nobody
    count(w);
    ++w.pc;
    return true;
  }
  switch (i.flow) {
    case Flow::kNext:
    case Flow::kYield:
      count(w);
      i.operation(w, i, mask);
      ++w.pc;
      return i.flow == Flow::kNext;
    case Flow::kBranch:
      count(w);
      branch(w, static_cast<uint32_t>(i.immediate), mask);
      return true;
    case Flow::kReturn:
      count(w);
      leave(w, mask);
      ++w.pc;
      return w.state != Warp::State::kDone;
    case Flow::kTrap:
      fault(w, i, static_cast<uint32_t>(__builtin_ctz(mask)), "a trap");
    case Flow::kMembers:
      gather_members(w, i, mask);
      return true;
    case Flow::kTransaction:
      count(w);
      i.operation(w, i, mask);
      ++w.pc;
      wake(*w.cta->cluster);
      return true;
    case Flow::kTransactionWait:
      return try_wait(w, i, mask);
    default:
      break;
  }
  if (!gather_live(w, i, mask)) return true;
  switch (i.flow) {
    case Flow::kBarrier:
      count(w);
      return at_barrier(w);
    case Flow::kClusterArrive:
      count(w);
      arrive_at_cluster(w, i);
      return true;
    case Flow::kClusterWait:
      return wait_for_cluster(w, i);
    default:  // kWholeWarp
      count(w);
      i.operation(w, i, w.mask);
      ++w.pc;
      return true;
  }
}

void Scheduler::branch(Warp& w, uint32_t target, uint32_t mask) {
  const uint32_t rest = w.mask & ~mask;
  if (rest == 0) {
    w.pc = target;
    return;
  }
  w.mask = rest;
  ++w.pc;
  step_back(w, target, mask, false);
}

// Whether all lanes of the warp that have not returned are there; else they are waited for.
bool Scheduler::gather_live(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t passing = w.mask & ~mask;
  w.mask = mask;
  step_back(w, w.pc + 1, passing, false);
  join(w, true);
  if (w.mask == w.live) return true;
  wait_for_lanes(w, i);
  return false;
}

// Lanes that name each other in their masks (operand 0 of the list) do it when all of them are
// there.
void Scheduler::gather_members(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t passing = w.mask & ~mask;
  w.mask = mask;
  step_back(w, w.pc + 1, passing, false);
  join(w, true);
  const uint32_t* const members = lanes_at<uint32_t>(w, operand_of(w, i, 0));
  uint32_t complete = 0;
  for_lanes(w.mask, [&](uint32_t l) {
    if ((members[l] >> l & 1) == 0) fault(w, i, l, "a lane is not in its own mask");
    uint32_t same = 0;
    for_lanes(w.mask, [&](uint32_t k) { same |= uint32_t{members[k] == members[l]} << k; });
    if ((members[l] & w.live) == same) complete |= 1u << l;
  });
  if (complete == 0) {
    wait_for_lanes(w, i);
    return;
  }
  const uint32_t waiting = w.mask & ~complete;
  w.mask = complete;
  count(w);
  i.operation(w, i, complete);
  step_back(w, w.pc, waiting, true);
  ++w.pc;
}

// Barriers -----------------------------------------------------------------------------------

bool Scheduler::at_barrier(Warp& w) {
  w.state = Warp::State::kAtBarrier;
  if (++w.cta->arrived_warps < w.cta->live_warps) return false;
  w.cta->arrived_warps = 0;
  if (!w.cta->cluster->transactions.empty()) learn_of_barrier(*w.cta->cluster, warps_of(*w.cta));
  release(*w.cta, Warp::State::kAtBarrier);
  return true;
}

void Scheduler::arrive_at_cluster(Warp& w, const Instruction& i) {
  if (w.arrived) fault(w, i, 0, "barrier.cluster.arrive twice, without a wait between");
  Cluster& cluster = *w.cta->cluster;
  w.arrived = true;
  w.arrived_at = cluster.barriers;
  cluster.arrived_threads += static_cast<uint32_t>(__builtin_popcount(w.mask));
  ++w.pc;
  if (cluster.arrived_threads == cluster.live_threads) release_cluster(cluster);
}

// A warp asks whether a phase is complete, and again only after there is something new.
bool Scheduler::try_wait(Warp& w, const Instruction& i, uint32_t mask) {
  count(w);
  i.operation(w, i, mask);
  wake(*w.cta->cluster);
  const uint32_t passed = predicate_at(w, i.d) & mask;
  if (passed != 0 || mask != w.mask) {
    ++w.pc;
    return passed == mask;
  }
  if (w.next_pc == UINT32_MAX) {
    w.state = Warp::State::kAtTransaction;
    return false;
  }
  step_back(w, w.pc, w.mask, true);
  w.mask = 0;
  choose_lowest(w);
  return true;
}

void Scheduler::wake(Cluster& cluster) {
  if (!cluster.woken) return;
  cluster.woken = false;
  for (const Cta* const cta : cluster.ctas) {
    for (uint32_t i = 0; i < cta->warps; ++i) {
      Warp& w = warp_of(*cta, i);
      ask_again(w);
      if (w.state != Warp::State::kAtTransaction) continue;
      w.state = Warp::State::kReady;
      ready_.push_back(&w);
    }
  }
}

std::vector<Warp*> Scheduler::warps_of(const Cta& cta) {
  std::vector<Warp*> all;
  for (uint32_t i = 0; i < cta.warps; ++i) all.push_back(&warp_of(cta, i));
  return all;
}

bool Scheduler::wait_for_cluster(Warp& w, const Instruction& i) {
  if (!w.arrived) fault(w, i, 0, "barrier.cluster.wait without an arrive");
  count(w);
  if (w.cta->cluster->barriers == w.arrived_at) {
    w.state = Warp::State::kAtClusterBarrier;
    return false;
  }
  w.arrived = false;
  ++w.pc;
  return true;
}

void Scheduler::release(Cta& cta, Warp::State waiting) {
  ++cta.barriers;
  const size_t first = static_cast<size_t>(&cta - ctas_.data()) * cta.warps;
  for (uint32_t i = 0; i < cta.warps; ++i) {
    Warp& w = warps_[first + i];
    if (w.state != waiting) continue;
    w.state = Warp::State::kReady;
    if (waiting == Warp::State::kAtClusterBarrier) w.arrived = false;
    ++w.pc;
    if (std::find(ready_.begin(), ready_.end(), &w) == ready_.end()) ready_.push_back(&w);
  }
}

void Scheduler::release_cluster(Cluster& cluster) {
  cluster.arrived_threads = 0;
  ++cluster.barriers;
  if (!cluster.transactions.empty()) {
    std::vector<Warp*> all;
    for (const Cta* const cta : cluster.ctas) {
      for (Warp* const w : warps_of(*cta)) all.push_back(w);
    }
    learn_of_barrier(cluster, all);
  }
  for (Cta* const cta : cluster.ctas) release(*cta, Warp::State::kAtClusterBarrier);
}

void Scheduler::leave(Warp& w, uint32_t mask) {
  const Instruction& i = kernel_.code[w.pc];
  if (w.arrived) fault(w, i, 0, "a thread ends between arrive and wait of its cluster");
  w.live &= ~mask;
  w.mask &= ~mask;
  // Others may wait for those that have left.
  for (LaneGroup& g : w.others) g.waits = false;
  find_next_pc(w);
  Cta& cta = *w.cta;
  Cluster& cluster = *cta.cluster;
  cluster.live_threads -= static_cast<uint32_t>(__builtin_popcount(mask));
  if (w.live == 0) {
    if (!w.copies.empty()) fault(w, i, 0, "a thread ends with copies under way");
    w.state = Warp::State::kDone;
    if (--cta.live_warps == 0) check_transfers(w, i);
    if (cta.live_warps > 0 && cta.arrived_warps == cta.live_warps) {
      cta.arrived_warps = 0;
      if (!cluster.transactions.empty()) learn_of_barrier(cluster, warps_of(cta));
      release(cta, Warp::State::kAtBarrier);
    }
  }
  if (cluster.arrived_threads != 0 && cluster.arrived_threads == cluster.live_threads) {
    release_cluster(cluster);
  }
}

void Scheduler::report_deadlock() const {
  std::string waiting;
  for (const Warp& w : warps_) {
    if (w.state == Warp::State::kDone || waiting.size() > 400) continue;
    waiting += "; warp " + std::to_string(w.index) + " of CTA (" + std::to_string(w.cta->x) + ", " +
               std::to_string(w.cta->y) + ") at `" + std::string(kernel_.code[w.pc].text) + "`";
  }
  throw Fault("warps wait for each other" + waiting + ", of " + kernel_.name);
}

}  // namespace snv2::ptx
