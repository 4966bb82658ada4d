// Versions and addresses of tensors: what tells that one has been written or moved.
//
// PyTorch's getters take some 50 ns each and read many lines of memory, which a forward has thrown
// out of the caches; for the hundreds of tensors of a network that takes as long as some of its
// layers. So the words are read where PyTorch keeps them. It does not say where that is: the places
// are found in tensors whose versions and addresses are known, and tried on each tensor before they
// are relied on. Where they are not found, or wrong, the getters are asked.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

// A state of a tensor's memory: the address is where its storage begins, and the offset and the
// type of its elements tell the rest. Of a tensor that only the getters know, it is that of the
// tensor.
struct TensorStamp {
  int64_t version, address, offset;
  int16_t type;
  bool operator==(const TensorStamp& other) const {
    return version == other.version && address == other.address && offset == other.offset &&
           type == other.type;
  }
};

// Indices of 8-byte words; that of the version is of 4-byte words, that of the type of 2-byte
// words.
struct TensorPlaces {
  size_t tensor;                    // in the Python object
  size_t storage, offset, counter;  // in the tensor
  size_t type;                      // there, too
  size_t data;                      // in the storage
  size_t version;                   // in the counter
};

// PyTorch's getters, without a lookup of their names.
class TensorGetters {
 public:
  TensorGetters();

  void check(const nanobind::object& tensor) const;
  int64_t version(const nanobind::object& tensor) const;
  int64_t address(const nanobind::object& tensor) const;

 private:
  nanobind::object base_, version_, data_ptr_;
  descrgetfunc get_;
};

class TensorAccess {
 public:
  // Tries on these tensors whether their words can be read.
  explicit TensorAccess(const std::vector<nanobind::object>& tensors);

  TensorStamp stamp(const nanobind::object& tensor) const {
    if (places_ != nullptr) return in_memory(tensor, *places_);
    return {getters_.version(tensor), getters_.address(tensor), 0, 0};
  }
  int64_t address(const nanobind::object& tensor) const { return getters_.address(tensor); }
  void check(const nanobind::object& tensor) const { getters_.check(tensor); }

  bool reads_memory() const { return places_ != nullptr; }

  // Returns the addresses that stamp() reads, none where it asks the getters.
  std::vector<const void*> read_by_stamp(const nanobind::object& tensor) const;

 private:
  using Word = const char*;

  static const Word* place(const void* object, size_t index) {
    return static_cast<const Word*>(object) + index;
  }

  static TensorStamp in_memory(const nanobind::object& object, const TensorPlaces& places) {
    const Word tensor = *place(object.ptr(), places.tensor);
    const Word storage = *place(tensor, places.storage), counter = *place(tensor, places.counter);
    if (storage == nullptr || counter == nullptr) return {-1, -1, -1, -1};
    const auto* const versions = reinterpret_cast<const uint32_t*>(counter);
    return {__atomic_load_n(versions + places.version, __ATOMIC_RELAXED),
            reinterpret_cast<int64_t>(*place(storage, places.data)),
            reinterpret_cast<int64_t>(*place(tensor, places.offset)),
            reinterpret_cast<const int16_t*>(tensor)[places.type]};
  }

  bool agree(const std::vector<nanobind::object>& tensors, const TensorPlaces& places) const;

  TensorGetters getters_;
  const TensorPlaces* places_ = nullptr;  // kept for the whole process
};
