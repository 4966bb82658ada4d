// snv2_kernels._native.Snapshot: has a module tree changed since its weights were packed?
//
// It is asked before every forward of a fused module, about some 5000 objects (x1.0), so it uses
// the C API directly. Python 3.11 numbers the states of dicts and classes: there only those are
// compared, and the objects in dicts when one has moved. Later ones, for all of which there is one
// binary, tell no such numbers: identities are compared. The forward before has thrown all of them
// out of the inner caches, and one by one they would cost a miss each; so their lines are asked for
// first.
//
// The root owns its snapshot, so the snapshot must not own the root, nor the root's dict: a module
// that was dropped would live until the garbage collector finds the cycle. The root is passed in.
#include "watch.h"

#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "tensor_access.h"

namespace nb = nanobind;

namespace {

// SNV2_PUBLIC_API: as on later Pythons, for tests.
#if PY_VERSION_HEX < 0x030C0000 && !defined(SNV2_PUBLIC_API)
constexpr bool kStatesHaveVersions = true;

// No two states of any two dicts have the same.
uint64_t version_of(const nb::dict& dict) {
  return reinterpret_cast<const PyDictObject*>(dict.ptr())->ma_version_tag;
}

// The states of classes. One is given another version when it, or a class that it derives from, is
// changed.
class Classes {
 public:
  void add(nb::handle type) {
    // A look-up gives the class a version, if it had none.
    nb::getattr(type, "forward", nb::none());
    types_.push_back(reinterpret_cast<const PyTypeObject*>(type.ptr()));
    versions_.push_back(types_.back()->tp_version_tag);
  }
  bool hold() const {
    for (size_t i = 0; i < types_.size(); ++i) {
      if (types_[i]->tp_version_tag != versions_[i]) return false;
    }
    return true;
  }
  int traverse(visitproc, void*) const { return 0; }
  void clear() {}

 private:
  std::vector<const PyTypeObject*> types_;
  std::vector<unsigned int> versions_;
};
#else
constexpr bool kStatesHaveVersions = false;

uint64_t version_of(const nb::dict&) { return 0; }

class Classes {
 public:
  void add(nb::handle type) {
    orders_.emplace_back(nb::borrow(type), type.attr("__mro__"));
    for (nb::handle each : orders_.back().second) {
      // Classes of C do not change.
      const bool fixed =
          !(PyType_GetFlags(reinterpret_cast<PyTypeObject*>(each.ptr())) & Py_TPFLAGS_HEAPTYPE);
      const auto known = [each](const Contents& c) { return c.type.is(each); };
      if (fixed || std::any_of(contents_.begin(), contents_.end(), known)) continue;
      Contents contents{nb::borrow(each), each.attr("__dict__").attr("values")(), {}};
      for (nb::handle value : contents.view) contents.values.push_back(nb::borrow(value));
      contents_.push_back(std::move(contents));
    }
  }
  bool hold() const {
    for (const auto& [type, order] : orders_) {
      if (!type.attr("__mro__").is(order)) return false;
    }
    for (const Contents& c : contents_) {
      size_t count = 0;
      for (nb::handle value : c.view) {
        if (count == c.values.size() || !c.values[count++].is(value)) return false;
      }
      if (count != c.values.size()) return false;
    }
    return true;
  }
  int traverse(visitproc visit, void* arg) const {
    for (const auto& [type, order] : orders_) {
      Py_VISIT(type.ptr());
      Py_VISIT(order.ptr());
    }
    for (const Contents& c : contents_) {
      Py_VISIT(c.type.ptr());
      Py_VISIT(c.view.ptr());
      for (const nb::object& value : c.values) Py_VISIT(value.ptr());
    }
    return 0;
  }
  void clear() {
    std::vector<std::pair<nb::object, nb::object>>().swap(orders_);
    std::vector<Contents>().swap(contents_);
  }

