// snv2_kernels._native: what the torch-free core can tell about itself.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "program_binding.h"
#include "ready.h"
#include "snv2/cpu.h"
#include "snv2/gpu_plan.h"
#include "watch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Words = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const char* const* name = snv2::cpu::available_isas(); *name != nullptr; ++name) {
    names.emplace_back(*name);
  }
  return names;
}

void set_isa(const std::string& name) {
  if (!snv2::cpu::set_isa(name.c_str())) {
    throw nb::value_error(("name: this machine cannot run '" + name + "'").c_str());
  }
}

int64_t workspace_bytes(const Words& plan, int64_t weight_count, int64_t batch, int64_t height,
                        int64_t width, int64_t threads) {
  const snv2::Plan checked(plan.data(), static_cast<int64_t>(plan.size()), weight_count);
  return snv2::cpu::workspace_bytes(checked, batch, height, width, threads);
}

int64_t run_multiply_adds(int64_t count, bool bfloat16) {
  return snv2::cpu::run_multiply_adds(count,
                                      bfloat16 ? snv2::DType::kBFloat16 : snv2::DType::kFloat32);
}

// By the address of the weights: how often and for how many nanoseconds.
std::map<uintptr_t, std::pair<int64_t, int64_t>> stop_kernel_times() {
  std::map<uintptr_t, std::pair<int64_t, int64_t>> times;
  for (const snv2::cpu::KernelTime& time : snv2::cpu::stop_kernel_times()) {
    times[reinterpret_cast<uintptr_t>(time.weights)] = {time.calls, time.nanoseconds};
  }
  return times;
}

std::string requested_backend() {
  const char* name = std::getenv("SNV2_BACKEND");
  return name == nullptr ? "" : name;
}

}  // namespace

NB_MODULE(_native, m) {
  // Objects of a module that was dropped at exit are still held then, which is no fault.
  nb::set_leak_warnings(false);
  m.doc() = "The torch-free core: instruction sets, plan format, memory planning.";
  m.attr("PANEL") = snv2::kPanel;
  m.attr("PLAN_MAGIC") = snv2::kPlanMagic;
  m.attr("STEP_WORDS") = snv2::kStepWords;
  m.attr("MAX_WINDOW") = snv2::kMaxWindow;
  m.attr("MAX_DILATION") = snv2::kMaxDilation;
  m.attr("HEADER_WORDS") = snv2::kHeaderWords;
  m.attr("GPU_PLAN_MAGIC") = snv2::kGpuPlanMagic;
  m.attr("GPU_STEP_WORDS") = snv2::kGpuStepWords;
  m.attr("GPU_HEADER_WORDS") = snv2::kGpuHeaderWords;
  m.attr("GPU_TILE_ROWS") = snv2::kTileRows;
  m.def("requested_backend", &requested_backend,
        "SNV2_BACKEND as it is now; os.environ took 20 us of a call with cold caches.");
  m.def("cpu_isa", &snv2::cpu::isa,
        "Instruction set in use: avx512_bf16, avx512, avx2, neon_bf16, neon or portable, among "
        "others.");
  m.def("cpu_has_bfloat16", &snv2::cpu::has_bfloat16,
        "Whether the instruction set in use runs plans for bfloat16.");
  m.def("set_cpu_isa", &set_isa, "name"_a,
        "Switch the instruction set of this process, for tests.");
  m.def("available_cpu_isas", &available_isas, "Instruction sets of this machine, best first.");
  m.def("workspace_bytes", &workspace_bytes, "plan"_a, "weight_count"_a, "batch"_a, "height"_a,
        "width"_a, "threads"_a, "Bytes of workspace the CPU backend needs to run a plan.");
  m.def("run_multiply_adds", &run_multiply_adds, "count"_a, "bfloat16"_a = false,
        nb::call_guard<nb::gil_scoped_release>(),
        "Do at least so many multiply-adds in registers on this core; how many they were.");
  m.def("start_kernel_times", &snv2::cpu::start_kernel_times,
        "Count the time of every kernel of a network on the CPU, from zero.");
  m.def("stop_kernel_times", &stop_kernel_times,
        "Stop; address of weights -> calls, nanoseconds in all threads.");
  bind_program(m);
  bind_snapshot(m);
  bind_ready(m);
}
