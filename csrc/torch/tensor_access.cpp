#include "tensor_access.h"

#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>

namespace nb = nanobind;

namespace {

// Takes a new reference to an int, or null with a Python error set.
int64_t to_int(PyObject* value) {
  if (value == nullptr) throw nb::python_error();
  const int64_t result = PyLong_AsLongLong(value);
  Py_DECREF(value);
  if (result == -1 && PyErr_Occurred() != nullptr) throw nb::python_error();
  return result;
}

// A tensor, and the words of its memory as PyTorch's functions tell them.
struct Known {
  nb::object object;
  uintptr_t tensor, storage, data, offset;
  uint32_t version;
  uint16_t type;
  std::vector<int64_t> sizes, strides;

  Known(nb::object t, uint16_t code, const TensorGetters& getters)
      : object(std::move(t)), type(code) {
    const nb::object memory = object.attr("untyped_storage")();
    tensor = nb::cast<uintptr_t>(object.attr("_cdata"));
    storage = nb::cast<uintptr_t>(memory.attr("_cdata"));
    data = nb::cast<uintptr_t>(memory.attr("data_ptr")());
    offset = nb::cast<uintptr_t>(object.attr("storage_offset")());
    version = static_cast<uint32_t>(getters.version(object));
    sizes = nb::cast<std::vector<int64_t>>(object.attr("shape"));
    strides = nb::cast<std::vector<int64_t>>(object.attr("stride")());
  }
};

// Tells whether memory may be read: the kernel looks before it copies.
class Reader {
 public:
  Reader() { open_ = pipe(ends_) == 0; }
  ~Reader() {
    if (!open_) return;
    close(ends_[0]);
    close(ends_[1]);
  }
  Reader(const Reader&) = delete;

  template <class T>
  std::vector<T> read(uintptr_t address, size_t count) const {
    std::vector<T> values(count);
    const auto bytes = static_cast<ssize_t>(count * sizeof(T));
    const bool aligned = address != 0 && address % sizeof(void*) == 0;
    if (!open_ || !aligned ||
        write(ends_[1], reinterpret_cast<const void*>(address), bytes) != bytes ||
        ::read(ends_[0], values.data(), bytes) != bytes) {
      return {};
    }
    return values;
  }

 private:
  int ends_[2];
  bool open_;
};

// Indices at which every tensor has its value.
class Candidates {
 public:
  explicit Candidates(size_t count) : left_(count, true) {}

  template <class F>
  void keep(const F& right) {
    for (size_t i = 0; i < left_.size(); ++i) left_[i] = left_[i] && right(i);
  }
  std::optional<size_t> only() const {
    if (std::count(left_.begin(), left_.end(), true) != 1) return std::nullopt;
    return std::find(left_.begin(), left_.end(), true) - left_.begin();
  }

 private:
  std::vector<bool> left_;
};

template <class T>
bool has(const std::vector<T>& values, size_t i, T value) {
  return i < values.size() && values[i] == value;
}

// Whether values begin at index i of words.
bool has_all(const std::vector<uintptr_t>& words, size_t i, const std::vector<int64_t>& values) {
  return i + values.size() <= words.size() &&
         std::equal(values.begin(), values.end(), words.begin() + i,
                    [](int64_t a, uintptr_t b) { return a == static_cast<int64_t>(b); });
}

// Leaves inference mode, whose tensors have no versions, for a while.
class OutsideInference {
 public:
  explicit OutsideInference(const nb::object& torch) : mode_(torch.attr("inference_mode")(false)) {
    mode_.attr("__enter__")();
  }
  ~OutsideInference() { mode_.attr("__exit__")(nb::none(), nb::none(), nb::none()); }
  OutsideInference(const OutsideInference&) = delete;

