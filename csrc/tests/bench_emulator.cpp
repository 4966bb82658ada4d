// How fast the emulator is: a million operations of a warp, of each kind and mixed. Not a test.
#include <array>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <vector>

#include "cuda/isa.h"
#include "cuda/launch.h"

namespace snv2::SNV2_GPU {
namespace {

constexpr uint32_t kThreads = 256, kCtas = 16;
constexpr int kWarps = kThreads / kWarp * kCtas;
constexpr int kWords = kThreads * kCtas;
constexpr int kShared = 16 * 1024;

struct Params {
  const uint32_t* in;
  uint32_t* out;
  int rounds;
};

enum class Kind { kGlobal, kShared, kSharedHalves, kShuffle, kSyncWarp, kMma, kMixed };

template <Kind kKind>
__global__ void __launch_bounds__(kThreads) work(Params p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int at = static_cast<int>(blockIdx.x * kThreads) + thread;
  const Global<const uint32_t> in{p.in};
  const Shared<uint32_t> words = shared_memory().as<uint32_t>();
  const Shared<uint16_t> halves = shared_memory().as<uint16_t>();
  uint32_t value = load(in + at);
  store_vector<4>(words + 4 * thread, Vector<uint32_t, 4>{{value, value, value, value}});
  sync_threads();
  float d[4] = {};
  for (int i = 0; i < p.rounds; ++i) {
    if constexpr (kKind == Kind::kGlobal) {  // 2 operations
      value += load(in + (at + i) % kWords);
      store(Global<uint32_t>{p.out} + at, value);
    } else if constexpr (kKind == Kind::kShared) {  // 2
      value += load(words + thread);
      store(words + thread, value);
    } else if constexpr (kKind == Kind::kSharedHalves) {  // 2
      const uint16_t half = load(halves + thread);
      store(halves + thread, static_cast<uint16_t>(half + i));
    } else if constexpr (kKind == Kind::kShuffle) {  // 2
      value += shuffle_xor(value, 1);
      value += shuffle_xor(value, 2);
    } else if constexpr (kKind == Kind::kSyncWarp) {  // 2
      sync_warp();
      sync_warp();
    } else if constexpr (kKind == Kind::kMma) {  // 2
      mma_f16(d, {value, value, value, value}, {value, value}, d);
      mma_f16(d, {value, value, value, value}, {value, value}, d);
    } else {  // 11, as in a kernel: tiles loaded, multiplied, stored
      sync_threads();
      cp_async<4>(words + 4 * thread, in + 4 * thread);
      cp_async_commit();
      cp_async_wait<0>();
      sync_threads();
      uint32_t a[4], b[2];
      const int row = thread % kWarp % 16;
      ldmatrix<4>(a, halves + (row * 16 + thread % kWarp / 16 * 8));
      for (int k = 0; k < 2; ++k) {
        b[0] = load(words + (thread + 32 * k) % 512);
        b[1] = load(words + (thread + 32 * k) % 512 + 1);
        mma_f16(d, a, b, d);
      }
      value += shuffle_xor(value, 1);
    }
  }
  store(Global<uint32_t>{p.out} + at, value + static_cast<uint32_t>(d[0]));
}

const char* only = nullptr;

void measure(const char* name, void (*kernel)(Params), int operations) {
  if (only != nullptr && std::strstr(name, only) == nullptr) return;
  static std::vector<uint32_t> in(kWords, 0x3c003c00u), out(kWords);
  const int rounds = 1000000 / kWarps / operations;
  Launch config;
  config.grid_x = kCtas;
  config.threads = kThreads;
  config.shared_bytes = kShared;
  const std::clock_t start = std::clock();  // of this process, whatever else runs
  launch(config, std::array{reads(in.data(), 4 * kWords), writes(out.data(), 4 * kWords)}, kernel,
         Params{in.data(), out.data(), rounds});
  const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  const double million = 1e-6 * rounds * operations * kWarps;
  std::printf("%-24s %6.2f s for a million operations of a warp\n", name, seconds / million);
}

}  // namespace
}  // namespace snv2::SNV2_GPU

// The argument is part of the name of what to measure.
int main(int argc, char** argv) {
  using namespace snv2::SNV2_GPU;
  only = argc > 1 ? argv[1] : nullptr;
  measure("global load, store", work<Kind::kGlobal>, 2);
  measure("shared load, store", work<Kind::kShared>, 2);
  measure("the same of 16 bits", work<Kind::kSharedHalves>, 2);
  measure("shuffle", work<Kind::kShuffle>, 2);
  measure("sync_warp", work<Kind::kSyncWarp>, 2);
  measure("mma", work<Kind::kMma>, 2);
  measure("tiles: a mixture", work<Kind::kMixed>, 11);
}
