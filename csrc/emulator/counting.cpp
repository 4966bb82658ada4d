#include "emulator/counting.h"

#include <algorithm>

namespace snv2::emulator {
namespace {

constexpr uint64_t kSector = 32;
constexpr int kLanes = 32;
constexpr int kBanks = 32;

// One instruction of a warp: where each of `count` lanes, in their order, accesses memory.
struct Instruction {
  int count = 0;
  uint64_t addresses[kLanes];
  int lanes[kLanes];
};

// Lane after lane, without a gap.
bool is_consecutive(const uint64_t* addresses, int count, uint64_t bytes) {
  bool all = true;
  for (int i = 0; i < count; ++i) {
    all &= addresses[i] == addresses[0] + static_cast<uint64_t>(i) * bytes;
  }
  return all;
}

int64_t sectors(const Instruction& in, uint64_t bytes) {
  const uint64_t first = in.addresses[0];
  if (is_consecutive(in.addresses, in.count, bytes)) {
    const uint64_t last = first + static_cast<uint64_t>(in.count) * bytes - 1;
    return static_cast<int64_t>(last / kSector - first / kSector) + 1;
  }
  uint64_t seen[kLanes];  // an access is aligned, so it lies in one sector
  for (int i = 0; i < in.count; ++i) seen[i] = in.addresses[i] / kSector;
  std::sort(seen, seen + in.count);
  return std::unique(seen, seen + in.count) - seen;
}

// Cycles that one pass of lanes takes: the most different words in one bank.
int wavefronts(const uint64_t* addresses, int count, int bytes) {
  if (is_consecutive(addresses, count, static_cast<uint64_t>(bytes))) return 1;
  uint64_t words[kBanks][kLanes];
  int load[kBanks] = {};
  for (int i = 0; i < count; ++i) {
    for (int b = 0; b < std::max(bytes, 4); b += 4) {
      const uint64_t word = addresses[i] / 4 + static_cast<uint64_t>(b) / 4;
      uint64_t* const of_bank = words[word % kBanks];
      int& n = load[word % kBanks];
      if (std::find(of_bank, of_bank + n, word) == of_bank + n) of_bank[n++] = word;
    }
  }
  return *std::max_element(load, load + kBanks);
}

// An access of 8 or 16 bytes goes in two or four passes.
void count_instruction(const Instruction& in, const Access& access, Counters& c) {
  const int bytes = access.bytes();
  if (!access.shared()) {
    const int64_t moved = sectors(in, static_cast<uint64_t>(bytes));
    (access.write() ? c.global_store_sectors : c.global_load_sectors) += moved;
    (access.write() ? c.global_store_bytes : c.global_load_bytes) += int64_t{bytes} * in.count;
    return;
  }
  ++c.shared_accesses;
  const int lanes_each = kLanes / std::max(bytes / 4, 1);
  for (int begin = 0; begin < in.count;) {
    int end = begin;
    while (end < in.count && in.lanes[end] / lanes_each == in.lanes[begin] / lanes_each) ++end;
    const int cycles = wavefronts(in.addresses + begin, end - begin, bytes);
    c.shared_wavefronts += cycles;
    c.bank_conflicts += cycles - 1;
    begin = end;
  }
}

// Order of places in the source; negative if a comes first.
int compare(const Access& a, const Access& b, const Sites& sites) {
  if (a.what == b.what) return 0;
  const int places = sites.compare(a.site(), b.site());
  if (places != 0) return places;
  constexpr uint32_t kRest = 127;
  return static_cast<int>(a.what & kRest) - static_cast<int>(b.what & kRest);
}

}  // namespace

void count_accesses(std::vector<Access> (&lanes)[32], const Sites& sites, Counters& counters) {
  const Access* next[kLanes];
  const Access* end[kLanes];
  uint32_t left = 0;  // lanes with accesses to come
  for (int i = 0; i < kLanes; ++i) {
    next[i] = lanes[i].data();
    end[i] = next[i] + lanes[i].size();
    left |= uint32_t{next[i] != end[i]} << i;
  }
  // The lanes furthest behind in the program go first, and so the others wait for them where the
  // paths meet again.
  while (left != 0) {
    Instruction in;
    const Access* first = nullptr;
    uint32_t skipping = 0;
    for (uint32_t rest = left; rest != 0; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      const Access* const access = next[lane];
      if (first == nullptr) {
        first = access;
      } else if (access->what != first->what) {
        const int order = compare(*access, *first, sites);
        if (order > 0) continue;
        if (order < 0) {
          first = access;
          in.count = 0;
          skipping = 0;
        }
      }
      if (access->address == Access::kSkipped) {
        skipping |= uint32_t{1} << lane;
        continue;
      }
      in.lanes[in.count] = lane;
      in.addresses[in.count++] = access->address;
    }
    if (in.count > 0) count_instruction(in, *first, counters);
    uint32_t done = skipping;
    for (int i = 0; i < in.count; ++i) done |= uint32_t{1} << in.lanes[i];
    for (; done != 0; done &= done - 1) {
      const int lane = __builtin_ctz(done);
      if (++next[lane] == end[lane]) left &= ~(uint32_t{1} << lane);
    }
  }
  for (std::vector<Access>& lane : lanes) lane.clear();
}

}  // namespace snv2::emulator
