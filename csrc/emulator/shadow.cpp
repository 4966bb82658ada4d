#include "emulator/shadow.h"

#include <algorithm>

namespace snv2::emulator {

Shadow::Shadow(int64_t bytes, bool initialised)
    : memory_of_writes_((static_cast<size_t>(bytes) / 2 + 1) * sizeof(Stamp)),
      memory_of_readers_((static_cast<size_t>(bytes) / 2 + 1) * sizeof(Readers)),
      writes_(memory_of_writes_.as<Stamp>()),
      readers_(memory_of_readers_.as<Readers>()),
      initialised_(initialised) {}

void Shadow::forget(uint32_t thread) {
  forgotten_ = thread;
  for (int64_t i = first_transfer_; i < end_transfers_; ++i) {
    if (writes_[i].thread >= kTransfers) writes_[i] = {};
  }
  first_transfer_ = INT64_MAX;
  end_transfers_ = 0;
}

bool Shadow::refuse(Fault fault, bool write, const Stamp& now, const Stamp& earlier) {
  fault_ = fault;
  fault_writes_ = write;
  fault_now_ = now;
  fault_earlier_ = earlier;
  return false;
}

bool Shadow::read(int64_t offset, int bytes, const Stamp& now, const View& view) {
  const int64_t end = (offset + bytes + 1) / 2;
  for (int64_t i = offset / 2; i < end; ++i) {
    const Stamp& written = writes_[i];
    if (nobody(written)) {
      if (!initialised_ && !view.trusting) return refuse(Fault::kNobodyWrote, false, now, written);
    } else {
      if (is_copying(written, view)) return refuse(Fault::kCopying, false, now, written);
      if (!view.saw(written)) {
        const bool transfer = written.thread >= kTransfers;
        return refuse(transfer ? Fault::kTransfer : Fault::kReadWritten, false, now, written);
      }
    }
    Readers& r = readers_[i];
    if (r.latest.thread != now.thread && !nobody(r.latest)) {
      const bool keep_other = view.warp.has(r.latest.thread) && !nobody(r.other) &&
                              !view.warp.has(r.other.thread) && !view.saw_read(r.other);
      if (!keep_other) r.other = r.latest;
    }
    r.latest = now;
  }
  return true;
}

bool Shadow::write(int64_t offset, int bytes, const Stamp& now, const View& view) {
  const int64_t end = (offset + bytes + 1) / 2;
  for (int64_t i = offset / 2; i < end; ++i) {
    Stamp& written = writes_[i];
    if (!nobody(written)) {
      if (is_copying(written, view)) return refuse(Fault::kCopying, true, now, written);
      if (!view.saw(written)) {
        const bool transfer = written.thread >= kTransfers;
        return refuse(transfer ? Fault::kTransfer : Fault::kWriteWritten, true, now, written);
      }
    }
    const Readers& r = readers_[i];
    for (const Stamp* reader : {&r.latest, &r.other}) {
      if (!nobody(*reader) && !view.saw_read(*reader)) {
        return refuse(Fault::kWriteRead, true, now, *reader);
      }
    }
    written = now;
  }
  return true;
}

void Shadow::begin_copy(int64_t offset, int bytes) {
  for (int64_t i = offset / 2; i < (offset + bytes) / 2; ++i) writes_[i].site |= kCopying;
}

void Shadow::end_copy(int64_t offset, int bytes, const Stamp& now) {
  for (int64_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    writes_[i] = {now.thread, now.time, writes_[i].site & ~kCopying};
  }
}

bool Shadow::begin_transfer(int64_t offset, int bytes, const Stamp& now, const View& view,
                            uint32_t barrier) {
  if (!write(offset, bytes, now, view)) return false;
  first_transfer_ = std::min(first_transfer_, offset / 2);
  end_transfers_ = std::max(end_transfers_, (offset + bytes) / 2);
  for (int64_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    writes_[i] = {kTransfers + barrier, kNever, now.site};
  }
  return true;
}

void Shadow::end_transfer(int64_t offset, int bytes, uint32_t time, uint32_t barrier) {
  for (int64_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    if (writes_[i].thread == kTransfers + barrier) writes_[i].time = time;
  }
}

std::string Shadow::explain(const Sites& sites) const {
  const std::string what =
      std::string(fault_writes_ ? "write" : "read") + " at " + sites.name(fault_now_.site);
  const std::string before = sites.name(fault_earlier_.site & ~kCopying);
  switch (fault_) {
    case Fault::kCopying:
      return what + (fault_writes_ ? " to" : " of") + " memory that a cp.async, issued at " +
             before + ", is still copying to: cp_async_wait" +
             (fault_earlier_.thread == fault_now_.thread ? "" : ", or a barrier after it,") +
             " is missing";
    case Fault::kTransfer:
      return what + (fault_writes_ ? " to" : " of") +
             " memory to which a copy_bulk or store_async, issued at " + before +
             ", may be under way: barrier_wait for its phase, or a barrier after the wait, is "
             "missing";
    case Fault::kNobodyWrote:
      return what + " of memory that nobody wrote";
    case Fault::kReadWritten:
    case Fault::kWriteWritten:
    case Fault::kWriteRead:
      break;
  }
  return "race: " + what + ", " + (fault_ == Fault::kWriteRead ? "read" : "written") +
         " by thread " + std::to_string(fault_earlier_.thread - 1) + " of the grid at " + before +
         ", and no barrier between";
}

}  // namespace snv2::emulator
