// snv2_kernels._native.Snapshot: has a module tree changed since its weights were packed?
//
// It is asked before every forward of a fused module, about some 1500 objects (x1.0), so it uses
// the C API directly: identities are pointer comparisons, and only version counters and addresses
// go through an attribute of a Python object. The forward before has thrown all of them out of the
// inner caches, and one by one they would cost a miss each; so their lines are asked for first.
#include "watch.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace py = pybind11;

namespace {

// The attribute as an integer; every one asked for here is an int, a bool or a method giving one.
int64_t int_attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (value == nullptr) throw py::error_already_set();
  const int64_t result = PyLong_AsLongLong(value);
  Py_DECREF(value);
  if (result == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return result;
}

int64_t int_call(PyObject* object, PyObject* method) {
  PyObject* value = PyObject_CallMethodNoArgs(object, method);
  if (value == nullptr) throw py::error_already_set();
  const int64_t result = PyLong_AsLongLong(value);
  Py_DECREF(value);
  if (result == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return result;
}

class Snapshot {
 public:
  // dicts: registries of parameters, buffers and submodules; tensors: their tensors; hooks: the
  // submodules' hook registries; modules: the submodules; norms: those with an `eps`.
  Snapshot(std::vector<py::dict> dicts, std::vector<py::object> tensors,
           std::vector<py::dict> hooks, const std::vector<py::object>& modules,
           const std::vector<py::object>& norms)
      : dicts_(std::move(dicts)), tensors_(std::move(tensors)), hooks_(std::move(hooks)) {
    for (const py::dict& dict : dicts_) {
      sizes_.push_back(PyDict_Size(dict.ptr()));
      Py_ssize_t position = 0;
      PyObject* value = nullptr;
      while (PyDict_Next(dict.ptr(), &position, nullptr, &value)) {
        values_.push_back(py::reinterpret_borrow<py::object>(value));
      }
    }
    for (const py::object& tensor : tensors_) {
      versions_.push_back(int_attribute(tensor.ptr(), version_.ptr()));
      addresses_.push_back(int_call(tensor.ptr(), data_ptr_.ptr()));
    }
    for (const py::object& norm : norms) {
      norm_dicts_.push_back(py::reinterpret_borrow<py::dict>(norm.attr("__dict__")));
      eps_.push_back(eps_of(norm_dicts_.back()));
    }
    for (const py::object& module : modules) {
      module_dicts_.push_back(py::reinterpret_borrow<py::dict>(module.attr("__dict__")));
    }
    collect_lines();
  }

  bool holds() const {
    prefetch();
    const py::object* value_at = values_.data();
    for (size_t i = 0; i < dicts_.size(); ++i) {
      PyObject* dict = dicts_[i].ptr();
      if (PyDict_Size(dict) != sizes_[i]) return false;
      Py_ssize_t position = 0;
      PyObject* value = nullptr;
      while (PyDict_Next(dict, &position, nullptr, &value)) {
        if (value != (value_at++)->ptr()) return false;
      }
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      PyObject* tensor = tensors_[i].ptr();
      if (int_attribute(tensor, version_.ptr()) != versions_[i] ||
          int_call(tensor, data_ptr_.ptr()) != addresses_[i]) {
        return false;
      }
    }
    for (size_t i = 0; i < norm_dicts_.size(); ++i) {
      if (eps_of(norm_dicts_[i]) != eps_[i]) return false;
    }
    return true;
  }

  bool runs_plain() const {
    for (const py::dict& dict : hooks_) {
      if (PyDict_Size(dict.ptr()) > 0) return true;
    }
    for (const py::dict& dict : module_dicts_) {
      if (PyDict_GetItemWithError(dict.ptr(), training_.ptr()) == Py_True) return true;
    }
    return false;
  }

 private:
  double eps_of(const py::dict& norm) const {
    PyObject* value = PyDict_GetItemWithError(norm.ptr(), eps_name_.ptr());
    if (value == nullptr) throw py::attribute_error("a batch norm has lost its eps");
    return PyFloat_AsDouble(value);
  }

  void add_lines(const void* address, int64_t bytes) {
    const auto first = reinterpret_cast<uintptr_t>(address) / kLine;
    const auto last = (reinterpret_cast<uintptr_t>(address) + bytes - 1) / kLine;
    for (uintptr_t line = first; line <= last; ++line) {
      lines_.push_back(reinterpret_cast<const char*>(line * kLine));
    }
  }

  // Addresses are only hints: the objects behind them are kept alive by this snapshot, and a
  // prefetch of memory that has gone does nothing.
  void collect_lines() {
    for (const py::object& tensor : tensors_) {
      add_lines(tensor.ptr(), 64);
      add_lines(PyLong_AsVoidPtr(tensor.attr("_cdata").ptr()), 192);
      add_lines(PyLong_AsVoidPtr(tensor.attr("untyped_storage")().attr("_cdata").ptr()), 64);
    }
    for (const auto* dicts : {&dicts_, &hooks_, &module_dicts_}) {
      for (const py::dict& dict : *dicts) {
        add_lines(dict.ptr(), sizeof(PyDictObject));
        if (dicts != &hooks_) add_lines(reinterpret_cast<PyDictObject*>(dict.ptr())->ma_keys, 256);
      }
    }
    std::sort(lines_.begin(), lines_.end());
    lines_.erase(std::unique(lines_.begin(), lines_.end()), lines_.end());
  }

  void prefetch() const {
    for (const char* line : lines_) __builtin_prefetch(line);
  }

  static constexpr uintptr_t kLine = 64;

  std::vector<py::dict> dicts_;
  std::vector<py::object> tensors_;
  std::vector<py::dict> hooks_;
  std::vector<py::dict> module_dicts_;
  std::vector<py::dict> norm_dicts_;
  std::vector<const char*> lines_;  // that holds() and runs_plain() read
  std::vector<Py_ssize_t> sizes_;
  std::vector<py::object> values_;
  std::vector<int64_t> versions_;
  std::vector<int64_t> addresses_;
  std::vector<double> eps_;
  py::str version_{"_version"};
  py::str data_ptr_{"data_ptr"};
  py::str training_{"training"};
  py::str eps_name_{"eps"};
};

}  // namespace

void bind_snapshot(py::module_& m) {
  py::class_<Snapshot>(m, "Snapshot", "A state of a module tree; see snv2_kernels.nn.watch.")
      .def(py::init<std::vector<py::dict>, std::vector<py::object>, std::vector<py::dict>,
                    std::vector<py::object>, std::vector<py::object>>(),
           py::kw_only(), py::arg("dicts"), py::arg("tensors"), py::arg("hooks"),
           py::arg("modules"), py::arg("norms"))
      .def("holds", &Snapshot::holds, "Whether no tensor, submodule or eps has changed.")
      .def("runs_plain", &Snapshot::runs_plain,
           "Whether a submodule has hooks or is in train() mode.");
}
