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
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "tensor_access.h"

namespace nb = nanobind;

namespace {

// SNV2_PUBLIC_API: as on later Pythons, for tests.
#if PY_VERSION_HEX < 0x030C0000 && !defined(SNV2_PUBLIC_API)
constexpr bool kStatesHaveVersions = true;

// No two states of any two dicts have the same.
const uint64_t* version_in(const nb::dict& dict) {
  return &reinterpret_cast<const PyDictObject*>(dict.ptr())->ma_version_tag;
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

const uint64_t* version_in(const nb::dict&) { return nullptr; }

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

// Numbers of one width in memory, in the order of their addresses, and what they were.
template <class T>
class Numbers {
 public:
  void add(const T* place, T value) { known_.emplace_back(place, value); }
  void sort() { std::sort(known_.begin(), known_.end()); }
  bool hold() const {
    for (const auto& [place, value] : known_) {
      if (__atomic_load_n(place, __ATOMIC_RELAXED) != value) return false;
    }
    return true;
  }
  void read_again() {
    for (auto& [place, value] : known_) value = *place;
  }
  void prefetch() const {
    for (const auto& [place, value] : known_) {
      __builtin_prefetch(place);
      asm volatile("");  // a loop of nothing but hints is left out
    }
  }

 private:
  std::vector<std::pair<const T*, T>> known_;
};

// Steps that any optimizer has taken in this process: fused ones (Adam(fused=True)) write
// parameters without moving their versions.
int64_t optimizer_steps = 0;

// Versions, addresses and shapes of tensors, and the contents of those that move unseen: batch norm
// writes its statistics without a version.
class Stamps {
 public:
  // bytes: of each tensor, how many of its memory are compared.
  Stamps(const std::vector<nb::object>& tensors, const std::vector<int64_t>& bytes)
      : access_(tensors), count_(tensors.size()) {
    if (bytes.size() != tensors.size()) throw nb::value_error("bytes: expected one per tensor");
    for (size_t i = 0; i < tensors.size(); ++i) {
      access_.each_part(tensors[i], [this](Within within, const auto* address, auto value) {
        parts_.push_back(value);
        if (address != nullptr) add(within, address, value);
      });
      if (bytes[i] == 0) continue;
      memory_.emplace_back(access_.data(tensors[i]), bytes[i]);
      contents_.insert(contents_.end(), memory_.back().first, memory_.back().first + bytes[i]);
    }
    std::apply([](auto&... each) { (each.sort(), ...); }, numbers_);
  }

  bool read_memory() const { return access_.reads_memory(); }

  void prefetch() const {
    std::apply([](const auto&... each) { (each.prefetch(), ...); }, numbers_);
    for (const auto& [memory, bytes] : memory_) {
      for (int64_t i = 0; i < bytes; i += kLine) {
        __builtin_prefetch(memory + i);
        asm volatile("");
      }
    }
  }

  // Tells the same as hold(), of objects that need not be those of the beginning.
  bool hold_for_any(const std::vector<nb::object>& tensors) const {
    if (tensors.size() != count_ || steps_ != optimizer_steps) return false;
    for (const nb::object& tensor : tensors) access_.check(tensor);
    size_t i = 0;
    bool same = true;
    for (const nb::object& tensor : tensors) {
      access_.each_part(tensor, [&](Within, const auto*, auto value) {
        same = same && i < parts_.size() && parts_[i] == value;
        ++i;
      });
    }
    return same && i == parts_.size() && contents_hold();
  }

  bool hold(const std::vector<nb::object>& tensors) const {
    if (!read_memory()) return hold_for_any(tensors);
    // Nothing is read of what may be gone.
    return steps_ == optimizer_steps &&
           std::apply([](const auto&... each) { return (each.hold() && ...); }, numbers_) &&
           contents_hold();
  }

 private:
  static constexpr int64_t kLine = 64;

  void add(Within within, const uint64_t* place, uint64_t value) {
    auto& [objects, types, tensors, versions, memory] = numbers_;
    (within == Within::kObject   ? objects
     : within == Within::kTensor ? tensors
                                 : memory)
        .add(place, value);
  }
  void add(Within, const uint16_t* place, uint16_t value) {
    std::get<1>(numbers_).add(place, value);
  }
  void add(Within, const uint32_t* place, uint32_t value) {
    std::get<3>(numbers_).add(place, value);
  }

  bool contents_hold() const {
    const char* was = contents_.data();
    for (const auto& [memory, bytes] : memory_) {
      if (std::memcmp(was, memory, bytes) != 0) return false;
      was += bytes;
    }
    return true;
  }

  TensorAccess access_;
  size_t count_;
  int64_t steps_ = optimizer_steps;
  std::vector<uint64_t> parts_;
  // Those of one are read only where those before it hold.
  std::tuple<Numbers<uint64_t>, Numbers<uint16_t>, Numbers<uint64_t>, Numbers<uint32_t>,
             Numbers<uint64_t>>
      numbers_;
  std::vector<std::pair<const char*, int64_t>> memory_;  // that is compared
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
    std::set<PyObject*> types;
    for (const nb::object& module : modules) {
      if (types.insert(module.type().ptr()).second) classes_.add(module.type());
    }
    for (const nb::object& child : children_) {
      attributes_.push_back(dict_of(child));
      types_.add(&child.ptr()->ob_type, Py_TYPE(child.ptr()));
    }
    types_.sort();
    const nb::object& root = modules.front();
    root_type_ = root.type().ptr();
    const nb::dict attributes = dict_of(root);
    for_each_value(attributes, [this](PyObject* value) {
      values_.push_back(nb::borrow<nb::object>(value));
      return true;
    });
    if (kStatesHaveVersions) {
      for (const auto* dicts : {&registries_, &attributes_, &hooks_}) {
        for (const nb::dict& dict : *dicts) dict_versions_.add(version_in(dict), *version_in(dict));
      }
      dict_versions_.sort();
    }
    look_at_dicts(attributes);
  }

  // Asks for the memory that holds() reads.
  void prefetch() const {
    types_.prefetch();
    dict_versions_.prefetch();
    stamps_.prefetch();
  }

  bool holds(const nb::object& root) {
    if (root.type().ptr() != root_type_ || !types_.hold() || !classes_.hold()) return false;
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
    return kStatesHaveVersions && *version_in(attributes) == root_version_ && dict_versions_.hold();
  }

  void look_at_dicts(const nb::dict& attributes) {
    if (kStatesHaveVersions) root_version_ = *version_in(attributes);
    dict_versions_.read_again();
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

  static nb::str interned(const char* name) {
    return nb::steal<nb::str>(PyUnicode_InternFromString(name));
  }

  std::vector<nb::object> children_;
  std::vector<nb::dict> registries_;
  std::vector<nb::object> tensors_;
  std::vector<nb::dict> hooks_;
  std::vector<nb::dict> modes_;
  std::vector<nb::dict> attributes_;  // of each child
  const PyObject* root_type_ = nullptr;
  Numbers<PyTypeObject*> types_;  // of each child
  Classes classes_;
  std::vector<nb::object> values_;   // of registries and attributes
  Numbers<uint64_t> dict_versions_;  // of registries, attributes, hooks
  uint64_t root_version_ = 0;        // of its attributes
  bool runs_plain_ = false;          // when they were looked at
  Stamps stamps_;
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
  m.def(
      "count_optimizer_step", [](const nb::args&, const nb::kwargs&) { ++optimizer_steps; },
      "Let no snapshot of before hold.");
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
      .def("prefetch", &Snapshot::prefetch, "Ask for the memory that the others read.")
      .def("holds", &Snapshot::holds, nb::arg("root"),
           "Whether no class, tensor, submodule or attribute has changed.")
      .def("rests", &Snapshot::rests, nb::arg("root"), "Whether it holds and does not run plain.")
      .def("runs_plain", &Snapshot::runs_plain, nb::arg("root"),
           "Whether there are hooks, or one of the modes is train().");
}
