// Barriers in shared memory that count arrivals and bytes (mbarrier), and the copies and stores
// that they wait for.
//
// What is on its way arrives when the phase is complete, for even seeds when somebody asks whether
// it is, which is as late as it may be, for odd ones at once. A warp that has seen the phase
// complete knows what those had done who arrived and sent.
#include <algorithm>

#include "ptx/operations.h"

namespace snv2::ptx {
namespace {

constexpr uint32_t kBarrierBytes = 8;
constexpr uint32_t kBulk = 16;  // what bulk copies are aligned to
constexpr int64_t kMost = (1 << 20) - 1;

uint32_t number_of(const Warp& w) { return w.cta->rank * w.cta->warps + w.index; }

void learn(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t k = 0; k < from.size(); ++k) to[k] = std::max(to[k], from[k]);
}
void learn(Knowledge& to, const Knowledge& from) {
  learn(to.warps, from.warps);
  learn(to.phases, from.phases);
}

// The barrier at an address, of this CTA or with its rank.
uint32_t find_barrier(Warp& w, const Instruction& i, uint32_t lane, uint32_t address) {
  Cluster& cluster = *w.cta->cluster;
  const uint32_t rank = address >> kRankShift;
  const Cta* const owner = rank == 0                    ? w.cta
                           : rank > cluster.ctas.size() ? nullptr
                                                        : cluster.ctas[rank - 1];
  if (owner != nullptr) {
    const auto found = owner->transaction_barriers.find(address & ((1u << kRankShift) - 1));
    if (found != owner->transaction_barriers.end()) {
      checked_shared(w, i, lane, address, kBarrierBytes, false);
      return found->second;
    }
  }
  fault(w, i, lane, "a barrier that nobody initialised");
}

void release_to(Warp& w, TransactionBarrier& b) {
  learn(b.collected, w.learned);
  const uint32_t number = number_of(w);
  if (b.collected.warps.size() <= number) b.collected.warps.resize(number + 1);
  b.collected.warps[number] = ++w.cta->cluster->clock;
}

void complete(Cluster& cluster, uint32_t index) {
  TransactionBarrier& b = cluster.transactions[index];
  for (const Transfer& t : b.transfers) {
    uint8_t* const to = &t.cta->shared[t.address];
    if (t.from != nullptr) {
      std::memcpy(to, t.from, t.bytes);
    } else {
      std::memcpy(to, t.value, t.bytes);
    }
    std::fill_n(&t.cta->written[t.address], t.bytes, uint8_t{1});
    b.unwaited = true;
  }
  b.transfers.clear();
  ++b.phase;
  if (b.collected.phases.size() <= index) b.collected.phases.resize(index + 1);
  b.collected.phases[index] = b.phase;
  b.complete = b.collected;
  b.missing = b.arrivals;
  cluster.woken = true;
}

bool is_complete(const TransactionBarrier& b) { return b.missing == 0 && b.missing_bytes == 0; }

// After an arrival or bytes of it.
void advance(Warp& w, const Instruction& i, uint32_t lane, uint32_t index) {
  TransactionBarrier& b = w.cta->cluster->transactions[index];
  if (b.missing_bytes > kMost || b.missing_bytes < -kMost) {
    fault(w, i, lane, "a barrier's count of bytes runs over");
  }
  if (b.missing == 0 && b.missing_bytes < 0) {
    fault(w, i, lane, "more bytes than a phase of the barrier expects");
  }
  if (is_complete(b)) {
    w.cta->cluster->woken = true;  // those who wait ask again
    if (w.launch->random.seed % 2 != 0) complete(*w.cta->cluster, index);
  }
}

void initialise(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t* const a = lanes_at<uint32_t>(w, i.a);
  const uint32_t* const counts = lanes_at<uint32_t>(w, i.b);
  Cluster& cluster = *w.cta->cluster;
  for_lanes(mask, [&](uint32_t l) {
    checked_shared(w, i, l, a[l], kBarrierBytes, true);
    const auto index = static_cast<uint32_t>(cluster.transactions.size());
    if (!w.cta->transaction_barriers.try_emplace(a[l], index).second) {
      fault(w, i, l, "a barrier is initialised that is in use");
    }
    if (counts[l] < 1 || counts[l] > kMost) fault(w, i, l, "a barrier of no or too many arrivals");
    if (w.cta->read_times.empty()) {
      w.cta->read_times.assign(w.cta->warps, std::vector<uint32_t>(w.cta->readers.size()));
    }
    TransactionBarrier b;
    b.maker = number_of(w);
    b.arrivals = b.missing = counts[l];
    cluster.transactions.push_back(std::move(b));
  });
}

void fence(Warp& w, const Instruction&, uint32_t) {
  for (TransactionBarrier& b : w.cta->cluster->transactions) b.fenced |= b.maker == number_of(w);
}

void expect(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t* const a = lanes_at<uint32_t>(w, i.a);
  const uint32_t* const bytes = lanes_at<uint32_t>(w, i.b);
  for_lanes(mask, [&](uint32_t l) {
    const uint32_t index = find_barrier(w, i, l, a[l]);
    TransactionBarrier& b = w.cta->cluster->transactions[index];
    if (b.missing == 0) {
      fault(w, i, l, "more arrivals than a phase of the barrier takes, which may be under way");
    }
    --b.missing;
    b.missing_bytes += bytes[l];
    release_to(w, b);
    advance(w, i, l, index);
  });
}

// True where the phase of the parity b is complete.
void try_wait(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t* const a = lanes_at<uint32_t>(w, i.a);
  const uint32_t* const parities = lanes_at<uint32_t>(w, i.b);
  Cluster& cluster = *w.cta->cluster;
  uint32_t passed = 0;
  for_lanes(mask, [&](uint32_t l) {
    const uint32_t index = find_barrier(w, i, l, a[l]);
    TransactionBarrier& b = cluster.transactions[index];
    if (parities[l] > 1) fault(w, i, l, "a parity that is not 0 or 1");
    if (b.phase % 2 == parities[l] && is_complete(b)) complete(cluster, index);
    if (b.phase % 2 == parities[l]) return;
    passed |= 1u << l;
    learn(w.learned, b.complete);
    b.unwaited = false;
  });
  put_predicate(w, i.d, passed, mask);
}

// Of bytes that checked_shared() has found fit to be written.
void begin_transfer(Warp& w, const Instruction& i, uint32_t lane, uint32_t index,
                    const Transfer& transfer) {
  TransactionBarrier& b = w.cta->cluster->transactions[index];
  if (!b.fenced) fault(w, i, lane, "fence.mbarrier_init is missing");
  std::fill_n(&transfer.cta->written[transfer.address], transfer.bytes, uint8_t{0});
  Stamp stamp;
  stamp.warp = Stamp::kTransfer;
  stamp.barriers = index;
  stamp.time = b.phase;
  std::fill_n(&transfer.cta->writers[transfer.address / 2], transfer.bytes / 2, stamp);
  b.transfers.push_back(transfer);
  b.missing_bytes -= transfer.bytes;
  release_to(w, b);
  advance(w, i, lane, index);
}

void copy_bulk(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t* const to = lanes_at<uint32_t>(w, i.a);
  const uint64_t* const from = lanes_at<uint64_t>(w, i.b);
  const uint32_t* const barriers = lanes_at<uint32_t>(w, i.c);
  const uint32_t* const sizes = lanes_at<uint32_t>(w, i.d);
  for_lanes(mask, [&](uint32_t l) {
    if (sizes[l] == 0 || sizes[l] % kBulk != 0) fault(w, i, l, "a size that is no multiple of 16");
    for (uint32_t at = 0; at < sizes[l]; at += kBulk) {
      checked_global(w, i, l, from[l] + at, kBulk, false);
      checked_shared(w, i, l, to[l] + at, kBulk, true);
    }
    Transfer t{w.cta, to[l], sizes[l], reinterpret_cast<const uint8_t*>(from[l]), {}};
    begin_transfer(w, i, l, find_barrier(w, i, l, barriers[l]), t);
  });
}

void store_async(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t* const to = lanes_at<uint32_t>(w, i.a);
  const uint32_t* const barriers = lanes_at<uint32_t>(w, i.c);
  const uint32_t bytes = i.elements * i.element_bytes;
  for_lanes(mask, [&](uint32_t l) {
    checked_shared(w, i, l, to[l], bytes, true);
    const uint32_t rank = to[l] >> kRankShift;
    if (rank != barriers[l] >> kRankShift) {
      fault(w, i, l, "a store to one CTA that the barrier of another one waits for");
    }
    Transfer t{rank == 0 ? w.cta : w.cta->cluster->ctas[rank - 1],
               to[l] & ((1u << kRankShift) - 1),
               bytes,
               nullptr,
               {}};
    for (size_t k = 0; k < i.elements; ++k) {
      const uint32_t value = lanes_at<uint32_t>(w, operand_of(w, i, k))[l];
      std::memcpy(t.value + k * sizeof value, &value, sizeof value);
    }
    begin_transfer(w, i, l, find_barrier(w, i, l, barriers[l]), t);
  });
}

// The address a of shared memory in CTA b of the cluster.
void map_shared_to_rank(Warp& w, const Instruction& i, uint32_t mask) {
  const uint32_t* const a = lanes_at<uint32_t>(w, i.a);
  const uint32_t* const b = lanes_at<uint32_t>(w, i.b);
  alignas(Block) uint32_t d[kLanes] = {};
  for_lanes(mask, [&](uint32_t l) {
    if (b[l] >= w.launch->shape.cluster) fault(w, i, l, "mapa to a CTA that is not in the cluster");
    d[l] = (b[l] + 1) << kRankShift | (a[l] & ((1u << kRankShift) - 1));
  });
  put(w, i.d, d, mask);
}

}  // namespace

