// Threads: they run one at a time, lane after lane and warp after warp, each as far as it gets
// without the others.
#include <algorithm>
#include <cstring>

#include "emulator/machine.h"

namespace snv2::emulator {

namespace {

// A thread may take so many steps between two collectives.
constexpr int64_t kStepLimit = int64_t{1} << 27;
// And be in so many barriers and collectives in all.
constexpr int64_t kCollectiveLimit = int64_t{1} << 18;

}  // namespace

Machine* machine = nullptr;
const Builtins* running_builtins = nullptr;
int64_t steps_left = 0;

const char* name_of(Scope scope) {
  switch (scope) {
    case Scope::kCta:
      return "sync_threads";
    case Scope::kCluster:
      return "sync_cluster";
    case Scope::kClusterReads:
      return "sync_cluster_reads";
    case Scope::kGrid:
      return "sync_grid";
  }
  return "";
}

std::string Machine::describe(const Fiber& fiber) const {
  const Builtins& b = fiber.builtins;
  return "thread " + std::to_string(fiber.thread) + " of CTA (" + std::to_string(b.block_index.x) +
         ", " + std::to_string(b.block_index.y) + ")";
}

void Machine::fault(const std::string& what) const { throw Fault(describe(*fiber_) + ": " + what); }

void Machine::abandon(const char* what) {
  report_ = describe(*fiber_) + ": " + what;
  leave_context(scheduler_);
}

void out_of_steps() {
  steps_left = kStepLimit;  // host code takes steps too, and so may what writes the message
  if (machine != nullptr && machine->in_kernel()) {
    machine->abandon(
        "never ends: too many steps without reaching a barrier or the end of the kernel");
  }
}

void Machine::enter() {
  try {
    kernel_(params_);
    if (!fiber_->under_way.copies.empty()) {
      fault("the kernel ends with a cp.async under way: cp_async_wait is missing");
    }
    check_end();
    check_transfers();
  } catch (const std::exception& error) {
    report_ = error.what();
  }
  if (!report_.empty()) leave_context(scheduler_);
  fiber_->state = State::kDone;
  ctas_[fiber_->cta].ended = true;
  --ctas_[fiber_->cta].live;
  warp_->ready &= ~(uint32_t{1} << lane());
  if (warp_->ready != 0) {
    resume(static_cast<uint32_t>(__builtin_ctz(warp_->ready)));
    leave_context(fiber_->context);
  }
  leave_context(scheduler_);
}

// Names the thread that the next switch is to.
void Machine::resume(uint32_t lane) {
  fiber_ = &fibers_[warp_->first + lane];
  running_builtins = &fiber_->builtins;
  steps_left = kStepLimit;
}

// Runs the warp's threads until all of them wait for other warps or are done.
void Machine::run_warp(Warp& warp) {
  if (warp.ready == 0) return;
  warp_ = &warp;
  resume(static_cast<uint32_t>(__builtin_ctz(warp.ready)));
  switch_context(scheduler_, fiber_->context);
  if (!report_.empty()) {
    order_.end(fiber_->context);
    order_.end_launch();
    fiber_ = nullptr;
    throw Fault(report_);
  }
  fiber_ = nullptr;
  count_accesses(accesses_, sites_, counters_);
}

// The running thread waits, and the warp's next one goes on.
void Machine::wait(const char* what, uint32_t mask, Site site) {
  Fiber& waiting = *fiber_;
  waiting.waits_for = what;
  waiting.mask = mask;
  waiting.site = site;
  waiting.state = State::kWaiting;
  const uint32_t own = uint32_t{1} << lane();
  warp_->ready &= ~own;
  if (warp_->ready == 0) {
    switch_context(waiting.context, scheduler_);
    return;
  }
  const uint32_t later = warp_->ready & ~(own - 1);
  resume(static_cast<uint32_t>(__builtin_ctz(later != 0 ? later : warp_->ready)));
  switch_context(waiting.context, fiber_->context);
}

void Machine::tick() {
  if (++clock_ == 0) throw Fault("the emulator's clock ran over: too many barriers");
}

void Machine::count_collective() {
  if (++fiber_->collectives > kCollectiveLimit) {
    fault("never ends: too many barriers or collectives");
  }
}

void Machine::barrier(Scope scope, Site site) {
  count_collective();
  if (scope == Scope::kGrid && !shape_.cooperative) {
    fault("sync_grid at " + name_of(site) + " in a launch that is not cooperative");
  }
  ++ctas_[fiber_->cta].waiting[static_cast<int>(scope)];
  const auto index = static_cast<uint32_t>(fiber_ - fibers_.data());
  const uint32_t circle = scope == Scope::kCta    ? fiber_->cta
                          : scope == Scope::kGrid ? 0
                                                  : fiber_->cta / shape_.cluster;
  order_.arrive(scope, index, circle);
  wait(name_of(scope), 0, site);
  order_.leave(scope, index, circle);
}

void Machine::collective(const char* name, uint32_t mask, void* payload, Combine combine,
                         Site site) {
  count_collective();
  const uint32_t lane = this->lane(), own = uint32_t{1} << lane;
  if ((mask & own) == 0) {
    fault(std::string(name) + " at " + name_of(site) + " by lane " + std::to_string(lane) +
          ", which is not in its mask");
  }
  fiber_->payload = payload;
  const uint32_t others = mask & ~own;
  bool all = (warp_->in_collective & others) == others;
  for (uint32_t rest = others; all && rest != 0; rest &= rest - 1) {
    const Fiber& f = fibers_[warp_->first + static_cast<uint32_t>(__builtin_ctz(rest))];
    all = f.waits_for == name && f.mask == mask && f.site.line == site.line &&
          f.site.file == site.file;
  }
  const auto index = static_cast<uint32_t>(fiber_ - fibers_.data());
  if (combine == nullptr) order_.arrive_lane(index);
  if (all) {
    complete(mask, combine);
  } else {
    warp_->in_collective |= own;
    wait(name, mask, site);
    if (combine == nullptr) order_.leave_lane(index);
  }
}

// All lanes of the mask are there, the running one as the last.
void Machine::complete(uint32_t mask, Combine combine) {
  Fiber* const first = &fibers_[warp_->first];
  if (combine != nullptr) {
    const tsan::Unobserved unobserved;
    void* payloads[kLanes];
    for (uint32_t i = 0; i < kLanes; ++i) {
      payloads[i] = (mask >> i & 1) != 0 ? first[i].payload : nullptr;
    }
    combine(payloads, mask);
  }
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    first[__builtin_ctz(rest)].state = State::kReady;
  }
  warp_->ready |= mask;
  warp_->in_collective &= ~mask;
  steps_left = kStepLimit;
  if (mask == ~uint32_t{0}) {  // all lanes are here
    const tsan::Unobserved unobserved;
    count_accesses(accesses_, sites_, counters_);
  }
  if (combine == nullptr) order_lanes(first, mask);
}

