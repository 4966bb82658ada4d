// Time spent in each kernel of a network: while it is counted, another table of kernels takes the
// place of the one in use, and its functions call that one's and look at the clock.
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>

#include "cpu/kernels.h"

namespace snv2::cpu {
namespace {

std::mutex mutex;
std::map<const float*, KernelTime> times;  // by weights
Kernels timed;
MapKernels<float> timed_float32;
MapKernels<BFloat16> timed_bfloat16;
MapKernels<UInt8> timed_uint8;
std::atomic<const Kernels*> inner;

template <class In, class Out>
const float* weights_of(const Pointwise<In, Out>& op) {
  return op.weights;
}
template <class T>
const float* weights_of(const ExpandDepthwise<T>& op) {
  return op.pw1.weights;
}
template <class T>
const float* weights_of(const PanelDepthwise<T>& op) {
  return op.dw.weights;
}
template <class T>
const float* weights_of(const Stem<T>& op) {
  return op.weights;
}

const float* weights_of(const Gate& op) { return op.pw1_weights; }

template <auto kKernel>
struct Timed;

template <class T, class Op, class... Rest, void (*MapKernels<T>::*kKernel)(const Op&, Rest...)>
struct Timed<kKernel> {
  static void run(const Op& op, Rest... rest) {
    using Clock = std::chrono::steady_clock;
    const Clock::time_point start = Clock::now();
    (maps_of<T>(*inner.load(std::memory_order_acquire))->*kKernel)(op, rest...);
    const std::chrono::nanoseconds elapsed = Clock::now() - start;
    const std::lock_guard<std::mutex> lock(mutex);
    KernelTime& time = times[weights_of(op)];
    time.weights = weights_of(op);
    time.calls += 1;
    time.nanoseconds += elapsed.count();
  }
};

template <class T>
MapKernels<T> timed_maps(MapKernels<T> maps) {
  using Maps = MapKernels<T>;
  maps.pointwise = Timed<&Maps::pointwise>::run;
  maps.pointwise_mean = Timed<&Maps::pointwise_mean>::run;
  maps.linear = Timed<&Maps::linear>::run;
  maps.expand_depthwise = Timed<&Maps::expand_depthwise>::run;
  maps.panel_depthwise = Timed<&Maps::panel_depthwise>::run;
  maps.gate = Timed<&Maps::gate>::run;
  maps.stem = Timed<&Maps::stem>::run;
  return maps;
}

}  // namespace

void start_kernel_times() {
  const std::lock_guard<std::mutex> lock(mutex);
  times.clear();
  const Kernels& used = kernels();
  if (&used == &timed) return;
  inner.store(&used, std::memory_order_release);
  timed = used;
  timed_float32 = timed_maps(*used.float32);
  timed.float32 = &timed_float32;
  if (used.bfloat16 != nullptr) {
    timed_bfloat16 = timed_maps(*used.bfloat16);
    timed.bfloat16 = &timed_bfloat16;
  }
  timed_uint8 = timed_maps(*used.uint8);
  timed.uint8 = &timed_uint8;
  use_kernels(timed);
}

std::vector<KernelTime> stop_kernel_times() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (&kernels() == &timed) use_kernels(*inner.load(std::memory_order_acquire));
  std::vector<KernelTime> result;
  for (const auto& [weights, time] : times) result.push_back(time);
  times.clear();
  return result;
}

}  // namespace snv2::cpu
