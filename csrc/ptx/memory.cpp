// Accesses to memory and their checks.
#include <algorithm>

#include "ptx/machine.h"

namespace snv2::ptx {
namespace {

[[noreturn]] void refuse(const Warp& w, const Instruction& i, uint32_t lane, bool write,
                         uint32_t bytes, const std::string& why) {
  fault(
      w, i, lane,
      std::string(write ? "a store" : "a load") + " of " + std::to_string(bytes) + " bytes " + why);
}

bool is_race(const Stamp& mine, const Stamp& other) {
  if (other.warp == Stamp::kNobody) return false;
  if (other.rank != mine.rank) return other.cluster_barriers == mine.cluster_barriers;
  return other.warp != mine.warp && other.barriers == mine.barriers;
}

// Whether the warp knows, by barriers that count, that it was before.
bool knows(const Warp& w, const Stamp& s) {
  const std::vector<uint32_t>& known =
      s.warp == Stamp::kTransfer ? w.learned.phases : w.learned.warps;
  const size_t number = s.warp == Stamp::kTransfer ? s.barriers : s.rank * w.cta->warps + s.warp;
  return number < known.size() && s.time < known[number];
}
// Of several readers, all of the CTA.
bool knows_readers(const Warp& w, const Cta& owner, uint32_t at) {
  if (owner.read_times.empty()) return false;
  for (uint32_t k = 0; k < owner.warps; ++k) {
    Stamp reader;
    reader.warp = static_cast<uint8_t>(k);
    reader.rank = static_cast<uint8_t>(owner.rank);
    reader.time = owner.read_times[k][at];
    const bool own = &owner == w.cta && k == w.index;
    if (reader.time != 0 && !own && !knows(w, reader)) return false;
  }
  return true;
}

// Two warps touch the same two bytes of shared memory, one of them writes, and there was no
// barrier.
void check_race(Warp& w, const Instruction& i, uint32_t lane, Cta& owner, uint32_t address,
                uint32_t bytes, bool write) {
  const Cta& cta = *w.cta;
  const Stamp mine{cta.barriers, cta.cluster->clock, static_cast<uint16_t>(cta.cluster->barriers),
                   static_cast<uint8_t>(cta.rank), static_cast<uint8_t>(w.index)};
  for (uint32_t at = address / 2; at < (address + bytes + 1) / 2; ++at) {
    const Stamp& writer = owner.writers[at];
    if (writer.warp == Stamp::kTransfer) {
      if (!knows(w, writer)) {
        fault(
            w, i, lane,
            std::string("a race: it ") + (write ? "overwrites" : "reads") +
                " shared memory to which a copy or store may be under way, without a wait for its "
                "barrier");
      }
    } else if (is_race(mine, writer) && !knows(w, writer)) {
      fault(w, i, lane,
            std::string("a race: it ") + (write ? "overwrites" : "reads") +
                " shared memory that another warp wrote, without a barrier between");
    }
    Stamp& reader = owner.readers[at];
    if (write) {
      const bool known =
          reader.warp == Stamp::kSeveral ? knows_readers(w, owner, at) : knows(w, reader);
      if (is_race(mine, reader) && !known) {
        fault(w, i, lane,
              "a race: it overwrites shared memory that another warp read, without a barrier "
              "between");
      }
      owner.writers[at] = mine;
    } else {
      if (!owner.read_times.empty() && &owner == &cta) owner.read_times[w.index][at] = mine.time;
      if (is_race(mine, reader)) {  // none between readers, but both are to be remembered
        reader.warp = Stamp::kSeveral;
      } else {
        reader = mine;
      }
    }
  }
}

uint64_t address_of(Warp& w, const Instruction& i, uint32_t lane) {
  const auto offset = static_cast<uint64_t>(int64_t{i.immediate});
  if (i.a == kNowhere) return offset;
  if (i.wide_address) return lanes_at<uint64_t>(w, i.a)[lane] + offset;
  return lanes_at<uint32_t>(w, i.a)[lane] + static_cast<uint32_t>(offset);
}

// Whether all of them lie in one buffer where the access is allowed, as they do mostly.
bool all_in_one_buffer(const Warp& w, uint64_t begin, uint64_t end, bool write) {
  const bool early = w.launch->shape.overlaps && !w.waited;
  return std::any_of(w.launch->buffers.begin(), w.launch->buffers.end(), [&](const Buffer& b) {
    return begin >= b.begin && end <= b.end && (b.written || !write) && (b.constant || !early);
  });
}

}  // namespace

void fault(const Warp& w, const Instruction& i, uint32_t lane, const std::string& what) {
  const Kernel& kernel = *w.kernel;
  throw Fault(what + ": thread " + std::to_string(kLanes * w.index + lane) + " of CTA (" +
              std::to_string(w.cta->x) + ", " + std::to_string(w.cta->y) + ") at " +
              name_of(kernel, i.location) + ", `" + std::string(i.text) + "` of " + kernel.name);
}

uint8_t* checked_global(Warp& w, const Instruction& i, uint32_t lane, uint64_t address,
                        uint32_t bytes, bool write) {
  if (address % bytes != 0) refuse(w, i, lane, write, bytes, "that is not aligned to its size");
  const Buffer* found = nullptr;
  for (const Buffer& b : w.launch->buffers) {
    if (address < b.begin || address + bytes > b.end) continue;
    found = &b;
    if (b.written) break;
  }
  if (found == nullptr) refuse(w, i, lane, write, bytes, "outside all buffers of the launch");
  if (write && !found->written) {
    refuse(w, i, lane, write, bytes, "to a buffer that the launch declared as read");
  }
  if (w.launch->shape.overlaps && !w.waited && !found->constant) {
    refuse(w, i, lane, write, bytes,
           "before griddepcontrol.wait, in a launch that overlaps with the one before it");
  }
  return reinterpret_cast<uint8_t*>(address);
}

uint8_t* checked_shared(Warp& w, const Instruction& i, uint32_t lane, uint64_t address,
                        uint32_t bytes, bool write) {
  Cta* owner = w.cta;
  const std::vector<Cta*>& ctas = w.cta->cluster->ctas;
  const uint64_t rank = address >> kRankShift;
  if (rank > ctas.size() || (rank != 0 && i.space != Space::kGeneric)) {
    refuse(w, i, lane, write, bytes, "outside shared memory");
  }
  if (rank != 0) {
    owner = ctas[rank - 1];
    if (owner->live_warps == 0) {
      refuse(w, i, lane, write, bytes, "of the shared memory of a CTA that has ended");
    }
    if (owner != w.cta && w.cta->cluster->barriers == 0) {
      refuse(w, i, lane, write, bytes, "of the shared memory of a CTA that may not have begun");
    }
  }
  const uint32_t at = static_cast<uint32_t>(address) & ((1u << kRankShift) - 1);
  if (at % bytes != 0) refuse(w, i, lane, write, bytes, "that is not aligned to its size");
  if (at < kSharedBase || at + bytes > owner->shared.size()) {
    refuse(w, i, lane, write, bytes,
           "outside shared memory: byte " + std::to_string(int64_t{at} - kSharedBase) + " of " +
               std::to_string(owner->shared.size() - kSharedBase));
  }
  uint8_t* const written = &owner->written[at];
  if (write) {
    std::fill_n(written, bytes, uint8_t{1});
  } else if (std::find(written, written + bytes, 0) != written + bytes) {
    refuse(w, i, lane, write, bytes,
           "of shared memory that nobody wrote, or that a copy under way will write");
  }
  check_race(w, i, lane, *owner, at, bytes, write);
  return &owner->shared[at];
}

void checked_addresses(Warp& w, const Instruction& i, uint32_t mask, uint32_t bytes, bool write,
                       uint8_t* (&pointers)[kLanes]) {
  uint64_t addresses[kLanes];
  for_lanes(mask, [&](uint32_t l) { addresses[l] = address_of(w, i, l); });
  switch (i.space) {
    case Space::kParameter:
      for_lanes(mask, [&](uint32_t l) {
        if (addresses[l] + bytes > w.launch->parameters.size()) {
          refuse(w, i, l, write, bytes, "outside the parameters");
        }
        pointers[l] = const_cast<uint8_t*>(w.launch->parameters.data()) + addresses[l];
      });
      break;
    case Space::kGlobal: {
      uint64_t first = ~uint64_t{0}, last = 0, bits = 0;
      for_lanes(mask, [&](uint32_t l) {
        first = std::min(first, addresses[l]);
        last = std::max(last, addresses[l]);
        bits |= addresses[l];
        pointers[l] = reinterpret_cast<uint8_t*>(addresses[l]);
      });
      if (bits % bytes == 0 && all_in_one_buffer(w, first, last + bytes, write)) break;
      for_lanes(mask, [&](uint32_t l) { checked_global(w, i, l, addresses[l], bytes, write); });
      break;
    }
    case Space::kShared:
      for_lanes(mask, [&](uint32_t l) {
        pointers[l] = checked_shared(w, i, l, addresses[l], bytes, write);
      });
      break;
    case Space::kGeneric:
      for_lanes(mask, [&](uint32_t l) {
        pointers[l] = (addresses[l] & kWindows) == kSharedWindow
                          ? checked_shared(w, i, l, addresses[l] & ~kWindows, bytes, write)
                          : checked_global(w, i, l, addresses[l], bytes, write);
      });
      break;
  }
}

// The bytes arrive as late as they may: at the wait. Until then nobody may read them.
void begin_copies(Warp& w, const Instruction& i, uint32_t mask) {
  Copy copy{};
  copy.mask = mask;
  copy.bytes = i.element_bytes;
  const uint32_t* const to = lanes_at<uint32_t>(w, i.a);
  const uint64_t* const from = lanes_at<uint64_t>(w, i.b);
  const auto source_offset = static_cast<uint64_t>(int64_t{i.d});
  for_lanes(mask, [&](uint32_t l) {
    copy.to[l] = to[l] + static_cast<uint32_t>(i.immediate);
    copy.from[l] = from[l] + source_offset;
    copy.group[l] = w.committed[l];
    checked_global(w, i, l, copy.from[l], copy.bytes, false);
    checked_shared(w, i, l, copy.to[l], copy.bytes, true);
    std::fill_n(&w.cta->written[copy.to[l]], copy.bytes, uint8_t{0});
  });
  w.copies.push_back(copy);
}

void complete_copies(Warp& w, const Instruction& i, uint32_t mask, uint32_t pending) {
  for (Copy& copy : w.copies) {
    for_lanes(mask & copy.mask, [&](uint32_t l) {
      if (copy.group[l] + pending >= w.committed[l]) return;
      std::memcpy(checked_shared(w, i, l, copy.to[l], copy.bytes, true),
                  reinterpret_cast<const void*>(copy.from[l]), copy.bytes);
      copy.mask &= ~(1u << l);
    });
  }
  w.copies.erase(std::remove_if(w.copies.begin(), w.copies.end(),
                                [](const Copy& copy) { return copy.mask == 0; }),
                 w.copies.end());
}

}  // namespace snv2::ptx
