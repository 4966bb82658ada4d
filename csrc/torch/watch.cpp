// snv2_kernels._native.Snapshot: has a module tree changed since its weights were packed?
//
// It is asked before every forward of a fused module, about some 5000 objects (x1.0), so it uses
// the C API directly. Where dicts have versions (Python 3.11) only those are compared, and the
// objects in them when one has moved; elsewhere identities are. Only version counters and addresses
// of tensors go through PyTorch. The forward before has thrown all of them out of the inner caches,
// and one by one they would cost a miss each; so their lines are asked for first.
//
// The root owns its snapshot, so the snapshot must not own the root, nor the root's dict: a module
// that was dropped would live until the garbage collector finds the cycle. The root is passed in.
#include "watch.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
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

// Keeps the C functions behind attributes of tensors: no lookup, for hundreds of them.
class TensorAccess {
 public:
  TensorAccess() : base_(py::module_::import("torch._C").attr("TensorBase")) {
    const py::object getter = base_.attr("_version"), method = base_.attr("data_ptr");
    if (Py_TYPE(getter.ptr()) != &PyGetSetDescr_Type ||
        Py_TYPE(method.ptr()) != &PyMethodDescr_Type) {
      throw py::type_error("torch: expected TensorBase._version and data_ptr of the C API");
    }
    version_ = reinterpret_cast<PyGetSetDescrObject*>(getter.ptr())->d_getset;
    data_ptr_ = reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method;
  }

  void check(const py::object& tensor) const {
    if (!py::isinstance(tensor, base_)) throw py::type_error("tensors: expected tensors");
  }
  int64_t version(const py::object& tensor) const {
    return to_int(version_->get(tensor.ptr(), version_->closure));
  }
  int64_t address(const py::object& tensor) const {
    return to_int(data_ptr_->ml_meth(tensor.ptr(), nullptr));
  }

 private:
  py::object base_;
  const PyGetSetDef* version_ = nullptr;
  const PyMethodDef* data_ptr_ = nullptr;
};

// Version counters and addresses of tensors, and the contents of those that move unseen: batch norm
// writes its statistics without a version.
class Stamps {
 public:
  // bytes: of each tensor, how many of its memory are compared.
  Stamps(const std::vector<py::object>& tensors, const std::vector<int64_t>& bytes)
      : bytes_(bytes) {
    if (bytes.size() != tensors.size()) throw py::value_error("bytes: expected one per tensor");
    size_t total = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
      access_.check(tensors[i]);
      versions_.push_back(access_.version(tensors[i]));
      addresses_.push_back(access_.address(tensors[i]));
      total += bytes_[i];
    }
    contents_.resize(total);
    char* to = contents_.data();
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (bytes_[i] > 0) std::memcpy(to, memory(i), bytes_[i]);
      to += bytes_[i];
    }
  }

  // Calls f(memory, bytes) for the contents that are compared.
  template <class F>
  void each_content(const F& f) const {
    for (size_t i = 0; i < bytes_.size(); ++i) {
      if (bytes_[i] > 0) f(memory(i), bytes_[i]);
    }
  }

  bool hold(const std::vector<py::object>& tensors) const {
    if (tensors.size() != versions_.size()) return false;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (access_.version(tensors[i]) != versions_[i]) return false;
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (access_.address(tensors[i]) != addresses_[i]) return false;
    }
    const char* was = contents_.data();
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (bytes_[i] > 0 && std::memcmp(was, memory(i), bytes_[i]) != 0) return false;
      was += bytes_[i];
    }
    return true;
  }

 private:
  const void* memory(size_t i) const { return reinterpret_cast<const void*>(addresses_[i]); }

  TensorAccess access_;
  std::vector<int64_t> versions_;
  std::vector<int64_t> addresses_;
  std::vector<int64_t> bytes_;
  std::vector<char> contents_;
};

// A class is given another version when it, or one that it derives from, is changed.
unsigned int version_of(const PyTypeObject* type) { return type->tp_version_tag; }

