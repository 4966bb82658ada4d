// What a thread learns of others by barriers that count (transactions.h): not all threads that such
// a barrier orders take part in it, so that no Circle (shadow.h) describes them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace snv2::emulator {

// Stands for a thread in the stamps of what copies and stores write that a barrier waits for: so
// much plus the barrier's index. Threads of a grid are fewer.
constexpr uint32_t kTransfers = 0xf0000000u;
// The time of a write that is under way: nobody has seen it.
constexpr uint32_t kNever = UINT32_MAX;

struct Learned {
  // What each thread of the group did before that time is done, and what each barrier waited for.
  std::vector<uint32_t> threads, barriers;

  bool saw(uint32_t thread, uint32_t time, uint32_t first_thread) const {
    const std::vector<uint32_t>& times = thread >= kTransfers ? barriers : threads;
    const uint32_t i = thread - (thread >= kTransfers ? kTransfers : first_thread);
    return i < times.size() && time < times[i];
  }

  void add(const Learned& other) {
    add(threads, other.threads);
    add(barriers, other.barriers);
  }

 private:
  static void add(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
    if (to.size() < from.size()) to.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
  }
};

// Threads that have learned the same share it.
using Knowledge = std::shared_ptr<const Learned>;

}  // namespace snv2::emulator
