// Barriers that count arrivals and bytes (mbarrier), and what is on its way to shared memory.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator/learned.h"
#include "emulator/shadow.h"

namespace snv2::emulator {

// A copy_bulk, or a store_async, which has its value with it.
struct Transfer {
  uint32_t cta;  // of the group, to whose shared memory it goes
  int64_t offset;
  int bytes;
  const unsigned char* from;  // null for a store
  unsigned char value[16];
  uint32_t site;
};

struct TransactionBarrier {
  uint32_t cta = 0;
  int64_t offset = 0;
  Stamp made{};  // by barrier_init
  bool fenced = false;
  int arrivals = 0;  // of each phase
  // Of the current phase: arrivals that are missing, bytes that are (fewer than none where bytes
  // came before they were expected), what is on its way.
  int missing = 0;
  int64_t missing_bytes = 0;
  std::vector<Transfer> transfers;
  uint32_t phase = 0;
  std::vector<uint32_t> waiting;  // threads of the group
  // What those know who arrived or sent, and what those may know who waited for the last phase.
  Learned collected;
  Knowledge complete;
  bool unwaited = false;  // a phase with transfers that nobody has waited for
  uint32_t unwaited_site = 0;
};

}  // namespace snv2::emulator
