// Chooses the instruction set once, at first use.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "cpu/kernels.h"

#if defined(SNV2_HAVE_AMX)
#include "cpu/amx/kernels.h"
#endif

namespace snv2::cpu {

#if defined(SNV2_HAVE_NEON)
namespace neon {
extern const Kernels kTable;
}
#endif
#if defined(SNV2_HAVE_NEON_DOT)
namespace neon_dot {
extern const MapKernels<UInt8> kInt8Kernels;
}
#endif
#if defined(SNV2_HAVE_NEON_BF16)
namespace neon_bf16 {
extern const MapKernels<BFloat16> kMapKernels;
}
#endif
#if defined(SNV2_HAVE_PORTABLE)
namespace portable {
extern const Kernels kTable;
}
#endif
#if defined(SNV2_HAVE_AVX2)
namespace avx2 {
extern const Kernels kTable;
}
#endif
#if defined(SNV2_HAVE_AVX2_VNNI)
namespace avx2_vnni {
extern const MapKernels<UInt8> kInt8Kernels;
}
#endif
#if defined(SNV2_HAVE_AVX512)
namespace avx512 {
extern const Kernels kTable;
}
#endif
#if defined(SNV2_HAVE_AVX512_VNNI)
namespace avx512_vnni {
extern const MapKernels<UInt8> kInt8Kernels;
}
#endif
#if defined(SNV2_HAVE_AVX512_BF16)
namespace avx512_bf16 {
extern const MapKernels<BFloat16> kMapKernels;
}
#endif

namespace {

constexpr int kMaxTables = 7;

// The kernels of one instruction set in all but the maps of integers.
[[maybe_unused]] Kernels with_integers(Kernels kernels, const char* name,
                                       const MapKernels<UInt8>& integers) {
  kernels.name = name;
  kernels.uint8 = &integers;
  return kernels;
}

// The same in all but maps of bfloat16. A processor that multiplies them also has what `kernels`
// are for.
[[maybe_unused]] Kernels with_bfloat16(Kernels kernels, const char* name,
                                       const MapKernels<BFloat16>& bfloat16) {
  kernels.name = name;
  kernels.bfloat16 = &bfloat16;
  return kernels;
}

#if defined(SNV2_HAVE_NEON_DOT)
const Kernels& neon_dot_table() {
  static const Kernels table = with_integers(neon::kTable, "neon_dot", neon_dot::kInt8Kernels);
  return table;
}

bool has_dot_products() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
  return true;  // all of Apple's that run macOS
#else
  return false;
#endif
}
#endif

#if defined(SNV2_HAVE_NEON_BF16)
const Kernels& neon_bf16_table() {
  static const Kernels table = with_bfloat16(neon_dot_table(), "neon_bf16", neon_bf16::kMapKernels);
  return table;
}

bool has_bfloat16_products() {
#if defined(__linux__)
  constexpr unsigned long kBfloat16 = 1ul << 14;  // HWCAP2_BF16, which older headers do not have
  return (getauxval(AT_HWCAP2) & kBfloat16) != 0;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif

#if defined(SNV2_HAVE_AVX2_VNNI)
const Kernels& avx2_vnni_table() {
  static const Kernels table = with_integers(avx2::kTable, "avx2_vnni", avx2_vnni::kInt8Kernels);
  return table;
}
#endif

#if defined(SNV2_HAVE_AVX512_VNNI)
const Kernels& avx512_vnni_table() {
  static const Kernels table =
      with_integers(avx512::kTable, "avx512_vnni", avx512_vnni::kInt8Kernels);
  return table;
}
#endif

#if defined(SNV2_HAVE_AVX512_BF16)
const Kernels& avx512_bf16_table() {
  static const Kernels table =
      with_bfloat16(avx512_vnni_table(), "avx512_bf16", avx512_bf16::kMapKernels);
  return table;
}
#endif

#if defined(SNV2_HAVE_AMX)
// AVX-512 in all but what is worth a product in tiles. A processor with tiles has all the others.
const Kernels& amx_table() {
  static const MapKernels<BFloat16> bfloat16 = [] {
    MapKernels<BFloat16> kernels = avx512_bf16::kMapKernels;
    kernels.pointwise = amx::pointwise;
    kernels.pointwise_mean = amx::pointwise_mean;
    kernels.linear = amx::linear;
    kernels.expand_depthwise = amx::expand_depthwise;
    kernels.stem = amx::stem;
    kernels.multiply_adds = amx::multiply_adds;
    return kernels;
  }();
  static const MapKernels<UInt8> uint8 = [] {
    MapKernels<UInt8> kernels = avx512_vnni::kInt8Kernels;
    kernels.pointwise = amx::int8::pointwise;
    kernels.pointwise_mean = amx::int8::pointwise_mean;
    kernels.linear = amx::int8::linear;
    kernels.expand_depthwise = amx::int8::expand_depthwise;
    kernels.multiply_adds = amx::int8::multiply_adds;
    return kernels;
  }();
  static const Kernels table =
      with_bfloat16(with_integers(avx512_vnni_table(), "amx", uint8), "amx", bfloat16);
  return table;
}

// Returns whether the processor has tiles of bfloat16 and bytes, and the kernel lets this process
// use them: it then keeps 8 KB more of each thread that does.
bool has_tiles() {
#if defined(SNV2_SANITIZED)
  return true;  // tests have their own
#elif defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr unsigned kAll = kBFloat16 | kTile | kInt8;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (d & kAll) == kAll && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Available {
  const Kernels* tables[kMaxTables];
  const char* names[kMaxTables + 1] = {};
  int count = 0;

  Available() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    [[maybe_unused]] const bool has_avx2 = __builtin_cpu_supports("avx2") &&
                                           __builtin_cpu_supports("fma") &&
                                           __builtin_cpu_supports("f16c");
    [[maybe_unused]] const bool has_avx512 =
        has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    [[maybe_unused]] const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
#if defined(SNV2_HAVE_AMX)
    if (has_vnni && __builtin_cpu_supports("avx512bf16") && has_tiles()) add(&amx_table());
#endif
#if defined(SNV2_HAVE_AVX512_BF16)
    if (has_vnni && __builtin_cpu_supports("avx512bf16")) add(&avx512_bf16_table());
#endif
#if defined(SNV2_HAVE_AVX512_VNNI)
    if (has_vnni) add(&avx512_vnni_table());
#endif
#if defined(SNV2_HAVE_AVX512)
    if (has_avx512) add(&avx512::kTable);
#endif
#if defined(SNV2_HAVE_AVX2_VNNI)
    if (has_avx2 && __builtin_cpu_supports("avxvnni")) add(&avx2_vnni_table());
#endif
#if defined(SNV2_HAVE_AVX2)
    if (has_avx2) add(&avx2::kTable);
#endif
#endif
#if defined(SNV2_HAVE_NEON_BF16)
    if (has_dot_products() && has_bfloat16_products()) add(&neon_bf16_table());
#endif
#if defined(SNV2_HAVE_NEON_DOT)
    if (has_dot_products()) add(&neon_dot_table());
#endif
#if defined(SNV2_HAVE_NEON)
    add(&neon::kTable);
#endif
#if defined(SNV2_HAVE_PORTABLE)
    add(&portable::kTable);
#endif
    if (count == 0) {
      throw std::runtime_error("snv2: built for the machine that built it, and not for this one");
    }
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

bool has_bfloat16() { return kernels().bfloat16 != nullptr; }

int64_t run_multiply_adds(int64_t count, DType element) {
  const Kernels& table = kernels();
  if (element == DType::kFloat32) return table.float32->multiply_adds(count);
  if (element == DType::kBFloat16 && table.bfloat16 != nullptr) {
    return table.bfloat16->multiply_adds(count);
  }
  if (element == DType::kUint8) return table.uint8->multiply_adds(count);
  throw std::invalid_argument("run_multiply_adds: element is not one that this set multiplies");
}

}  // namespace snv2::cpu
