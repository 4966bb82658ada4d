#include "program_binding.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>

#include "snv2/program.h"

namespace nb = nanobind;

namespace {

using snv2::Program;

// The file is read without Python's lock.
class File {
 public:
  explicit File(const std::string& path) {
    const nb::gil_scoped_release released;
    program_ = Program::load(path);
  }
  const Program& operator*() const { return *program_; }
  const Program* operator->() const { return program_.get(); }

 private:
  std::shared_ptr<const Program> program_;
};

// A view that keeps the program alive.
template <class T>
nb::object array_of(const void* data, int64_t count, nb::handle owner) {
  using Array = nb::ndarray<nb::numpy, T, nb::ndim<1>>;
  // PyTorch takes arrays that may be written only; nobody writes these.
  auto* const first = static_cast<T*>(const_cast<void*>(data));
  return nb::cast(Array(first, {static_cast<size_t>(count)}, owner));
}

nb::dict cpu_plans(nb::handle_t<File> self) {
  nb::dict plans;
  for (const snv2::CpuProgram& part : nb::cast<const File&>(self)->cpu_plans()) {
    plans[nb::int_(static_cast<int64_t>(part.plan.element()))] =
        nb::make_tuple(array_of<int64_t>(part.words, part.word_count, self),
                       array_of<float>(part.weights, part.weight_count, self));
  }
  return plans;
}

nb::dict gpu_plans(nb::handle_t<File> self) {
  nb::dict plans;
  for (const snv2::GpuProgram& part : nb::cast<const File&>(self)->gpu_plans()) {
    const snv2::GpuPlanHeader& header = part.plan.header();
    const int64_t bytes = header.weight_count * snv2::size_of(part.plan.dtype());
    plans[nb::int_(header.dtype)] =
        nb::make_tuple(array_of<int64_t>(part.words, part.word_count, self),
                       array_of<uint8_t>(part.weights, bytes, self),
                       array_of<float>(part.parameters, header.parameter_count, self));
  }
  return plans;
}

std::vector<int64_t> numbers(const int64_t* first, size_t count) { return {first, first + count}; }

std::vector<std::pair<int64_t, int64_t>> results(const File& file) {
  std::vector<std::pair<int64_t, int64_t>> pairs;
  for (const auto& result : file->results()) pairs.emplace_back(result.channels, result.halvings);
  return pairs;
}

}  // namespace

void bind_program(nb::module_& m) {
  nb::class_<File>(m, "Program")
      .def(nb::init<const std::string&>(), nb::arg("path"))
      .def_prop_ro("library", [](const File& f) { return f->library(); })
      .def_prop_ro("about", [](const File& f) { return f->about(); })
      .def_prop_ro("input_shape", [](const File& f) { return numbers(f->input().shape, 4); })
      .def_prop_ro("last_map", [](const File& f) { return numbers(f->input().last_map, 2); })
      .def_prop_ro("classes", [](const File& f) { return f->classes(); })
      .def_prop_ro("mean", [](const File& f) { return f->mean(); })
      .def_prop_ro("std", [](const File& f) { return f->std(); })
      .def_prop_ro("results", &results)
      .def_prop_ro("classifies", [](const File& f) { return f->classifies(); })
      .def_prop_ro("cpu", &cpu_plans)
      .def_prop_ro("gpu", &gpu_plans);
}
