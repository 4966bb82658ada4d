// Accesses to memory, checked and counted.
#include <cstring>

#include "emulator/machine.h"

namespace snv2::emulator {
namespace {

constexpr int64_t kStepsPerAccess = 256;

}  // namespace

void Machine::add(const Region& region, bool fill) {
  Memory memory{region, nullptr, true};
  for (Memory& other : memory_) {
    const Region& r = other.region;
    const bool overlap = region.bytes > 0 && r.bytes > 0 && region.address < r.address + r.bytes &&
                         r.address < region.address + region.bytes;
    if (!overlap) continue;
    memory.alone = other.alone = false;
    const bool both_written = region.written && r.written;
    const bool constant_written = (region.constant && r.written) || (region.written && r.constant);
    if (both_written || constant_written) {
      throw std::invalid_argument(
          std::string("launch: a buffer that is written overlaps with another that is ") +
          (both_written ? "written" : "constant"));
    }
  }
  if (region.undefined && fill)
    std::memset(region.address, 0xff, static_cast<size_t>(region.bytes));
  counters_.minimum_load_bytes += region.read_bytes;
  counters_.minimum_store_bytes += region.written_bytes;
  if (region.written) memory.shadow = std::make_unique<Shadow>(region.bytes, !region.undefined);
  memory_.push_back(std::move(memory));
}

void Machine::refuse_unaligned(int bytes, Site site) {
  fault("access of " + std::to_string(bytes) + " bytes at " + name_of(site) +
        " is not aligned to its size");
}

// The buffer that is accessed: one that may be written before one that is read, and that before a
// constant one.
Memory& Machine::find(const unsigned char* p, int bytes, bool write, Site site, uint32_t id) {
  Memory*& recent = recent_[id % kRecent];
  if (recent != nullptr && recent->alone && recent->has(p, bytes) &&
      (!write || recent->region.written)) {
    return *recent;
  }
  const char* const what = write ? "global store" : "global load";
  Memory* found = nullptr;
  bool read_only = false;
  for (Memory& memory : memory_) {
    if (!memory.has(p, bytes)) continue;
    if (write && !memory.region.written) {
      read_only = true;
      continue;
    }
    if (found == nullptr || !memory.region.constant) found = &memory;
    if (memory.region.written) break;
  }
  if (found != nullptr) {
    recent = found;
    return *found;
  }
  if (read_only) {
    fault(std::string(what) + " at " + name_of(site) +
          " to a buffer that the launch declared as read");
  }
  std::string where;
  int64_t nearest = INT64_MAX;
  for (size_t i = 0; i < memory_.size(); ++i) {
    const Region& r = memory_[i].region;
    const int64_t offset = p - r.address;
    const int64_t distance = offset < 0 ? -offset : offset - r.bytes;
    if (distance >= nearest) continue;
    nearest = distance;
    where = "; nearest is byte " + std::to_string(offset) + " of buffer " + std::to_string(i) +
            ", which has " + std::to_string(r.bytes);
  }
  fault(std::string(what) + " of " + std::to_string(bytes) + " bytes at " + name_of(site) +
        " is outside all buffers of the launch" + where);
}

uint32_t Machine::check_global(const unsigned char* p, int bytes, bool write, Site site) {
  const uint32_t id = sites_.id(site);
  Memory& memory = find(p, bytes, write, site, id);
  if (shape_.overlaps && !memory.region.constant && !fiber_->waited_for_grid) {
    fault(std::string(write ? "global store" : "global load") + " at " + name_of(site) +
          " before grid_dependency_wait, in a launch that overlaps with the one before it");
  }
  if (Shadow* const shadow = memory.shadow.get()) {
    const int64_t offset = p - memory.region.address;
    const bool fine = write ? shadow->write(offset, bytes, now(id), fiber_->view)
                            : shadow->read(offset, bytes, now(id), fiber_->view);
    if (!fine) fault("global memory: " + shadow->explain(sites_));
  }
  return id;
}

void Machine::access_global(const void* address, int bytes, bool write, Site site) {
  take_steps(kStepsPerAccess);
  const tsan::Unobserved unobserved;
  check_aligned(address, bytes, site);
  const uint32_t id = check_global(static_cast<const unsigned char*>(address), bytes, write, site);
  accesses_[lane()].push_back(
      {reinterpret_cast<uintptr_t>(address), Access::pack(id, bytes, false, write)});
}

// False if the address is not in the shared memory of this CTA.
bool Machine::access_shared_of(uint32_t cta, const void* address, int bytes, bool write,
                               uint32_t site) {
  const int64_t offset = static_cast<const unsigned char*>(address) - ctas_[cta].shared;
  if (offset < 0 || offset + bytes > shape_.shared_bytes) return false;
  if (cta != fiber_->cta) {
    if (ctas_[cta].ended) {
      fault(
          "access at " + sites_.name(site) +
          " to the shared memory of a CTA that may have ended: it needs a sync_cluster at its end");
    }
    ctas_[cta].remote = now(site);
  }
  if (!ctas_[cta].barriers.empty()) check_no_barrier(cta, offset, bytes, site);
  Shadow& shadow = *shared_shadows_[cta];
  const bool fine = write ? shadow.write(offset, bytes, now(site), fiber_->view)
                          : shadow.read(offset, bytes, now(site), fiber_->view);
  if (!fine) fault("shared memory: " + shadow.explain(sites_));
  accesses_[lane()].push_back(
      {static_cast<uint64_t>(offset), Access::pack(site, bytes, true, write)});
  return true;
}

void Machine::access_shared(const void* address, int bytes, bool write, Site site) {
  take_steps(kStepsPerAccess);
  const tsan::Unobserved unobserved;
  check_aligned(address, bytes, site);
  const uint32_t id = sites_.id(site);
  if (access_shared_of(fiber_->cta, address, bytes, write, id)) return;
  const uint32_t first = fiber_->cta - fiber_->cta % shape_.cluster;
  for (uint32_t cta = first; cta < first + shape_.cluster; ++cta) {
    if (access_shared_of(cta, address, bytes, write, id)) return;
  }
  fault(std::string(write ? "shared store" : "shared load") + " of " + std::to_string(bytes) +
        " bytes at " + name_of(site) + " is outside: byte " +
        std::to_string(static_cast<const unsigned char*>(address) - shared()) + " of " +
        std::to_string(shape_.shared_bytes));
}

void Machine::skip_shared_store(int bytes, Site site) {
  const tsan::Unobserved unobserved;
  take_steps(kStepsPerAccess);
  accesses_[lane()].push_back({Access::kSkipped, Access::pack(sites_.id(site), bytes, true, true)});
}

// Shared memory ends with its CTA.
void Machine::check_end() const {
  const Stamp& last = ctas_[fiber_->cta].remote;
  const View& view = fiber_->view;
  if (last.thread == 0 || view.saw_read(last)) return;
  fault("ends while thread " + std::to_string(last.thread - 1) +
        " of the grid may access its shared memory at " + sites_.name(last.site) +
        ": it needs a sync_cluster at its end");
}

unsigned char* Machine::remote(const void* address, int rank, Site site) {
  if (rank < 0 || static_cast<uint32_t>(rank) >= shape_.cluster) {
    fault("remote at " + name_of(site) + ": rank " + std::to_string(rank) +
          " is outside the cluster of " + std::to_string(shape_.cluster));
  }
  const uint32_t first = fiber_->cta - fiber_->cta % shape_.cluster;
  return ctas_[first + static_cast<uint32_t>(rank)].shared +
         (static_cast<const unsigned char*>(address) - shared());
}

void Machine::begin_copy(void* to, const void* from, int bytes, Site site) {
  access_global(from, bytes, false, site);
  access_shared(to, bytes, true, site);
  const tsan::Unobserved unobserved;
  auto* p = static_cast<unsigned char*>(to);
  shared_shadows_[fiber_->cta]->begin_copy(p - shared(), bytes);
  fiber_->under_way.copies.push_back({p, static_cast<const unsigned char*>(from), bytes});
}

void Machine::commit() {
  const tsan::Unobserved unobserved;
  Copies& c = fiber_->under_way;
  size_t committed = 0;
  for (const size_t group : c.groups) committed += group;
  c.groups.push_back(c.copies.size() - committed);
}

void Machine::wait_copies(int pending) {
  Copies& c = fiber_->under_way;
  if (c.groups.size() <= static_cast<size_t>(pending)) return;
  const auto last = c.groups.end() - pending;
  size_t done = 0;
  for (auto group = c.groups.begin(); group != last; ++group) done += *group;
  for (size_t i = 0; i < done; ++i) {
    const Copy& copy = c.copies[i];
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    shared_shadows_[fiber_->cta]->end_copy(copy.to - shared(), copy.bytes, now(0));
  }
  const tsan::Unobserved unobserved;
  c.copies.erase(c.copies.begin(), c.copies.begin() + static_cast<ptrdiff_t>(done));
  c.groups.erase(c.groups.begin(), last);
}

void access_global(const void* address, int bytes, bool write, Site site) {
  machine->access_global(address, bytes, write, site);
}
void access_shared(const void* address, int bytes, bool write, Site site) {
  machine->access_shared(address, bytes, write, site);
}
void skip_shared_store(int bytes, Site site) { machine->skip_shared_store(bytes, site); }
unsigned char* shared_memory() { return machine->shared(); }
unsigned char* remote_shared_memory(const void* address, int rank, Site site) {
  return machine->remote(address, rank, site);
}
void cp_async(void* to, const void* from, int bytes, Site site) {
  machine->begin_copy(to, from, bytes, site);
}
void cp_async_commit() { machine->commit(); }
void cp_async_wait(int pending) { machine->wait_copies(pending); }

}  // namespace snv2::emulator
