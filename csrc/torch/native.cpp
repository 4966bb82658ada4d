// snv2_kernels._native: what the torch-free core can tell about itself.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "emulator/emulator.h"
#include "snv2/cpu.h"
#define SNV2_GPU emulated
#include "gpu_device.h"
#include "program_binding.h"
#include "watch.h"

namespace py = pybind11;

namespace {

using namespace snv2::binding::emulated;

using Words = py::array_t<int64_t, py::array::c_style>;

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const char* const* name = snv2::cpu::available_isas(); *name != nullptr; ++name) {
    names.emplace_back(*name);
  }
  return names;
}

int64_t workspace_bytes(const Words& plan, int64_t weight_count, int64_t batch, int64_t height,
                        int64_t width, int64_t threads) {
  const snv2::Plan checked(plan.data(), plan.size(), weight_count);
  return snv2::cpu::workspace_bytes(checked, batch, height, width, threads);
}

// By the address of the weights: how often and for how many nanoseconds.
std::map<uintptr_t, std::pair<int64_t, int64_t>> stop_kernel_times() {
  std::map<uintptr_t, std::pair<int64_t, int64_t>> times;
  for (const snv2::cpu::KernelTime& time : snv2::cpu::stop_kernel_times()) {
    times[reinterpret_cast<uintptr_t>(time.weights)] = {time.calls, time.nanoseconds};
  }
  return times;
}

py::dict fields_of(const gpu::Device& device) {
  const std::vector<int64_t> values = values_of(device);
  py::dict fields;
  for (size_t i = 0; i < values.size(); ++i) fields[kDeviceFields[i]] = values[i];
  return fields;
}

// The emulated device with some of its fields changed.
gpu::Device device_of(const std::optional<py::dict>& fields) {
  std::vector<int64_t> values = values_of(gpu::current_device());
  if (!fields) return device_from(values);
  for (const auto& [key, value] : *fields) {
    const auto name = key.cast<std::string>();
    const auto* const end = std::end(kDeviceFields);
    const auto* const found = std::find(std::begin(kDeviceFields), end, name);
    if (found == end) throw py::value_error("device: it has no '" + name + "'");
    values[static_cast<size_t>(found - std::begin(kDeviceFields))] = value.cast<int64_t>();
  }
  return device_from(values);
}

void set_emulated_device(const py::kwargs& fields) {
  const gpu::Device device = device_of(py::dict(fields));
  gpu::set_device(device);
  gpu::set_tuning(device.tuning);
}

int64_t gpu_workspace_bytes(const Words& plan, int64_t batch, int64_t height, int64_t width,
                            const std::optional<py::dict>& device) {
  const snv2::GpuPlan checked(plan.data(), plan.size());
  return gpu::workspace_bytes(checked, batch, height, width, device_of(device));
}

std::vector<py::dict> describe_network(const Words& plan, int64_t batch, int64_t height,
                                       int64_t width, const std::optional<py::dict>& device) {
  const snv2::GpuPlan checked(plan.data(), plan.size());
  const gpu::Device where = device_of(device);
  int64_t count = 0;
  gpu::describe_network(checked, batch, height, width, where, nullptr, 0, count);
  std::vector<gpu::LaunchInfo> infos(static_cast<size_t>(count));
  gpu::describe_network(checked, batch, height, width, where, infos.data(), count, count);
  std::vector<py::dict> launches;
  for (const gpu::LaunchInfo& info : infos) {
    py::dict launch;
    launch["kernel"] = info.kernel;
    launch["step"] = info.step;
    launch["ctas"] = info.ctas;
    launch["threads"] = info.threads;
    launch["shared_bytes"] = info.shared_bytes;
    launch["columns"] = info.columns;
    launch["resident"] = info.resident;
    launch["cluster"] = info.cluster;
    launch["launches"] = info.launches;
    launch["read_bytes"] = info.read_bytes;
    launch["written_bytes"] = info.written_bytes;
    launch["weight_bytes"] = info.weight_bytes;
    launch["multiply_adds"] = info.multiply_adds;
    launches.push_back(launch);
  }
  return launches;
}

py::dict emulator_counters() {
  const snv2::emulator::Counters c = snv2::emulator::counters();
  py::dict counts;
  counts["launches"] = c.launches;
  counts["ctas"] = c.ctas;
  counts["global_load_bytes"] = c.global_load_bytes;
  counts["global_store_bytes"] = c.global_store_bytes;
  counts["global_load_sectors"] = c.global_load_sectors;
  counts["global_store_sectors"] = c.global_store_sectors;
  counts["minimum_load_bytes"] = c.minimum_load_bytes;
  counts["minimum_store_bytes"] = c.minimum_store_bytes;
  counts["shared_accesses"] = c.shared_accesses;
  counts["shared_wavefronts"] = c.shared_wavefronts;
  counts["bank_conflicts"] = c.bank_conflicts;
  counts["mma"] = c.mma;
  counts["barriers"] = c.barriers;
  counts["shared_bytes"] = c.shared_bytes;
  return counts;
}