 private:
  struct Contents {
    nb::object type, view;
    std::vector<nb::object> values;
  };
  std::vector<std::pair<nb::object, nb::object>> orders_;  // a class and its __mro__
  std::vector<Contents> contents_;                         // of these classes and their bases
};
#endif

// Version counters and addresses of tensors, and the contents of those that move unseen: batch norm
// writes its statistics without a version.
class Stamps {
 public:
  // bytes: of each tensor, how many of its memory are compared.
  Stamps(const std::vector<nb::object>& tensors, const std::vector<int64_t>& bytes)
      : access_(tensors), bytes_(bytes) {
    if (bytes.size() != tensors.size()) throw nb::value_error("bytes: expected one per tensor");
    for (size_t i = 0; i < tensors.size(); ++i) {
      stamps_.push_back(access_.stamp(tensors[i]));
      memory_.push_back(reinterpret_cast<const char*>(access_.address(tensors[i])));
      contents_.insert(contents_.end(), memory_[i], memory_[i] + bytes_[i]);
    }
  }

  bool read_memory() const { return access_.reads_memory(); }

  // Calls f(address, bytes) for what hold() reads of tensors.
  template <class F>
  void each_read(const std::vector<nb::object>& tensors, const F& f) const {
    for (size_t i = 0; i < tensors.size(); ++i) {
      for (const void* const word : access_.read_by_stamp(tensors[i])) f(word, 8);
      if (bytes_[i] > 0) f(memory_[i], bytes_[i]);
    }
  }

  // Tells the same as hold(), of objects that need not be those of the beginning.
  bool hold_for_any(const std::vector<nb::object>& tensors) const {
    if (tensors.size() != stamps_.size()) return false;
    for (const nb::object& tensor : tensors) access_.check(tensor);
    return hold(tensors);
  }

  bool hold(const std::vector<nb::object>& tensors) const {
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (!(access_.stamp(tensors[i]) == stamps_[i])) return false;
    }
    const char* was = contents_.data();
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (bytes_[i] > 0 && std::memcmp(was, memory_[i], bytes_[i]) != 0) return false;
      was += bytes_[i];
    }
    return true;
  }

 private:
  TensorAccess access_;
  std::vector<TensorStamp> stamps_;
  std::vector<const char*> memory_;
  std::vector<int64_t> bytes_;  // of each tensor's memory that are compared
  std::vector<char> contents_;
};

class Snapshot {
 public:
  // modules: all of the tree, the root first; registries: their dicts of parameters, buffers and
  // submodules; tensors: the parameters and buffers; bytes: see Stamps; hooks: registries of hooks;
  // modes: attributes of the children whose training flag matters.
  Snapshot(const std::vector<nb::object>& modules, std::vector<nb::dict> registries,
           std::vector<nb::object> tensors, const std::vector<int64_t>& bytes,
           std::vector<nb::dict> hooks, std::vector<nb::dict> modes)
      : children_(modules.begin() + 1, modules.end()),
        registries_(std::move(registries)),
        tensors_(std::move(tensors)),
        hooks_(std::move(hooks)),
        modes_(std::move(modes)),
        stamps_(tensors_, bytes) {
    for (const nb::object& module : modules) {
      const nb::handle type = module.type();
      const bool known = std::find(types_.begin(), types_.end(), type.ptr()) != types_.end();
      types_.push_back(type.ptr());
      if (!known) classes_.add(type);
    }
    for (const nb::object& child : children_) attributes_.push_back(dict_of(child));
    const nb::object& root = modules.front();
    const nb::dict attributes = dict_of(root);
    for_each_value(attributes, [this](PyObject* value) {
      values_.push_back(nb::borrow<nb::object>(value));
      return true;
    });
    look_at_dicts(attributes);
    collect_lines(root);
  }

  bool holds(const nb::object& root) {
    prefetch();
    if (root.type().ptr() != types_[0]) return false;
    for (size_t i = 0; i < children_.size(); ++i) {
      if (children_[i].type().ptr() != types_[i + 1]) return false;
    }
    if (!classes_.hold()) return false;
    const nb::dict attributes = dict_of(root);
    if (!dicts_rest(attributes)) {
      if (!values_hold(attributes)) return false;
      if (kStatesHaveVersions) look_at_dicts(attributes);
    }
    return stamps_.hold(tensors_);
  }

