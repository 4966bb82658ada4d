#include "emulator/memory.h"

#include <algorithm>
#include <cstring>
#include <tuple>

namespace snv2::emulator {
namespace {

constexpr uintptr_t kSector = 32;
constexpr int kBanks = 32;

std::string race(const char* what, const Stamp& now, const char* earlier, const Stamp& before) {
  return std::string("race: ") + what + " at " + name_of(now.site) + ", " + earlier +
         " by thread " + std::to_string(before.thread - 1) + " of the grid at " +
         name_of(before.site) + ", and no barrier between";
}

int64_t sectors(const Access* const* accesses, int count) {
  uintptr_t seen[64];
  int n = 0;
  for (int i = 0; i < count; ++i) {
    const Access& a = *accesses[i];
    seen[n++] = a.address / kSector;
    const uintptr_t last = (a.address + static_cast<uintptr_t>(a.bytes) - 1) / kSector;
    if (last != a.address / kSector) seen[n++] = last;
  }
  std::sort(seen, seen + n);
  return std::unique(seen, seen + n) - seen;
}

// Cycles that one pass of lanes takes: the most different words in one bank.
int wavefronts(const Access* const* accesses, int count) {
  uintptr_t words[kBanks * 4];
  int n = 0;
  for (int i = 0; i < count; ++i) {
    for (int b = 0; b < std::max<int>(accesses[i]->bytes, 4); b += 4) {
      words[n++] = (accesses[i]->address + static_cast<uintptr_t>(b)) / 4;
    }
  }
  std::sort(words, words + n);
  n = static_cast<int>(std::unique(words, words + n) - words);
  int load[kBanks] = {};
  for (int i = 0; i < n; ++i) ++load[words[i] % kBanks];
  return *std::max_element(load, load + kBanks);
}

// `accesses` are in the order of lanes. An access of 8 or 16 bytes goes in two or four passes.
void count_instruction(const Access* const* accesses, const int* lanes, int count, Counters& c) {
  const Access& first = *accesses[0];
  if (!first.shared) {
    const int64_t moved = sectors(accesses, count);
    (first.write ? c.global_store_sectors : c.global_load_sectors) += moved;
    (first.write ? c.global_store_bytes : c.global_load_bytes) += int64_t{first.bytes} * count;
    return;
  }
  ++c.shared_accesses;
  const int passes = std::max<int>(first.bytes / 4, 1);
  const int lanes_each = 32 / passes;
  for (int begin = 0; begin < count;) {
    int end = begin;
    while (end < count && lanes[end] / lanes_each == lanes[begin] / lanes_each) ++end;
    const int cycles = wavefronts(accesses + begin, end - begin);
    c.shared_wavefronts += cycles;
    c.bank_conflicts += cycles - 1;
    begin = end;
  }
}

// Order of places in the source; negative if a comes first.
int compare_places(const Access& a, const Access& b) {
  if (a.site.file != b.site.file) {
    const int files = std::strcmp(a.site.file, b.site.file);
    if (files != 0) return files;
  }
  const auto key = [](const Access& x) {
    return std::make_tuple(x.site.line, x.write, x.shared, x.bytes);
  };
  return key(a) < key(b) ? -1 : key(b) < key(a) ? 1 : 0;
}

}  // namespace

std::string name_of(const Site& site) {
  if (site.file == nullptr) return "an unknown place";
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string Shadow::read(int64_t offset, int bytes, const Stamp& now) {
  for (int64_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    Cell& cell = cells_[static_cast<size_t>(i)];
    if (cell.copying) {
      return "read at " + name_of(now.site) + " of memory that a cp.async, issued at " +
             name_of(cell.write.site) + ", is still copying to: cp_async_wait is missing";
    }
    if (!cell.initialised) return "read at " + name_of(now.site) + " of memory that nobody wrote";
    if (cell.write.thread != 0 && !cell.write.before(now)) {
      return race("read", now, "written", cell.write);
    }
    if (cell.read.thread == now.thread || cell.read.thread == 0) {
      cell.read = now;
      continue;
    }
    const bool keep_other = cell.read.warp == now.warp && cell.other.thread != 0 &&
                            cell.other.warp != now.warp && !cell.other.before(now);
    if (!keep_other) cell.other = cell.read;
    cell.read = now;
  }
  return {};
}

std::string Shadow::write(int64_t offset, int bytes, const Stamp& now) {
  for (int64_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    Cell& cell = cells_[static_cast<size_t>(i)];
    if (cell.copying) {
      return "write at " + name_of(now.site) + " to memory that a cp.async, issued at " +
             name_of(cell.write.site) + ", is still copying to: cp_async_wait is missing";
    }
    if (cell.write.thread != 0 && !cell.write.before(now)) {
      return race("write", now, "written", cell.write);
    }
    for (const Stamp* reader : {&cell.read, &cell.other}) {
      if (reader->thread != 0 && !reader->before(now)) return race("write", now, "read", *reader);
    }
    cell.write = now;
    cell.initialised = true;
  }
  return {};
}

void Shadow::begin_copy(int64_t offset, int bytes) {
  for (int64_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    cells_[static_cast<size_t>(i)].copying = true;
  }
}

// The thread has written at its wait: earlier barriers do not order it.
void Shadow::end_copy(int64_t offset, int bytes, const Stamp& now) {
  for (int64_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    Cell& cell = cells_[static_cast<size_t>(i)];
    cell.copying = false;
    const Site issued = cell.write.site;
    cell.write = now;
    cell.write.site = issued;
  }
}

void count_accesses(std::vector<Access>* lanes, int lane_count, Counters& counters) {
  // The lanes furthest behind in the program go first, and so the others wait for them where the
  // paths meet again.
  size_t next[32] = {};
  for (;;) {
    const Access* group[32];
    int group_lanes[32];
    int count = 0;
    for (int lane = 0; lane < lane_count; ++lane) {
      if (next[lane] == lanes[lane].size()) continue;
      const Access* const access = &lanes[lane][next[lane]];
      const int order = count == 0 ? 0 : compare_places(*access, *group[0]);
      if (order > 0) continue;
      if (order < 0) count = 0;
      group_lanes[count] = lane;
      group[count++] = access;
    }
    if (count == 0) break;
    count_instruction(group, group_lanes, count, counters);
    for (int i = 0; i < count; ++i) ++next[group_lanes[i]];
  }
  for (int lane = 0; lane < lane_count; ++lane) lanes[lane].clear();
}

}  // namespace snv2::emulator
