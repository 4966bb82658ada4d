// snv2_kernels._native.Snapshot: has a module tree changed since its weights were packed?
//
// It is asked before every forward of a fused module, about some 5000 objects (x1.0), so it uses
// the C API directly. Where dicts have versions (Python 3.11) only those are compared, and the
// objects in them when one has moved; elsewhere identities are. Only version counters and addresses
// of tensors go through PyTorch. The forward before has thrown all of them out of the inner caches,
// and one by one they would cost a miss each; so their lines are asked for first.
#include "watch.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace py = pybind11;

namespace {

// Takes a new reference to an int, or null with a Python error set.
int64_t to_int(PyObject* value) {
  if (value == nullptr) throw py::error_already_set();
  const int64_t result = PyLong_AsLongLong(value);
  Py_DECREF(value);
  if (result == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return result;
}

#if PY_VERSION_HEX < 0x030C0000
constexpr bool kDictsHaveVersions = true;

// No two states of any two dicts have the same.
uint64_t version_of(const py::dict& dict) {
  return reinterpret_cast<const PyDictObject*>(dict.ptr())->ma_version_tag;
}
#else
constexpr bool kDictsHaveVersions = false;

uint64_t version_of(const py::dict&) { return 0; }
#endif

class Snapshot {
 public:
  // modules: all of the tree, the root first; registries: their dicts of parameters, buffers and
  // submodules; tensors: the parameters and buffers; hooks: registries of hooks; modes: attributes
  // of the modules whose training flag matters.
  Snapshot(const std::vector<py::object>& modules, std::vector<py::dict> registries,
           std::vector<py::object> tensors, std::vector<py::dict> hooks,
           std::vector<py::dict> modes)
      : modules_(modules),
        registries_(std::move(registries)),
        tensors_(std::move(tensors)),
        hooks_(std::move(hooks)),
        modes_(std::move(modes)) {
    for (const py::object& module : modules_) {
      types_.push_back(Py_TYPE(module.ptr()));
      attributes_.push_back(py::reinterpret_borrow<py::dict>(module.attr("__dict__")));
    }
    for_each_value([this](PyObject* value) {
      values_.push_back(py::reinterpret_borrow<py::object>(value));
      return true;
    });
    const py::type base = py::module_::import("torch._C").attr("TensorBase");
    const py::object getter = base.attr("_version"), method = base.attr("data_ptr");
    if (Py_TYPE(getter.ptr()) != &PyGetSetDescr_Type ||
        Py_TYPE(method.ptr()) != &PyMethodDescr_Type) {
      throw py::type_error("torch: expected TensorBase._version and data_ptr of the C API");
    }
    version_ = reinterpret_cast<PyGetSetDescrObject*>(getter.ptr())->d_getset;
    data_ptr_ = reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method;
    for (const py::object& tensor : tensors_) {
      if (!py::isinstance(tensor, base)) throw py::type_error("tensors: expected tensors");
      versions_.push_back(version(tensor));
      addresses_.push_back(address(tensor));
    }
    look_at_dicts();
    collect_lines();
  }

  bool holds() {
    prefetch();
    for (size_t i = 0; i < modules_.size(); ++i) {
      if (Py_TYPE(modules_[i].ptr()) != types_[i]) return false;
    }
    if (!dicts_rest()) {
      if (!values_hold()) return false;
      if (kDictsHaveVersions) look_at_dicts();
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (version(tensors_[i]) != versions_[i]) return false;
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (address(tensors_[i]) != addresses_[i]) return false;
    }
    return true;
  }

  bool runs_plain() const { return dicts_rest() ? runs_plain_ : finds_plain(); }

 private:
  int64_t version(const py::object& tensor) const {
    return to_int(version_->get(tensor.ptr(), version_->closure));
  }
  int64_t address(const py::object& tensor) const {
    return to_int(data_ptr_->ml_meth(tensor.ptr(), nullptr));
  }

  // Whether no dict has changed at all since look_at_dicts(). If not, nothing need have.
  bool dicts_rest() const {
    if (!kDictsHaveVersions) return false;
    size_t i = 0;
    for (const auto* dicts : {&registries_, &attributes_, &hooks_}) {
      for (const py::dict& dict : *dicts) {
        if (version_of(dict) != dict_versions_[i++]) return false;
      }
    }
    return true;
  }

  void look_at_dicts() {
    dict_versions_.clear();
    for (const auto* dicts : {&registries_, &attributes_, &hooks_}) {
      for (const py::dict& dict : *dicts) dict_versions_.push_back(version_of(dict));
    }
    runs_plain_ = finds_plain();
  }

  bool finds_plain() const {
    for (const py::dict& dict : hooks_) {
      if (PyDict_Size(dict.ptr()) > 0) return true;
    }
    for (const py::dict& dict : modes_) {
      if (PyDict_GetItemWithError(dict.ptr(), training_.ptr()) == Py_True) return true;
    }
    return false;
  }

  bool values_hold() const {
    size_t count = 0;
    const bool same = for_each_value(
        [&](PyObject* value) { return count < values_.size() && value == values_[count++].ptr(); });
    return same && count == values_.size();
  }

  // Values of all registries, and of all attributes but the mode and a fused module's own weights.
  // Stops at the first for which f is false.
  template <class F>
  bool for_each_value(const F& f) const {
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    for (const py::dict& dict : registries_) {
      Py_ssize_t position = 0;
      while (PyDict_Next(dict.ptr(), &position, nullptr, &value)) {
        if (!f(value)) return false;
      }
    }
    for (const py::dict& dict : attributes_) {
      Py_ssize_t position = 0;
      while (PyDict_Next(dict.ptr(), &position, &key, &value)) {
        if (key != training_.ptr() && key != packed_state_.ptr() && !f(value)) return false;
      }
    }
    return true;
  }

  void add_lines(const void* address, int64_t bytes) {
    const auto first = reinterpret_cast<uintptr_t>(address) / kLine;
    const auto last = (reinterpret_cast<uintptr_t>(address) + bytes - 1) / kLine;
    for (uintptr_t line = first; line <= last; ++line) {
      lines_.push_back(reinterpret_cast<const char*>(line * kLine));
    }
  }

  // Addresses are only hints: a prefetch of memory that has gone does nothing.
  void collect_lines() {
    for (const py::object& tensor : tensors_) {
      add_lines(tensor.ptr(), 64);
      // A TensorImpl begins with a table, a count, and pointers to its storage and, among others,
      // its version counter.
      auto* const* words = static_cast<void**>(PyLong_AsVoidPtr(tensor.attr("_cdata").ptr()));
      add_lines(words, 192);
      for (int i = 2; i < 6; ++i) add_lines(words[i], i == 2 ? 96 : 16);
    }
    for (const py::object& module : modules_) add_lines(module.ptr(), 16);
    for (const auto* dicts : {&registries_, &attributes_, &hooks_}) {
      for (const py::dict& dict : *dicts) add_lines(dict.ptr(), sizeof(PyDictObject));
    }
    if (kDictsHaveVersions) return sort_lines();
    for (const auto* dicts : {&registries_, &attributes_}) {
      for (const py::dict& dict : *dicts) {
        const auto* object = reinterpret_cast<PyDictObject*>(dict.ptr());
        add_lines(object->ma_keys, 512);
        if (object->ma_values != nullptr) add_lines(object->ma_values, 256);
      }
    }
    sort_lines();
  }

  void sort_lines() {
    std::sort(lines_.begin(), lines_.end());
    lines_.erase(std::unique(lines_.begin(), lines_.end()), lines_.end());
  }

  void prefetch() const {
    for (const char* line : lines_) __builtin_prefetch(line);
  }

  static constexpr uintptr_t kLine = 64;

  static py::str interned(const char* name) {
    return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name));
  }

