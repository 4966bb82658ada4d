// Waiting for an atomic word to change: awake for some microseconds, then asleep.
//
// Asleep, a thread leaves its processor to whoever has work, and is let in soon when it is woken.
// One that spins or yields uses up its share, and waits for it when there is work to do.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace snv2::cpu {

using Word = std::atomic<uint32_t>;

// Returns when `word` has been woken and is not `seen`, or earlier: the caller looks again. `word`
// may be gone when it is woken; its address is all that counts.
void sleep_while(const Word& word, uint32_t seen);
void wake_one(const Word& word);
void wake_all(const Word& word);

// Lends the processor of a thread that sleeps in a call it has made to the helpers of that call:
// they may have no other. When it wakes, perhaps on theirs, they are moved away again.
class CoreLent {
 public:
  CoreLent();
  ~CoreLent();
  CoreLent(const CoreLent&) = delete;
};

// Makes sleeping and waking work in a child that was forked while other threads were at it.
void renew_sleepers();

// Time that is worth waiting awake, counted from the first question.
class Spin {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Spin(std::chrono::microseconds limit) : limit_(limit) {}

  // True after a short pause; false when the time is over, and when this thread has lost its
  // processor meanwhile: others want it.
  bool again() {
    if (over_) return false;
    pause();
    if (++pauses_ % kPauses != 0) return true;
    const Clock::time_point now = Clock::now();
    if (pauses_ == kPauses) {
      begin_ = last_ = now;
      return true;
    }
    over_ = now - begin_ > limit_ || now - last_ > kLost;
    last_ = now;
    return !over_;
  }

 private:
  static constexpr uint32_t kPauses = 16;  // one to two microseconds where a pause is long
  static constexpr std::chrono::microseconds kLost{200};

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const std::chrono::microseconds limit_;
  Clock::time_point begin_, last_;
  uint32_t pauses_ = 0;
  bool over_ = false;
};

}  // namespace snv2::cpu
