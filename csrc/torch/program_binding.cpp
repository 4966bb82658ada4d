#include "program_binding.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "snv2/program.h"

namespace py = pybind11;

namespace {

using snv2::Program;
using Shared = std::shared_ptr<Program>;

// The reader's, which nobody changes; pybind11 holds no pointers to what is const.
Shared load(const std::string& path) {
  return std::const_pointer_cast<Program>(Program::load(path));
}

// A view that keeps the program alive.
template <class T>
py::array_t<T> array_of(const void* data, int64_t count, const py::handle& owner) {
  return py::array_t<T>(count, static_cast<const T*>(data), owner);
}

py::dict cpu_plans(const py::object& self) {
  py::dict plans;
  for (const snv2::CpuProgram& part : self.cast<const Program&>().cpu_plans()) {
    plans[py::int_(static_cast<int64_t>(part.plan.element()))] =
        py::make_tuple(array_of<int64_t>(part.words, part.word_count, self),
                       array_of<float>(part.weights, part.weight_count, self));
  }
  return plans;
}

py::dict gpu_plans(const py::object& self) {
  py::dict plans;
  for (const snv2::GpuProgram& part : self.cast<const Program&>().gpu_plans()) {
    const snv2::GpuPlanHeader& header = part.plan.header();
    const int64_t bytes = header.weight_count * snv2::size_of(part.plan.dtype());
    plans[py::int_(header.dtype)] =
        py::make_tuple(array_of<int64_t>(part.words, part.word_count, self),
                       array_of<uint8_t>(part.weights, bytes, self),
                       array_of<float>(part.parameters, header.parameter_count, self));
  }
  return plans;
}

std::vector<int64_t> numbers(const int64_t* first, size_t count) { return {first, first + count}; }

std::vector<std::pair<int64_t, int64_t>> results(const Program& program) {
  std::vector<std::pair<int64_t, int64_t>> pairs;
  for (const auto& result : program.results()) pairs.emplace_back(result.channels, result.halvings);
  return pairs;
}

}  // namespace

void bind_program(py::module_& m) {
  py::class_<Program, Shared>(m, "Program")
      .def(py::init(&load), py::arg("path"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("library", &Program::library)
      .def_property_readonly("about", &Program::about)
      .def_property_readonly("input_shape",
                             [](const Program& p) { return numbers(p.input().shape, 4); })
      .def_property_readonly("last_map",
                             [](const Program& p) { return numbers(p.input().last_map, 2); })
      .def_property_readonly("classes", &Program::classes)
      .def_property_readonly("mean", &Program::mean)
      .def_property_readonly("std", &Program::std)
      .def_property_readonly("results", &results)
      .def_property_readonly("classifies", &Program::classifies)
      .def_property_readonly("cpu", &cpu_plans)
      .def_property_readonly("gpu", &gpu_plans);
}
