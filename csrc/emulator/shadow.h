// Who touched which bytes of memory when.
//
// Two accesses are ordered if one thread made both, or if a barrier that both threads took part in
// lies between. All threads of a group (what is resident at once) run on one host thread, so one
// clock numbers all their barriers: each thread remembers when the last barrier of each scope that
// it took part in was, and what another thread of that scope did before is done. A stamp then
// holds little: who, when, where in the source.
#pragma once

#include <cstdint>
#include <string>

#include "emulator/fiber.h"
#include "emulator/learned.h"
#include "emulator/sites.h"

namespace snv2::emulator {

struct Stamp {
  uint32_t thread;  // of the grid, counted from one; 0 for nobody
  uint32_t time;
  uint32_t site;
};

// Consecutive threads that share a barrier, and when the last one was.
struct Circle {
  uint32_t first = 0;
  uint32_t threads = 0;
  uint32_t time = 0;

  bool has(uint32_t thread) const { return thread - first < threads; }
  bool saw(const Stamp& s) const { return has(s.thread) && s.time < time; }
};

// What a thread may rely on.
struct View {
  uint32_t thread = 0;
  bool trusting = false;  // to leave the order of accesses to another detector
  Circle warp, cta, cluster, cluster_reads, grid;
  uint32_t seen_lanes[32] = {};  // by barriers of parts of a warp
  Knowledge learned;             // by barriers that count, if by any

  bool saw(const Stamp& s) const {
    return s.thread == thread || cta.saw(s) || warp.saw(s) ||
           (warp.has(s.thread) && s.time < seen_lanes[s.thread - warp.first]) || cluster.saw(s) ||
           grid.saw(s) || trusting ||
           (learned != nullptr && learned->saw(s.thread, s.time, grid.first));
  }
  bool saw_read(const Stamp& s) const { return saw(s) || cluster_reads.saw(s); }
};

// History of memory that threads share, in granules of two bytes. The methods return false for
// what no kernel may do; explain() then says what it was.
class Shadow {
 public:
  Shadow(int64_t bytes, bool initialised);

  // Forgets all threads up to `thread`.
  void forget(uint32_t thread);

  // `now` is the access: by whom, when and where.
  bool read(int64_t offset, int bytes, const Stamp& now, const View& view);
  bool write(int64_t offset, int bytes, const Stamp& now, const View& view);
  // While a cp.async is under way to bytes already marked as written.
  void begin_copy(int64_t offset, int bytes);
  // The thread has written at its wait: earlier barriers do not order it.
  void end_copy(int64_t offset, int bytes, const Stamp& now);

  // A transfer that barrier number `barrier` waits for: seen by nobody before it ends.
  bool begin_transfer(int64_t offset, int bytes, const Stamp& now, const View& view,
                      uint32_t barrier);
  void end_transfer(int64_t offset, int bytes, uint32_t time, uint32_t barrier);

  std::string explain(const Sites& sites) const;

 private:
  // The latest reader; and another one, of another warp if there was one.
  struct Readers {
    Stamp latest, other;
  };
  static constexpr uint32_t kCopying = 1u << 31;  // in the site of a write
  enum class Fault { kCopying, kTransfer, kNobodyWrote, kReadWritten, kWriteWritten, kWriteRead };

  bool nobody(const Stamp& s) const { return s.thread <= forgotten_; }
  // Another thread's copy is a matter of order.
  static bool is_copying(const Stamp& written, const View& view) {
    return (written.site & kCopying) != 0 && (written.thread == view.thread || !view.trusting);
  }
  bool refuse(Fault fault, bool write, const Stamp& now, const Stamp& earlier);

  Pages memory_of_writes_, memory_of_readers_;
  Stamp* writes_;
  Readers* readers_;
  uint32_t forgotten_ = 0;
  int64_t first_transfer_ = INT64_MAX, end_transfers_ = 0;  // granules that had one
  bool initialised_;
  Fault fault_{};
  bool fault_writes_ = false;
  Stamp fault_now_{}, fault_earlier_{};
};

}  // namespace snv2::emulator
