// Barriers that count arrivals and bytes, and the copies and stores that they wait for.
//
// All is as late as it may be. A phase is complete when somebody waits for it, and only then has
// its copies and stores made: until then their places hold NaN, and who has not waited for the
// phase may not touch them even after.
#include "emulator/transactions.h"

#include <cstring>

#include "emulator/machine.h"

namespace snv2::emulator {
namespace {

constexpr int64_t kStepsPerTransfer = 256;
constexpr int kBarrierBytes = 8;
constexpr int kMostArrivals = (1 << 20) - 1;
constexpr int64_t kMostBytes = (1 << 20) - 1;  // that a phase may wait for
constexpr int kBulk = 16;                      // what bulk copies are aligned to
constexpr uintptr_t kSector = 32;

}  // namespace

const char* const kBarrierWait = "barrier_wait";

int64_t Machine::offset_of(const void* address, int bytes, Site site) {
  const int64_t offset = static_cast<const unsigned char*>(address) - shared();
  if (offset < 0 || offset + bytes > shape_.shared_bytes) {
    fault(std::to_string(bytes) + " bytes at " + name_of(site) + " are outside: from byte " +
          std::to_string(offset) + " of " + std::to_string(shape_.shared_bytes));
  }
  return offset;
}

// Loads and stores do not know what a barrier's bytes are.
void Machine::check_no_barrier(uint32_t cta, int64_t offset, int bytes, uint32_t site) const {
  const auto& barriers = ctas_[cta].barriers;
  const auto next = barriers.lower_bound(offset - kBarrierBytes + 1);
  if (next == barriers.end() || next->first >= offset + bytes) return;
  fault("access at " + sites_.name(site) + " to the bytes of a barrier that barrier_init at " +
        sites_.name(transactions_[next->second].made.site) + " has made");
}

void Machine::barrier_init(const void* barrier, int arrivals, Site site) {
  take_steps(kStepsPerTransfer);
  const tsan::Unobserved unobserved;
  check_aligned(barrier, kBarrierBytes, site);
  const int64_t offset = offset_of(barrier, kBarrierBytes, site);
  if (arrivals < 1 || arrivals > kMostArrivals) {
    fault("barrier_init at " + name_of(site) + " of " + std::to_string(arrivals) +
          " arrivals, which are at least 1 and fewer than 2^20");
  }
  Cta& cta = ctas_[fiber_->cta];
  const auto index = static_cast<uint32_t>(transactions_.size());
  const auto [known, is_new] = cta.barriers.try_emplace(offset, index);
  if (!is_new) {
    fault("barrier_init at " + name_of(site) + " of a barrier in use, which barrier_init at " +
          sites_.name(transactions_[known->second].made.site) + " has made");
  }
  TransactionBarrier made;
  made.cta = fiber_->cta;
  made.offset = offset;
  made.made = now(sites_.id(site));
  made.arrivals = made.missing = arrivals;
  Shadow& shadow = *shared_shadows_[fiber_->cta];
  if (!shadow.write(offset, kBarrierBytes, made.made, fiber_->view)) {
    fault("shared memory: " + shadow.explain(sites_));
  }
  transactions_.push_back(std::move(made));
}

void Machine::fence_barrier_init() {
  for (TransactionBarrier& b : transactions_) b.fenced |= b.made.thread == fiber_->view.thread;
}

// Of a CTA of the cluster. The thread must know that it was made.
uint32_t Machine::find_barrier(const char* what, uint32_t cta, int64_t offset, Site site) {
  const auto found = ctas_[cta].barriers.find(offset);
  if (found == ctas_[cta].barriers.end()) {
    fault(std::string(what) + " at " + name_of(site) +
          " of a barrier that nobody initialised: barrier_init, or a barrier after it, is missing");
  }
  Shadow& shadow = *shared_shadows_[cta];
  if (!shadow.read(offset, kBarrierBytes, now(sites_.id(site)), fiber_->view)) {
    fault(std::string(what) + " of a barrier: " + shadow.explain(sites_));
  }
  return found->second;
}

// What the running thread did, or knows that others did, those may know who wait for the phase.
void Machine::release_to(TransactionBarrier& barrier) {
  tick();
  const View& view = fiber_->view;
  Learned& to = barrier.collected;
  if (view.learned != nullptr) to.add(*view.learned);
  to.threads.resize(fibers_.size());
  const uint32_t first = view.cta.first - view.grid.first;
  for (uint32_t i = first; i < first + view.cta.threads; ++i) {
    to.threads[i] = std::max(to.threads[i], view.cta.time);
  }
  const uint32_t first_lane = view.warp.first - view.grid.first;
  for (uint32_t i = 0; i < view.warp.threads; ++i) {
    uint32_t& time = to.threads[first_lane + i];
    time = std::max({time, view.warp.time, view.seen_lanes[i]});
  }
  to.threads[view.thread - view.grid.first] = clock_;
}

void Machine::learn(View& view, const Knowledge& more) {
  if (more == nullptr || view.learned == more) return;
  if (view.learned == nullptr) {
    view.learned = more;
    return;
  }
  if (joined_[0] != view.learned || joined_[1] != more) {
    auto both = std::make_shared<Learned>(*view.learned);
    both->add(*more);
    joined_[0] = view.learned;
    joined_[1] = more;
    joined_[2] = std::move(both);
  }
  view.learned = joined_[2];
}

void Machine::share_learned(Fiber* first, uint32_t mask, uint32_t threads) {
  const auto takes_part = [&](uint32_t i) { return i >= kLanes || (mask >> i & 1) != 0; };
  View all;
  const Knowledge* last = nullptr;
  for (uint32_t i = 0; i < threads; ++i) {
    if (!takes_part(i)) continue;
    const Knowledge& mine = first[i].view.learned;
    if (last == nullptr || mine != *last) learn(all, mine);
    last = &mine;
  }
  for (uint32_t i = 0; i < threads; ++i) {
    if (takes_part(i)) first[i].view.learned = all.learned;
  }
}

void Machine::barrier_expect(const void* barrier, int bytes, Site site) {
  take_steps(kStepsPerTransfer);
  uint32_t index = 0;
  {
    const tsan::Unobserved unobserved;
    check_aligned(barrier, kBarrierBytes, site);
    index =
        find_barrier("barrier_expect", fiber_->cta, offset_of(barrier, kBarrierBytes, site), site);
    TransactionBarrier& b = transactions_[index];
    if (bytes < 0 || bytes > kMostBytes) {
      fault("barrier_expect at " + name_of(site) + " of " + std::to_string(bytes) +
            " bytes, which are at least 0 and fewer than 2^20");
    }
    if (b.missing == 0) {
      fault("barrier_expect at " + name_of(site) + " arrives once more than the " +
            std::to_string(b.arrivals) + " arrivals of a phase that barrier_init at " +
            sites_.name(b.made.site) +
            " says: the phase may be under way until somebody waits for it");
    }
    --b.missing;
    b.missing_bytes += bytes;
    release_to(b);
  }
  order_.release_transactions(index);
  advance("barrier_expect", index, site);
}

// Completes the phase if nothing is missing and somebody waits.
void Machine::advance(const char* what, uint32_t barrier, Site site) {
  TransactionBarrier& b = transactions_[barrier];
  const auto refuse = [&](const std::string& why) {
    fault(std::string(what) + " at " + name_of(site) + ": " + why);
  };
  if (b.missing_bytes > kMostBytes || b.missing_bytes < -kMostBytes) {
    refuse("the barrier's count of bytes runs over: it takes fewer than 2^20");
  }
  if (b.missing != 0 || b.missing_bytes > 0) return;
  if (b.missing_bytes < 0) {
    refuse(std::to_string(-b.missing_bytes) +
           " bytes more than expected are on their way in one phase of the barrier");
  }
  if (!b.waiting.empty()) complete_phase(barrier);
}

void Machine::complete_phase(uint32_t barrier) {
  TransactionBarrier& b = transactions_[barrier];
  order_.acquire_transactions(barrier);
  for (const Transfer& t : b.transfers) {
    std::memcpy(ctas_[t.cta].shared + t.offset, t.from != nullptr ? t.from : t.value,
                static_cast<size_t>(t.bytes));
  }
  const tsan::Unobserved unobserved;
  tick();
  for (const Transfer& t : b.transfers) {
    shared_shadows_[t.cta]->end_transfer(t.offset, t.bytes, clock_, barrier);
    b.unwaited = true;
    b.unwaited_site = t.site;
  }
  b.transfers.clear();
  if (b.collected.barriers.size() <= barrier) b.collected.barriers.resize(barrier + 1);
  b.collected.barriers[barrier] = clock_ + 1;
  b.complete = std::make_shared<const Learned>(b.collected);
  b.missing = b.arrivals;
  b.missing_bytes = 0;
  ++b.phase;
  order_.release_transactions(barrier);
  for (const uint32_t i : b.waiting) {
    Fiber& f = fibers_[i];
    f.state = State::kReady;
    learn(f.view, b.complete);
    const auto warps = static_cast<uint32_t>(warps_.size() / ctas_.size());
    warps_[f.cta * warps + f.thread / kLanes].ready |= uint32_t{1} << f.thread % kLanes;
    woken_ = true;
    b.unwaited = false;
  }
  b.waiting.clear();
}

void Machine::barrier_wait(const void* barrier, int parity, Site site) {
  count_collective();
  take_steps(kStepsPerTransfer);
  uint32_t index = 0;
  bool wanted = false, arrived = false;  // the phase that is not yet complete; all of it
  {
    const tsan::Unobserved unobserved;
    check_aligned(barrier, kBarrierBytes, site);
    index = find_barrier(kBarrierWait, fiber_->cta, offset_of(barrier, kBarrierBytes, site), site);
    TransactionBarrier& b = transactions_[index];
    if (parity != 0 && parity != 1) {
      fault("barrier_wait at " + name_of(site) + " for parity " + std::to_string(parity) +
            ", which is 0 or 1");
    }
    wanted = static_cast<int>(b.phase % 2) == parity;
    arrived = wanted && b.missing == 0 && b.missing_bytes == 0;
    if (wanted && !arrived) {
      b.waiting.push_back(static_cast<uint32_t>(fiber_ - fibers_.data()));
      fiber_->waits_on = index;
    }
  }
  if (arrived) complete_phase(index);
  if (wanted && !arrived) {
    wait(kBarrierWait, 0, site);
  } else {
    const tsan::Unobserved unobserved;
    learn(fiber_->view, transactions_[index].complete);
    transactions_[index].unwaited = false;
  }
  order_.acquire_transactions(index);
}

void Machine::begin_transfer(const char* what, uint32_t barrier, const Transfer& transfer,
                             Site site) {
  const Transfer& t = transfer;
  {
    const tsan::Unobserved unobserved;
    if (!transactions_[barrier].fenced) {
      fault(std::string(what) + " at " + name_of(site) + " to a barrier that barrier_init at " +
            sites_.name(transactions_[barrier].made.site) +
            " has made: fence_barrier_init after it is missing");
    }
    check_no_barrier(t.cta, t.offset, t.bytes, t.site);
    Shadow& shadow = *shared_shadows_[t.cta];
    if (!shadow.begin_transfer(t.offset, t.bytes, now(t.site), fiber_->view, barrier)) {
      fault("shared memory: " + shadow.explain(sites_));
    }
  }
  std::memset(ctas_[t.cta].shared + t.offset, 0xff, static_cast<size_t>(t.bytes));
  {
    const tsan::Unobserved unobserved;
    TransactionBarrier& b = transactions_[barrier];
    b.transfers.push_back(t);
    b.missing_bytes -= t.bytes;
    release_to(b);
  }
  order_.release_transactions(barrier);
  advance(what, barrier, site);
}

void Machine::copy_bulk(const void* to, const void* from, int bytes, const void* barrier,
                        Site site) {
  take_steps(kStepsPerTransfer);
  if (bytes <= 0 || bytes % kBulk != 0) {
    fault("copy_bulk at " + name_of(site) + " of " + std::to_string(bytes) +
          " bytes, which are no multiple of 16");
  }
  Transfer t{fiber_->cta, 0, bytes, static_cast<const unsigned char*>(from), {}, sites_.id(site)};
  uint32_t index = 0;
  {
    const tsan::Unobserved unobserved;
    check_aligned(to, kBulk, site);
    check_aligned(from, kBulk, site);
    check_aligned(barrier, kBarrierBytes, site);
    check_global(t.from, bytes, false, site);
    t.offset = offset_of(to, bytes, site);
    index = find_barrier("copy_bulk", t.cta, offset_of(barrier, kBarrierBytes, site), site);
  }
  const auto address = reinterpret_cast<uintptr_t>(from);
  counters_.global_load_bytes += bytes;
  counters_.global_load_sectors += static_cast<int64_t>(
      (address + static_cast<uintptr_t>(bytes) - 1) / kSector - address / kSector + 1);
  begin_transfer("copy_bulk", index, t, site);
}

void Machine::store_async(const void* to, const void* barrier, int rank, const void* value,
                          int bytes, Site site) {
  take_steps(kStepsPerTransfer);
  if (rank < 0 || static_cast<uint32_t>(rank) >= shape_.cluster) {
    fault("store_async at " + name_of(site) + ": rank " + std::to_string(rank) +
          " is outside the cluster of " + std::to_string(shape_.cluster));
  }
  const uint32_t cta = fiber_->cta - fiber_->cta % shape_.cluster + static_cast<uint32_t>(rank);
  Transfer t{cta, 0, bytes, nullptr, {}, sites_.id(site)};
  std::memcpy(t.value, value, static_cast<size_t>(bytes));
  uint32_t index = 0;
  {
    const tsan::Unobserved unobserved;
    check_aligned(to, bytes, site);
    check_aligned(barrier, kBarrierBytes, site);
    t.offset = offset_of(to, bytes, site);
    const View& view = fiber_->view;
    if (cta != fiber_->cta && view.cluster.time == 0 && view.cluster_reads.time == 0 &&
        view.grid.time == 0) {
      fault("store_async at " + name_of(site) +
            " to the shared memory of a CTA that may not have begun: it needs a sync_cluster at "
            "its beginning");
    }
    if (ctas_[cta].live == 0) {
      fault("store_async at " + name_of(site) +
            " to the shared memory of a CTA that may have ended: it needs a sync_cluster at its "
            "end");
    }
    index = find_barrier("store_async", cta, offset_of(barrier, kBarrierBytes, site), site);
    accesses_[lane()].push_back(
        {static_cast<uint64_t>(t.offset), Access::pack(t.site, bytes, true, true)});
  }
  begin_transfer("store_async", index, t, site);
}

// The last thread of a CTA ends: what somebody sent, somebody must have waited for.
void Machine::check_transfers() const {
  const Cta& cta = ctas_[fiber_->cta];
  if (cta.live > 1) return;
  for (const auto& [offset, index] : cta.barriers) {
    const TransactionBarrier& b = transactions_[index];
    if (!b.unwaited && b.transfers.empty()) continue;
    const uint32_t site = b.transfers.empty() ? b.unwaited_site : b.transfers[0].site;
    fault("the CTA ends with a copy_bulk or store_async to it under way, issued at " +
          sites_.name(site) + ": barrier_wait is missing");
  }
}

// What a thread in barrier_wait waits for.
std::string Machine::lacking(const Fiber& fiber) const {
  const TransactionBarrier& b = transactions_[fiber.waits_on];
  return "phase " + std::to_string(b.phase) + " of the barrier that barrier_init at " +
         sites_.name(b.made.site) + " has made: " + std::to_string(b.missing) + " of " +
         std::to_string(b.arrivals) + " arrivals and " + std::to_string(b.missing_bytes) +
         " bytes are missing";
}

void barrier_init(const void* barrier, int arrivals, Site site) {
  machine->barrier_init(barrier, arrivals, site);
}
void fence_barrier_init() { machine->fence_barrier_init(); }
void barrier_expect(const void* barrier, int bytes, Site site) {
  machine->barrier_expect(barrier, bytes, site);
}
void barrier_wait(const void* barrier, int parity, Site site) {
  machine->barrier_wait(barrier, parity, site);
}
void copy_bulk(void* to, const void* from, int bytes, const void* barrier, Site site) {
  machine->copy_bulk(to, from, bytes, barrier, site);
}
void store_async(const void* to, const void* barrier, int rank, const void* value, int bytes,
                 Site site) {
  machine->store_async(to, barrier, rank, value, bytes, site);
}

}  // namespace snv2::emulator