 private:
  nb::object mode_;
};

// Tensors of which no two agree in anything, at offsets and versions that no other word has.
// PyTorch owns the memory of some: then their storages have its address twice.
std::vector<Known> probes(const TensorGetters& getters) {
  const nb::object torch = nb::module_::import_("torch");
  const nb::object array = nb::module_::import_("builtins").attr("bytearray");
  const OutsideInference outside(torch);
  struct Type {
    const char* name;
    uint16_t code;  // PyTorch's number of it
    int64_t bytes, seed;
  };
  std::vector<Known> made;
  for (const Type& type : {Type{"uint8", 0, 1, 101}, Type{"float32", 6, 4, 211},
                           Type{"int64", 4, 8, 307}, Type{"float16", 5, 2, 401}}) {
    const int64_t count = 5 * type.seed;
    const nb::object dtype = torch.attr(type.name);
    nb::object whole =
        made.size() % 2 == 0
            ? torch.attr("empty")(count, nb::arg("dtype") = dtype, nb::arg("device") = "cpu")
            : torch.attr("frombuffer")(array(count * type.bytes), nb::arg("dtype") = dtype);
    const int64_t seed = type.seed;
    nb::object part = whole.attr("as_strided")(nb::make_tuple(2, 3, 5, 4),
                                               nb::make_tuple(seed % 7 + 11, seed % 5 + 17, 7, 8),
                                               nb::arg("storage_offset") = 2 * seed + 1);
    for (int64_t i = 0; i < type.seed / 8; ++i) part.attr("zero_")();
    made.emplace_back(std::move(part), type.code, getters);
  }
  return made;
}

std::optional<TensorPlaces> find_places(const TensorGetters& getters) {
  constexpr size_t kObject = 4, kTensor = 24, kStorage = 8, kCounter = 8;
  if (sizeof(void*) != 8) return std::nullopt;
  const Reader reader;
  Candidates tensor(kObject), storage(kTensor), offset(kTensor), counter(kTensor * kCounter),
      type(kTensor * 4), sizes(kTensor), strides(kTensor), data(kStorage);
  for (const Known& known : probes(getters)) {
    const auto object =
        reader.read<uintptr_t>(reinterpret_cast<uintptr_t>(known.object.ptr()), kObject);
    const auto words = reader.read<uintptr_t>(known.tensor, kTensor);
    const auto of_storage = reader.read<uintptr_t>(known.storage, kStorage);
    tensor.keep([&](size_t i) { return has(object, i, known.tensor); });
    const auto halves = reader.read<uint16_t>(known.tensor, kTensor * 4);
    storage.keep([&](size_t i) { return has(words, i, known.storage); });
    type.keep([&](size_t i) { return has(halves, i, known.type); });
    offset.keep([&](size_t i) { return has(words, i, known.offset); });
    sizes.keep([&](size_t i) {
      const uintptr_t dims = known.sizes.size();
      return i > 0 && has(words, i - 1, dims) && has_all(words, i, known.sizes);
    });
    strides.keep([&](size_t i) { return has_all(words, i, known.strides); });
    data.keep([&](size_t i) { return has(of_storage, i, known.data); });
    std::vector<std::vector<uint32_t>> numbers;
    for (const uintptr_t each : words) numbers.push_back(reader.read<uint32_t>(each, kCounter));
    counter.keep([&](size_t i) {
      return i / kCounter < numbers.size() &&
             has(numbers[i / kCounter], i % kCounter, known.version);
    });
  }
  for (const Candidates& each : {tensor, storage, offset, counter, type, sizes, strides, data}) {
    if (!each.only()) return std::nullopt;
  }
  TensorPlaces places;
  places.tensor = *tensor.only();
  places.storage = *storage.only();
  places.offset = *offset.only();
  places.counter = *counter.only() / kCounter;
  places.version = *counter.only() % kCounter;
  places.type = *type.only();
  places.sizes = *sizes.only();
  places.strides = *strides.only();
  places.data = *data.only();
  return places;
}

// Returns the places once found, null while they are not. What runs Python may let other threads
// run, or run this again: nobody waits for anybody, and whoever finds them first has them kept.
const TensorPlaces* known_places(const TensorGetters& getters) {
  constexpr int kMostTries = 16;
  static std::atomic<const TensorPlaces*> kept{nullptr};
  static std::atomic<int> tries{0};
  if (kept.load() == nullptr && tries.fetch_add(1) < kMostTries) {
    if (const auto found = find_places(getters)) {
      const auto* const mine = new TensorPlaces(*found);
      const TensorPlaces* none = nullptr;
      if (!kept.compare_exchange_strong(none, mine)) delete mine;
    }
  }
  return kept.load();
}

}  // namespace

