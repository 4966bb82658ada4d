// The threads of the CPU backend, which all callers in a process share.
//
// They are started by the first call that needs them, sleep between calls, and end with the process
// or when the library is unloaded. A child that is forked starts its own.
#pragma once

#include <cstdint>

#include "snv2/types.h"

namespace snv2 {

// Processors that the calling thread may use at once: those that it is bound to, and no more than
// the process's cgroup has time for.
SNV2_API int64_t usable_cores();

// Up to `threads` bodies at a time, the caller's thread among them. Callers on the same processors
// have usable_cores() - 1 threads together beside their own, whatever they ask for; one that finds
// them taken runs its bodies itself, as does a body that calls again. What a body throws reaches
// the caller when all that have begun have ended; the others are then not begun.
//
// On Linux those threads keep off the processor that their caller is on: a body there has one
// processor less, as have threads that it starts.
SNV2_API ParallelFor shared_pool(int64_t threads);

}  // namespace snv2