// What any lane of the mask did or saw, all of them see.
void Machine::order_lanes(Fiber* first, uint32_t mask) {
  order_.complete_lanes(static_cast<uint32_t>(fiber_ - fibers_.data()), warp_->first, mask);
  tick();
  if (!transactions_.empty()) share_learned(first, mask, kLanes);
  if (mask == ~uint32_t{0}) {
    for (uint32_t i = 0; i < kLanes; ++i) first[i].view.warp.time = clock_;
    return;
  }
  uint32_t seen[kLanes] = {}, warp_time = 0;
  for (uint32_t i = 0; i < kLanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const View& view = first[i].view;
    warp_time = std::max(warp_time, view.warp.time);
    for (uint32_t j = 0; j < kLanes; ++j) seen[j] = std::max(seen[j], view.seen_lanes[j]);
  }
  for (uint32_t i = 0; i < kLanes; ++i) {
    if ((mask >> i & 1) != 0) seen[i] = clock_;
  }
  for (uint32_t i = 0; i < kLanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    first[i].view.warp.time = warp_time;
    std::copy(seen, seen + kLanes, first[i].view.seen_lanes);
  }
}

void Machine::release(Scope scope, uint32_t first, uint32_t threads) {
  tick();
  if (!transactions_.empty()) {
    // A barrier for reads alone is one of each CTA.
    const uint32_t circle = scope == Scope::kClusterReads ? shape_.threads : threads;
    for (uint32_t i = first; i < first + threads; i += circle) {
      share_learned(&fibers_[i], ~uint32_t{0}, circle);
    }
  }
  for (uint32_t i = first; i < first + threads; ++i) {
    Fiber& f = fibers_[i];
    f.state = State::kReady;
    f.view.cta.time = clock_;  // any barrier of more than the CTA is one of the CTA
    if (scope == Scope::kCluster) f.view.cluster.time = clock_;
    if (scope == Scope::kClusterReads) f.view.cluster_reads.time = clock_;
    if (scope == Scope::kGrid) f.view.grid.time = clock_;
  }
  const uint32_t ctas = threads / shape_.threads, first_cta = first / shape_.threads;
  const auto warps = static_cast<uint32_t>(warps_.size() / ctas_.size());
  for (uint32_t w = first_cta * warps; w < (first_cta + ctas) * warps; ++w) {
    warps_[w].ready = static_cast<uint32_t>((uint64_t{1} << warps_[w].threads) - 1);
  }
  for (uint32_t c = first_cta; c < first_cta + ctas; ++c) {
    ctas_[c].waiting[static_cast<int>(scope)] = 0;
  }
  counters_.barriers += ctas;
}

