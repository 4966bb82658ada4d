// Futexes on Linux; elsewhere mutexes and condition variables, found by the word's address.
#include "cpu/wait.h"

#if defined(__linux__) && !defined(SNV2_NO_FUTEX)

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>

namespace snv2::cpu {
namespace {

static_assert(sizeof(Word) == 4, "a futex has 32 bits");

void futex(const Word& word, int operation, uint32_t value) {
  syscall(SYS_futex, &word, operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

}  // namespace

void sleep_while(const Word& word, uint32_t seen) { futex(word, FUTEX_WAIT, seen); }
void wake_one(const Word& word) { futex(word, FUTEX_WAKE, 1); }
void wake_all(const Word& word) { futex(word, FUTEX_WAKE, INT_MAX); }
void renew_sleepers() {}

}  // namespace snv2::cpu

#else

#include <condition_variable>
#include <mutex>

namespace snv2::cpu {
namespace {

struct Bed {
  std::mutex mutex;
  std::condition_variable woken;
};

// Not freed: threads may sleep there when the process ends.
struct Beds {
  static constexpr size_t kCount = 16;
  Bed beds[kCount];
  Beds* const of_parent;
};

Beds* house = new Beds{{}, nullptr};

Bed& bed_of(const Word& word) {
  return house->beds[reinterpret_cast<uintptr_t>(&word) / 64 % Beds::kCount];
}

}  // namespace

void sleep_while(const Word& word, uint32_t seen) {
  Bed& bed = bed_of(word);
  std::unique_lock<std::mutex> lock(bed.mutex);
  if (word.load() == seen) bed.woken.wait(lock);
}

void wake_all(const Word& word) {
  Bed& bed = bed_of(word);
  {
    const std::lock_guard<std::mutex> after_who_falls_asleep(bed.mutex);
  }
  bed.woken.notify_all();
}

// Others may sleep in the same bed.
void wake_one(const Word& word) { wake_all(word); }

void renew_sleepers() { house = new Beds{{}, house}; }

}  // namespace snv2::cpu

#endif