  bool runs_plain(const nb::object& root) const {
    return dicts_rest(dict_of(root)) ? runs_plain_ : finds_plain();
  }

  bool rests(const nb::object& root) {
    return holds(root) && !(kStatesHaveVersions ? runs_plain_ : finds_plain());
  }

  // For the garbage collector.
  int traverse(visitproc visit, void* arg) const {
    for (const auto* objects : {&children_, &tensors_, &values_}) {
      for (const nb::object& object : *objects) Py_VISIT(object.ptr());
    }
    for (const auto* dicts : {&registries_, &hooks_, &modes_, &attributes_}) {
      for (const nb::dict& dict : *dicts) Py_VISIT(dict.ptr());
    }
    return classes_.traverse(visit, arg);
  }
  void clear() {
    classes_.clear();
    // What is let go may run code that asks again: no vector is emptied in place.
    for (auto* objects : {&children_, &tensors_, &values_}) {
      std::vector<nb::object>().swap(*objects);
    }
    for (auto* dicts : {&registries_, &hooks_, &modes_, &attributes_}) {
      std::vector<nb::dict>().swap(*dicts);
    }
  }

 private:
  static nb::dict dict_of(const nb::object& module) {
    return nb::borrow<nb::dict>(module.attr("__dict__"));
  }

  // Whether no dict has changed at all since look_at_dicts(). If not, nothing need have.
  bool dicts_rest(const nb::dict& attributes) const {
    if (!kStatesHaveVersions || version_of(attributes) != root_version_) return false;
    size_t i = 0;
    for (const auto* dicts : {&registries_, &attributes_, &hooks_}) {
      for (const nb::dict& dict : *dicts) {
        if (version_of(dict) != dict_versions_[i++]) return false;
      }
    }
    return true;
  }

  void look_at_dicts(const nb::dict& attributes) {
    root_version_ = version_of(attributes);
    dict_versions_.clear();
    for (const auto* dicts : {&registries_, &attributes_, &hooks_}) {
      for (const nb::dict& dict : *dicts) dict_versions_.push_back(version_of(dict));
    }
    runs_plain_ = finds_plain();
  }

  bool finds_plain() const {
    for (const nb::dict& dict : hooks_) {
      if (PyDict_Size(dict.ptr()) > 0) return true;
    }
    for (const nb::dict& attributes : modes_) {
      if (PyDict_GetItemWithError(attributes.ptr(), training_.ptr()) == Py_True) return true;
    }
    return false;
  }

  bool values_hold(const nb::dict& attributes) const {
    size_t count = 0;
    const bool same = for_each_value(attributes, [&](PyObject* value) {
      return count < values_.size() && value == values_[count++].ptr();
    });
    return same && count == values_.size();
  }

  // Values of all registries, and of all attributes but the mode and a fused module's own weights.
  // Stops at the first for which f is false.
  template <class F>
  bool for_each_value(const nb::dict& attributes, const F& f) const {
    PyObject* value = nullptr;
    for (const nb::dict& dict : registries_) {
      Py_ssize_t position = 0;
      while (PyDict_Next(dict.ptr(), &position, nullptr, &value)) {
        if (!f(value)) return false;
      }
    }
    if (!for_each_attribute(attributes, f)) return false;
    for (const nb::dict& dict : attributes_) {
      if (!for_each_attribute(dict, f)) return false;
    }
    return true;
  }