void learn_of_barrier(Cluster& cluster, const std::vector<Warp*>& warps) {
  if (cluster.transactions.empty()) return;
  Knowledge all;
  const uint32_t now = ++cluster.clock;
  for (const Warp* const w : warps) {
    learn(all, w->learned);
    const uint32_t number = number_of(*w);
    if (all.warps.size() <= number) all.warps.resize(number + 1);
    all.warps[number] = now;
  }
  for (Warp* const w : warps) w->learned = all;
}

void check_transfers(const Warp& w, const Instruction& i) {
  for (const auto& [address, index] : w.cta->transaction_barriers) {
    const TransactionBarrier& b = w.cta->cluster->transactions[index];
    if (b.unwaited || !b.transfers.empty()) {
      fault(w, i, 0, "a CTA ends with copies or stores to it under way");
    }
  }
}

void add_transactions(Operations& all) {
  all["mbarrier.init"] = initialise;
  all["fence.mbarrier_init.release.cluster"] = fence;
  all["fence.proxy.async.shared::cta"] = [](Warp&, const Instruction&, uint32_t) {};
  all["mbarrier.arrive.expect_tx"] = expect;
  all["mbarrier.try_wait"] = try_wait;
  all["cp.async.bulk"] = copy_bulk;
  all["st.async"] = store_async;
  all["mapa.shared::cluster.u32"] = map_shared_to_rank;
}

}  // namespace snv2::ptx