class Snapshot {
 public:
  // modules: all of the tree, the root first; registries: their dicts of parameters, buffers and
  // submodules; tensors: the parameters and buffers; bytes: see Stamps; hooks: registries of hooks;
  // modes: attributes of the children whose training flag matters.
  Snapshot(const std::vector<py::object>& modules, std::vector<py::dict> registries,
           std::vector<py::object> tensors, const std::vector<int64_t>& bytes,
           std::vector<py::dict> hooks, std::vector<py::dict> modes)
      : children_(modules.begin() + 1, modules.end()),
        registries_(std::move(registries)),
        tensors_(std::move(tensors)),
        hooks_(std::move(hooks)),
        modes_(std::move(modes)),
        stamps_(tensors_, bytes) {
    for (const py::object& module : modules) {
      PyTypeObject* type = Py_TYPE(module.ptr());
      types_.push_back(type);
      // A look-up gives the class a version, if it had none.
      py::getattr(reinterpret_cast<PyObject*>(type), "forward", py::none());
      type_versions_.push_back(version_of(type));
    }
    for (const py::object& child : children_) attributes_.push_back(dict_of(child));
    const py::object& root = modules.front();
    const py::dict attributes = dict_of(root);
    for_each_value(attributes, [this](PyObject* value) {
      values_.push_back(py::reinterpret_borrow<py::object>(value));
      return true;
    });
    look_at_dicts(attributes);
    collect_lines(root);
  }

  bool holds(const py::object& root) {
    prefetch();
    if (!same_type(root, 0)) return false;
    for (size_t i = 0; i < children_.size(); ++i) {
      if (!same_type(children_[i], i + 1)) return false;
    }
    const py::dict attributes = dict_of(root);
    if (!dicts_rest(attributes)) {
      if (!values_hold(attributes)) return false;
      if (kDictsHaveVersions) look_at_dicts(attributes);
    }
    return stamps_.hold(tensors_);
  }

  bool runs_plain(const py::object& root) const {
    return dicts_rest(dict_of(root)) ? runs_plain_ : finds_plain();
  }

  // For the garbage collector.
  int traverse(visitproc visit, void* arg) const {
    for (const auto* objects : {&children_, &tensors_, &values_}) {
      for (const py::object& object : *objects) Py_VISIT(object.ptr());
    }
    for (const auto* dicts : {&registries_, &hooks_, &modes_, &attributes_}) {
      for (const py::dict& dict : *dicts) Py_VISIT(dict.ptr());
    }
    return 0;
  }
  void clear() {
    // What is let go may run code that asks again: no vector is emptied in place.
    for (auto* objects : {&children_, &tensors_, &values_}) {
      std::vector<py::object>().swap(*objects);
    }
    for (auto* dicts : {&registries_, &hooks_, &modes_, &attributes_}) {
      std::vector<py::dict>().swap(*dicts);
    }
  }

 private:
  static py::dict dict_of(const py::object& module) {
    return py::reinterpret_borrow<py::dict>(module.attr("__dict__"));
  }

  bool same_type(const py::object& module, size_t i) const {
    const PyTypeObject* type = Py_TYPE(module.ptr());
    return type == types_[i] && version_of(type) == type_versions_[i];
  }

  // Whether no dict has changed at all since look_at_dicts(). If not, nothing need have.
  bool dicts_rest(const py::dict& attributes) const {
    if (!kDictsHaveVersions || version_of(attributes) != root_version_) return false;
    size_t i = 0;
    for (const auto* dicts : {&registries_, &attributes_, &hooks_}) {
      for (const py::dict& dict : *dicts) {
        if (version_of(dict) != dict_versions_[i++]) return false;
      }
    }
    return true;
  }

  void look_at_dicts(const py::dict& attributes) {
    root_version_ = version_of(attributes);
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
    for (const py::dict& attributes : modes_) {
      if (PyDict_GetItemWithError(attributes.ptr(), training_.ptr()) == Py_True) return true;
    }
    return false;
  }

  bool values_hold(const py::dict& attributes) const {
    size_t count = 0;
    const bool same = for_each_value(attributes, [&](PyObject* value) {
      return count < values_.size() && value == values_[count++].ptr();
    });
    return same && count == values_.size();
  }

