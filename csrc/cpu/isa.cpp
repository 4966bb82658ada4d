// Chooses the instruction set once, at first use.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace snv2::cpu {

#if defined(__aarch64__)
namespace neon {
extern const Kernels kTable;
}
namespace base = neon;
#else
namespace portable {
extern const Kernels kTable;
}
namespace base = portable;
#endif
#if defined(SNV2_HAVE_X86)
namespace avx2 {
extern const Kernels kTable;
}
namespace avx512 {
extern const Kernels kTable;
}
#endif

namespace {

constexpr int kMaxTables = 3;

struct Available {
  const Kernels* tables[kMaxTables];
  const char* names[kMaxTables + 1] = {};
  int count = 0;

  Available() {
#if defined(SNV2_HAVE_X86)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      add(&avx512::kTable);
    }
    if (has_avx2) add(&avx2::kTable);
#endif
    add(&base::kTable);
  }

  void add(const Kernels* table) {
    tables[count] = table;
    names[count++] = table->name;
  }

  const Kernels* find(const char* name) const {
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(names[i], name) == 0) return tables[i];
    }
    return nullptr;
  }
};

const Available& available() {
  static const Available instance;
  return instance;
}

// A name this machine cannot run is passed over: the best set there is takes its place, and
// isa() tells.
std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> instance = [] {
    const char* name = std::getenv("SNV2_CPU_ISA");
    const Kernels* forced = name != nullptr ? available().find(name) : nullptr;
    return forced != nullptr ? forced : available().tables[0];
  }();
  return instance;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_acquire); }

void use_kernels(const Kernels& table) { current().store(&table, std::memory_order_release); }

const char* isa() { return kernels().name; }

bool set_isa(const char* name) {
  const Kernels* table = available().find(name);
  if (table != nullptr) use_kernels(*table);
  return table != nullptr;
}

const char* const* available_isas() { return available().names; }

int64_t run_multiply_adds(int64_t count) { return kernels().multiply_adds(count); }

}  // namespace snv2::cpu
