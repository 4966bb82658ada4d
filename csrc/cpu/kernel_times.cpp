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
std::atomic<const Kernels*> inner;

const float* weights_of(const Pointwise& op) { return op.weights; }
const float* weights_of(const ExpandDepthwise& op) { return op.pw1.weights; }
const float* weights_of(const PanelDepthwise& op) { return op.dw_weights; }
const float* weights_of(const Stem& op) { return op.weights; }

template <auto kKernel>
struct Timed;

template <class Op, class... Rest, void (*Kernels::*kKernel)(const Op&, Rest...)>
struct Timed<kKernel> {
  static void run(const Op& op, Rest... rest) {
    using Clock = std::chrono::steady_clock;
    const Clock::time_point start = Clock::now();
    (inner.load(std::memory_order_acquire)->*kKernel)(op, rest...);
    const std::chrono::nanoseconds elapsed = Clock::now() - start;
    const std::lock_guard<std::mutex> lock(mutex);
    KernelTime& time = times[weights_of(op)];
    time.weights = weights_of(op);
    time.calls += 1;
    time.nanoseconds += elapsed.count();
  }
};

}  // namespace

void start_kernel_times() {
  const std::lock_guard<std::mutex> lock(mutex);
  times.clear();
  const Kernels& used = kernels();
  if (&used == &timed) return;
  inner.store(&used, std::memory_order_release);
  timed = used;
  timed.pointwise = Timed<&Kernels::pointwise>::run;
  timed.pointwise_mean = Timed<&Kernels::pointwise_mean>::run;
  timed.expand_depthwise = Timed<&Kernels::expand_depthwise>::run;
  timed.panel_depthwise = Timed<&Kernels::panel_depthwise>::run;
  timed.stem = Timed<&Kernels::stem>::run;
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