TensorGetters::TensorGetters()
    : base_(nb::module_::import_("torch._C").attr("TensorBase")),
      version_(base_.attr("_version")),
      data_ptr_(base_.attr("data_ptr")),
      get_(reinterpret_cast<descrgetfunc>(
          PyType_GetSlot(Py_TYPE(version_.ptr()), Py_tp_descr_get))) {
  if (get_ == nullptr) throw nb::type_error("torch: expected TensorBase._version of the C API");
}

void TensorGetters::check(const nb::object& tensor) const {
  if (!nb::isinstance(tensor, base_)) throw nb::type_error("tensors: expected tensors");
}

int64_t TensorGetters::version(const nb::object& tensor) const {
  return to_int(
      get_(version_.ptr(), tensor.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()))));
}

int64_t TensorGetters::address(const nb::object& tensor) const {
  PyObject* const arguments[] = {tensor.ptr()};
  return to_int(PyObject_Vectorcall(data_ptr_.ptr(), arguments, 1, nullptr));
}

std::vector<int64_t> TensorGetters::sizes_and_strides(const nb::object& tensor) const {
  auto sizes = nb::cast<std::vector<int64_t>>(tensor.attr("shape"));
  const auto strides = nb::cast<std::vector<int64_t>>(tensor.attr("stride")());
  sizes.insert(sizes.end(), strides.begin(), strides.end());
  return sizes;
}

TensorAccess::TensorAccess(const std::vector<nb::object>& tensors) {
  for (const nb::object& tensor : tensors) getters_.check(tensor);
  try {
    const TensorPlaces* const places = known_places(getters_);
    if (places != nullptr && agree(tensors, *places)) places_ = places;
  } catch (const nb::python_error& error) {
    // In a mode that makes tensors of its own the getters say what they can.
    if (!error.matches(PyExc_Exception)) throw;
  }
}

bool TensorAccess::agree(const std::vector<nb::object>& tensors, const TensorPlaces& places) const {
  const auto word = [](const nb::handle& address) { return nb::cast<uintptr_t>(address); };
  return std::all_of(tensors.begin(), tensors.end(), [&](const nb::object& tensor) {
    const auto* const object = reinterpret_cast<const uintptr_t*>(tensor.ptr());
    const uintptr_t cdata = word(tensor.attr("_cdata"));
    if (object[places.tensor] != cdata) return false;
    const auto* const words = reinterpret_cast<const uintptr_t*>(cdata);
    const nb::object memory = tensor.attr("untyped_storage")();
    const uintptr_t storage = word(memory.attr("_cdata")), counter = words[places.counter];
    const std::vector<int64_t> told = getters_.sizes_and_strides(tensor);
    const auto dims = static_cast<int64_t>(told.size() / 2);
    if (words[places.storage] != storage || counter == 0 || dims > TensorPlaces::kMostSizes ||
        static_cast<int64_t>(words[places.sizes - 1]) != dims) {
      return false;
    }
    for (int64_t i = 0; i < dims; ++i) {
      if (static_cast<int64_t>(words[places.sizes + i]) != told[i] ||
          static_cast<int64_t>(words[places.strides + i]) != told[dims + i]) {
        return false;
      }
    }
    const auto* const versions = reinterpret_cast<const uint32_t*>(counter);
    return reinterpret_cast<const uintptr_t*>(storage)[places.data] ==
               word(memory.attr("data_ptr")()) &&
           versions[places.version] == static_cast<uint32_t>(getters_.version(tensor)) &&
           words[places.offset] == word(tensor.attr("storage_offset")());
  });
}
