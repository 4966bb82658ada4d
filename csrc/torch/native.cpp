// snv2_kernels._native: what the torch-free core can tell about itself.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "snv2/cpu.h"
#include "watch.h"

namespace py = pybind11;

namespace {

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

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The torch-free core: instruction sets, plan format, memory planning.";
  m.attr("PANEL") = snv2::kPanel;
  m.attr("PLAN_MAGIC") = snv2::kPlanMagic;
  m.attr("STEP_WORDS") = snv2::kStepWords;
  m.attr("HEADER_WORDS") = snv2::kHeaderWords;
  m.def("cpu_isa", &snv2::cpu::isa, "Instruction set in use: avx512, avx2, neon or portable.");
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
  bind_snapshot(m);
}
