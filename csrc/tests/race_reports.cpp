#include "race_reports.h"

#include <cstddef>

namespace {

// No std::string: the hook runs inside of ThreadSanitizer, which looks at allocations too.
char reports[1 << 16];
size_t length = 0;

}  // namespace

#ifdef SNV2_TSAN
extern "C" {

int __tsan_get_report_data(void* report, const char** description, int* count, int* stack_count,
                           int* mop_count, int* loc_count, int* mutex_count, int* thread_count,
                           int* unique_tid_count, void** sleep_trace, unsigned long trace_size);
int __tsan_get_report_mop(void* report, unsigned long i, int* tid, void** address, int* size,
                          int* write, int* atomic, void** trace, unsigned long trace_size);
void __sanitizer_symbolize_pc(void* pc, const char* format, char* out, size_t out_size);

// Races are seeded here: whether one is a failure is for the tests to say.
__attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "exitcode=0:suppress_equal_addresses=0";
}

static void append(const char* text) {
  while (*text != 0 && length + 1 < sizeof reports) reports[length++] = *text++;
}

__attribute__((visibility("default"))) void __tsan_on_report(void* report) {
  const char* kind = nullptr;
  int count, stacks, accesses = 0, locations, mutexes, threads, ids;
  static void* trace[64];
  static char frames[1 << 14];
  __tsan_get_report_data(report, &kind, &count, &stacks, &accesses, &locations, &mutexes, &threads,
                         &ids, trace, 1);
  append(kind);
  for (int i = 0; i < accesses; ++i) {
    int thread, size, write, atomic;
    void* address;
    for (void*& pc : trace) pc = nullptr;
    __tsan_get_report_mop(report, static_cast<unsigned long>(i), &thread, &address, &size, &write,
                          &atomic, trace, 64);
    append(write != 0 ? "\n write in" : "\n read in");
    for (void* pc : trace) {
      if (pc == nullptr) break;
      for (char& c : frames) c = 0;
      // Those that were inlined too, each ended by a zero.
      __sanitizer_symbolize_pc(pc, " %f", frames, sizeof frames - 1);
      for (const char* frame = frames; *frame != 0; ++frame) {
        append(frame);
        while (*frame != 0) ++frame;
      }
    }
  }
  append("\n");
}

}  // extern "C"
#endif

std::string take_tsan_reports() {
  const std::string text(reports, length);
  length = 0;
  return text;
}