// True if a barrier had all its threads.
bool Machine::complete_barriers() {
  bool any = false;
  const auto all = static_cast<uint32_t>(ctas_.size());
  const struct {
    Scope scope;
    uint32_t ctas;
  } barriers[] = {{Scope::kCta, 1},
                  {Scope::kCluster, shape_.cluster},
                  {Scope::kClusterReads, shape_.cluster},
                  {Scope::kGrid, all}};
  for (const auto& b : barriers) {
    for (uint32_t c = 0; c < all; c += b.ctas) {
      bool arrived = true;
      for (uint32_t i = c; i < c + b.ctas && arrived; ++i) {
        arrived = ctas_[i].waiting[static_cast<int>(b.scope)] == shape_.threads;
      }
      const uint32_t first = c * shape_.threads, threads = b.ctas * shape_.threads;
      const Site site = fibers_[first].site;
      for (uint32_t i = first; i < first + threads && arrived; ++i) {
        arrived = fibers_[i].site.line == site.line && fibers_[i].site.file == site.file;
      }
      if (!arrived) continue;
      release(b.scope, first, threads);
      any = true;
    }
  }
  return any;
}

// Why nobody can go on: who waits, and who is missing.
std::string Machine::stuck() const {
  const auto waiting = std::find_if(fibers_.begin(), fibers_.end(),
                                    [](const Fiber& f) { return f.state == State::kWaiting; });
  const auto here = [&](const Fiber& f) {
    return f.state == State::kWaiting && f.waits_for == waiting->waits_for &&
           f.site.line == waiting->site.line && f.site.file == waiting->site.file &&
           f.mask == waiting->mask;
  };
  const bool warp_wide = waiting->mask != 0;
  std::string report = describe(*waiting) + " waits in " + waiting->waits_for + " at " +
                       name_of(waiting->site) + " for ";
  if (waiting->waits_for == kBarrierWait) return report + lacking(*waiting);
  const auto index = static_cast<uint32_t>(waiting - fibers_.begin());
  uint32_t first = 0, last = static_cast<uint32_t>(fibers_.size());
  if (warp_wide) {
    first = index - waiting->thread % kLanes, last = first + kLanes;
  } else if (waiting->waits_for == name_of(Scope::kCta)) {
    first = index - waiting->thread, last = first + shape_.threads;
  }
  for (uint32_t i = first; i < last; ++i) {
    if (warp_wide && (waiting->mask >> (i - first) & 1) == 0) continue;
    const bool exists = i < fibers_.size() && fibers_[i].cta == waiting->cta;
    if (warp_wide && !exists) {
      return report + "lane " + std::to_string(i - first) + ", which the CTA does not have";
    }
    const Fiber& f = fibers_[i];
    if (here(f)) continue;
    report +=
        (warp_wide ? "lane " + std::to_string(i - first) + ", " : "") + describe(f) + ", which ";
    if (f.state == State::kDone) return report + "has ended";
    report += std::string("waits in ") + f.waits_for + " at " + name_of(f.site);
    return f.waits_for == kBarrierWait ? report + " for " + lacking(f) : report;
  }
  return report + "nobody";
}

void Machine::run_group(uint64_t first_cta, uint32_t ctas) {
  begin_group(first_cta, ctas);
  do {
    woken_ = false;
    for (Warp& warp : warps_) run_warp(warp);
  } while (complete_barriers() || woken_);
  for (const Fiber& f : fibers_) {
    if (f.state != State::kDone) throw Fault(stuck());
  }
  end_group();
  counters_.ctas += ctas;
}

int cluster_rank() { return static_cast<int>(machine->rank()); }
void grid_dependency_wait() { machine->wait_for_grid(); }
void barrier(Scope scope, Site site) { machine->barrier(scope, site); }

}  // namespace snv2::emulator

// Called by the kernels' code in every basic block, so that a loop which never ends can be stopped.
extern "C" SNV2_API void __sanitizer_cov_trace_pc() { snv2::emulator::take_steps(1); }