std::vector<std::tuple<std::string, int64_t, int64_t>> conformance_cases() {
  std::vector<std::tuple<std::string, int64_t, int64_t>> cases;
  for (const auto* c = snv2::emulated::conformance_cases(); c->name != nullptr; ++c) {
    cases.emplace_back(c->name, c->in_words, c->out_words);
  }
  return cases;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The torch-free core: instruction sets, plan format, memory planning, emulator.";
  m.attr("PANEL") = snv2::kPanel;
  m.attr("PLAN_MAGIC") = snv2::kPlanMagic;
  m.attr("STEP_WORDS") = snv2::kStepWords;
  m.attr("MAX_WINDOW") = snv2::kMaxWindow;
  m.attr("MAX_DILATION") = snv2::kMaxDilation;
  m.attr("HEADER_WORDS") = snv2::kHeaderWords;
  m.def(
      "requested_backend",
      [] {
        const char* name = std::getenv("SNV2_BACKEND");
        return std::string(name == nullptr ? "" : name);
      },
      "SNV2_BACKEND as it is now; os.environ took 20 us of a call with cold caches.");
  m.def("cpu_isa", &snv2::cpu::isa,
        "Instruction set in use: avx512_bf16, avx512, avx2, neon or portable.");
  m.def("cpu_has_bfloat16", &snv2::cpu::has_bfloat16,
        "Whether the instruction set in use runs plans for bfloat16.");
  m.def(
      "set_cpu_isa",
      [](const std::string& name) {
        if (!snv2::cpu::set_isa(name.c_str())) {
          throw py::value_error("name: this machine cannot run '" + name + "'");
        }
      },
      py::arg("name"), "Switch the instruction set of this process, for tests.");
  m.def("available_cpu_isas", &available_isas, "Instruction sets of this machine, best first.");
  m.def("workspace_bytes", &workspace_bytes, py::arg("plan"), py::arg("weight_count"),
        py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("threads"),
        "Bytes of workspace the CPU backend needs to run a plan.");
  m.def(
      "run_multiply_adds",
      [](int64_t count, bool bfloat16) {
        return snv2::cpu::run_multiply_adds(
            count, bfloat16 ? snv2::DType::kBFloat16 : snv2::DType::kFloat32);
      },
      py::arg("count"), py::arg("bfloat16") = false, py::call_guard<py::gil_scoped_release>(),
      "Do at least so many multiply-adds in registers on this core; how many they were.");
  m.def("start_kernel_times", &snv2::cpu::start_kernel_times,
        "Count the time of every kernel of a network on the CPU, from zero.");
  m.def("stop_kernel_times", &stop_kernel_times,
        "Stop; address of weights -> calls, nanoseconds in all threads.");
  m.attr("GPU_PLAN_MAGIC") = snv2::kGpuPlanMagic;
  m.attr("GPU_STEP_WORDS") = snv2::kGpuStepWords;
  m.attr("GPU_HEADER_WORDS") = snv2::kGpuHeaderWords;
  m.attr("GPU_TILE_ROWS") = snv2::kTileRows;
  m.def("gpu_workspace_bytes", &gpu_workspace_bytes, py::arg("plan"), py::arg("batch"),
        py::arg("height"), py::arg("width"), py::arg("device") = py::none(),
        "Bytes of workspace the CUDA kernels need to run a plan on a device, the emulated one by "
        "default.");
  m.def("describe_network", &describe_network, py::arg("plan"), py::arg("batch"), py::arg("height"),
        py::arg("width"), py::arg("device") = py::none(),
        "The launches that run a plan on a device, the emulated one by default; the fields of "
        "LaunchInfo in csrc/include/snv2/cuda.h.");
  m.def(
      "emulated_device", [] { return fields_of(gpu::current_device()); },
      "What the kernels of networks are cut to on cuda-emulated.");
  m.def("set_emulated_device", &set_emulated_device, "Change some fields of the emulated device.");
  m.def("emulator_counters", &emulator_counters,
        "What launches of this thread on cuda-emulated did; see csrc/emulator/emulator.h.");
  m.def("reset_emulator_counters", &snv2::emulator::reset_counters);
  m.def("conformance_cases", &conformance_cases,
        "Name, 32-bit words in and 32-bit words out of each case of the op conformance.");
  bind_program(m);
  bind_snapshot(m);
}