  template <class F>
  bool for_each_attribute(const nb::dict& attributes, const F& f) const {
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
  void collect_lines(const nb::object& root) {
    stamps_.each_read(tensors_,
                      [this](const void* data, int64_t bytes) { add_lines(data, bytes); });
    for (const nb::object& module : children_) add_lines(module.ptr(), 16);
    add_lines(dict_of(root).ptr(), kLine);
    for (const auto* dicts : {&registries_, &attributes_, &hooks_}) {
      for (const nb::dict& dict : *dicts) add_lines(dict.ptr(), kLine);
    }
    std::sort(lines_.begin(), lines_.end());
    lines_.erase(std::unique(lines_.begin(), lines_.end()), lines_.end());
  }

  void prefetch() const {
    for (const char* line : lines_) {
      __builtin_prefetch(line);
      asm volatile("");  // a loop of nothing but hints is left out
    }
  }

  static constexpr uintptr_t kLine = 64;

  static nb::str interned(const char* name) {
    return nb::steal<nb::str>(PyUnicode_InternFromString(name));
  }

  std::vector<nb::object> children_;
  std::vector<nb::dict> registries_;
  std::vector<nb::object> tensors_;
  std::vector<nb::dict> hooks_;
  std::vector<nb::dict> modes_;
  std::vector<nb::dict> attributes_;    // of each child
  std::vector<const PyObject*> types_;  // of the root and each child
  Classes classes_;
  std::vector<nb::object> values_;       // of registries and attributes
  std::vector<uint64_t> dict_versions_;  // of registries, attributes, hooks
  uint64_t root_version_ = 0;            // of its attributes
  bool runs_plain_ = false;              // when they were looked at
  Stamps stamps_;
  std::vector<const char*> lines_;  // that holds() and runs_plain() read
  // Attribute names are interned, so that keys compare as pointers.
  nb::str training_ = interned("training");
  nb::str packed_state_ = interned("_packed_state");
};

// Null while the object is being made.
Snapshot* snapshot_of(PyObject* object) {
  return nb::inst_ready(object) ? nb::inst_ptr<Snapshot>(object) : nullptr;
}

int traverse_snapshot(PyObject* object, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(object));
  const Snapshot* snapshot = snapshot_of(object);
  return snapshot == nullptr ? 0 : snapshot->traverse(visit, arg);
}

int clear_snapshot(PyObject* object) {
  if (Snapshot* snapshot = snapshot_of(object)) snapshot->clear();
  return 0;
}

PyType_Slot collected[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse_snapshot)},
                           {Py_tp_clear, reinterpret_cast<void*>(clear_snapshot)},
                           {0, nullptr}};

}  // namespace

void bind_snapshot(nb::module_& m) {
  nb::class_<Stamps>(m, "Stamps", "States of tensors; see snv2_kernels.nn.watch.")
      .def(nb::init<const std::vector<nb::object>&, const std::vector<int64_t>&>(),
           nb::arg("tensors"), nb::arg("bytes"))
      .def("hold", &Stamps::hold_for_any, nb::arg("tensors"),
           "Whether these tensors are in the same memory, at the same versions, and unchanged in "
           "the bytes that are compared.")
      .def_prop_ro("read_memory", &Stamps::read_memory,
                   "Whether the words are read where PyTorch keeps them, not through its getters.");
  nb::class_<Snapshot>(m, "Snapshot", "A state of a module tree; see snv2_kernels.nn.watch.",
                       nb::type_slots(collected))
      .def(nb::init<const std::vector<nb::object>&, std::vector<nb::dict>, std::vector<nb::object>,
                    const std::vector<int64_t>&, std::vector<nb::dict>, std::vector<nb::dict>>(),
           nb::kw_only(), nb::arg("modules"), nb::arg("registries"), nb::arg("tensors"),
           nb::arg("bytes"), nb::arg("hooks"), nb::arg("modes"))
      .def("holds", &Snapshot::holds, nb::arg("root"),
           "Whether no class, tensor, submodule or attribute has changed.")
      .def("rests", &Snapshot::rests, nb::arg("root"), "Whether it holds and does not run plain.")
      .def("runs_plain", &Snapshot::runs_plain, nb::arg("root"),
           "Whether there are hooks, or one of the modes is train().");
}