  // Values of all registries, and of all attributes but the mode and a fused module's own weights.
  // Stops at the first for which f is false.
  template <class F>
  bool for_each_value(const py::dict& attributes, const F& f) const {
    PyObject* value = nullptr;
    for (const py::dict& dict : registries_) {
      Py_ssize_t position = 0;
      while (PyDict_Next(dict.ptr(), &position, nullptr, &value)) {
        if (!f(value)) return false;
      }
    }
    if (!for_each_attribute(attributes, f)) return false;
    for (const py::dict& dict : attributes_) {
      if (!for_each_attribute(dict, f)) return false;
    }
    return true;
  }

  template <class F>
  bool for_each_attribute(const py::dict& attributes, const F& f) const {
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    Py_ssize_t position = 0;
    while (PyDict_Next(attributes.ptr(), &position, &key, &value)) {
      if (key != training_.ptr() && key != packed_state_.ptr() && !f(value)) return false;
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
  void collect_lines(const py::object& root) {
    for (const py::object& tensor : tensors_) {
      add_lines(tensor.ptr(), 64);
      // A TensorImpl begins with a table, a count, and pointers to its storage and, among others,
      // its version counter.
      auto* const* words = static_cast<void**>(PyLong_AsVoidPtr(tensor.attr("_cdata").ptr()));
      add_lines(words, 192);
      for (int i = 2; i < 6; ++i) add_lines(words[i], i == 2 ? 96 : 16);
    }
    stamps_.each_content([this](const void* data, int64_t bytes) { add_lines(data, bytes); });
    for (const py::object& module : children_) add_lines(module.ptr(), 16);
    add_lines(dict_of(root).ptr(), sizeof(PyDictObject));
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

  std::vector<py::object> children_;
  std::vector<py::dict> registries_;
  std::vector<py::object> tensors_;
  std::vector<py::dict> hooks_;
  std::vector<py::dict> modes_;
  std::vector<py::dict> attributes_;  // of each child
  std::vector<PyTypeObject*> types_;  // of the root and each child
  std::vector<unsigned int> type_versions_;
  std::vector<py::object> values_;       // of registries and attributes
  std::vector<uint64_t> dict_versions_;  // of registries, attributes, hooks
  uint64_t root_version_ = 0;            // of its attributes
  bool runs_plain_ = false;              // when they were looked at
  Stamps stamps_;
  std::vector<const char*> lines_;  // that holds() and runs_plain() read
  // Attribute names are interned, so that keys compare as pointers.
  py::str training_ = interned("training");
  py::str packed_state_ = interned("_packed_state");
};

// Null while the object is being made.
Snapshot* snapshot_of(PyObject* object) {
  auto held = reinterpret_cast<py::detail::instance*>(object)->get_value_and_holder();
  return held.holder_constructed() ? held.value_ptr<Snapshot>() : nullptr;
}

void let_collector_in(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* object, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(object));
    const Snapshot* snapshot = snapshot_of(object);
    return snapshot == nullptr ? 0 : snapshot->traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* object) {
    if (Snapshot* snapshot = snapshot_of(object)) snapshot->clear();
    return 0;
  };
}

}  // namespace

void bind_snapshot(py::module_& m) {
  py::class_<Stamps>(m, "Stamps", "States of tensors; see snv2_kernels.nn.watch.")
      .def(py::init<const std::vector<py::object>&, const std::vector<int64_t>&>(),
           py::arg("tensors"), py::arg("bytes"))
      .def("hold", &Stamps::hold, py::arg("tensors"),
           "Whether these tensors are in the same memory, at the same versions, and unchanged in "
           "the bytes that are compared.");
  py::class_<Snapshot>(m, "Snapshot", "A state of a module tree; see snv2_kernels.nn.watch.",
                       py::custom_type_setup(let_collector_in))
      .def(py::init<const std::vector<py::object>&, std::vector<py::dict>, std::vector<py::object>,
                    const std::vector<int64_t>&, std::vector<py::dict>, std::vector<py::dict>>(),
           py::kw_only(), py::arg("modules"), py::arg("registries"), py::arg("tensors"),
           py::arg("bytes"), py::arg("hooks"), py::arg("modes"))
      .def("holds", &Snapshot::holds, py::arg("root"),
           "Whether no class, tensor, submodule or attribute has changed.")
      .def("runs_plain", &Snapshot::runs_plain, py::arg("root"),
           "Whether there are hooks, or one of the modes is train().");
}