  std::vector<py::object> modules_;
  std::vector<py::dict> registries_;
  std::vector<py::object> tensors_;
  std::vector<py::dict> hooks_;
  std::vector<py::dict> modes_;
  std::vector<py::dict> attributes_;  // of each module
  std::vector<PyTypeObject*> types_;
  std::vector<py::object> values_;       // of registries and attributes
  std::vector<uint64_t> dict_versions_;  // of registries, attributes, hooks
  bool runs_plain_ = false;              // when they were looked at
  std::vector<int64_t> versions_;        // of tensors
  std::vector<int64_t> addresses_;
  std::vector<const char*> lines_;  // that holds() and runs_plain() read
  // What attributes of a tensor would call in the end: no lookup, for hundreds of them.
  const PyGetSetDef* version_ = nullptr;
  const PyMethodDef* data_ptr_ = nullptr;
  // Attribute names are interned, so that keys compare as pointers.
  py::str training_ = interned("training");
  py::str packed_state_ = interned("_packed_state");
};

}  // namespace

void bind_snapshot(py::module_& m) {
  py::class_<Snapshot>(m, "Snapshot", "A state of a module tree; see snv2_kernels.nn.watch.")
      .def(py::init<const std::vector<py::object>&, std::vector<py::dict>, std::vector<py::object>,
                    std::vector<py::dict>, std::vector<py::dict>>(),
           py::kw_only(), py::arg("modules"), py::arg("registries"), py::arg("tensors"),
           py::arg("hooks"), py::arg("modes"))
      .def("holds", &Snapshot::holds, "Whether no tensor, submodule or attribute has changed.")
      .def("runs_plain", &Snapshot::runs_plain,
           "Whether there are hooks, or one of the modes is train().");
}
