// Versions, addresses and shapes of tensors: what tells that one has been written or moved.
//
// PyTorch's getters take some 50 ns each and read many lines of memory, which a forward has thrown
// out of the caches; for the hundreds of tensors of a network that takes as long as some of its
// layers. So the words are read where PyTorch keeps them. It does not say where that is: the places
// are found in tensors whose versions and addresses are known, and tried on each tensor before they
// are relied on. Where they are not found, or wrong, the getters are asked.
#pragma once

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <vector>

// Indices of 8-byte words; that of the version is of 4-byte words, that of the type of 2-byte
// words.
struct TensorPlaces {
  size_t tensor;                            // in the Python object
  size_t storage, offset, counter;          // in the tensor
  size_t type, sizes, strides;              // there, too
  size_t data;                              // in the storage
  size_t version;                           // in the counter
  static constexpr int64_t kMostSizes = 5;  // dimensions whose sizes and strides lie in the tensor
};

// PyTorch's getters, without a lookup of their names.
class TensorGetters {
 public:
  TensorGetters();

  void check(const nanobind::object& tensor) const;
  int64_t version(const nanobind::object& tensor) const;
  int64_t address(const nanobind::object& tensor) const;
  std::vector<int64_t> sizes_and_strides(const nanobind::object& tensor) const;

 private:
  nanobind::object base_, version_, data_ptr_;
  descrgetfunc get_;
};

// Where what tells a tensor's state lies, by what has to be as it was before that may be read.
enum class Within { kObject, kTensor, kMemory };

class TensorAccess {
 public:
  // Tries on these tensors whether their words can be read.
  explicit TensorAccess(const std::vector<nanobind::object>& tensors);

  // Calls f(within, address, value) for each part of a tensor's state: its version, where its
  // storage begins, and the offset, the type, the sizes and the strides of its elements. The
  // address is that of the value in memory, null where PyTorch's getters told it.
  template <class F>
  void each_part(const nanobind::object& tensor, const F& f) const {
    if (places_ == nullptr) {
      const int64_t version = getters_.version(tensor), address = getters_.address(tensor);
      constexpr const uint64_t* kNowhere = nullptr;
      f(Within::kObject, kNowhere, static_cast<uint64_t>(version));
      f(Within::kObject, kNowhere, static_cast<uint64_t>(address));
      for (const int64_t each : getters_.sizes_and_strides(tensor)) {
        f(Within::kObject, kNowhere, static_cast<uint64_t>(each));
      }
      return;
    }
    const auto read = [&f](Within within, const auto* address) {
      const auto value = __atomic_load_n(address, __ATOMIC_RELAXED);
      f(within, address, value);
      return value;
    };
    const auto* const object = reinterpret_cast<const uint64_t*>(tensor.ptr());
    const auto* const words = pointer(read(Within::kObject, object + places_->tensor));
    const auto* const storage = pointer(read(Within::kTensor, words + places_->storage));
    const auto* const counter = pointer(read(Within::kTensor, words + places_->counter));
    read(Within::kTensor, words + places_->offset);
    read(Within::kTensor, reinterpret_cast<const uint16_t*>(words) + places_->type);
    // Their number stands before the sizes.
    const auto dims = static_cast<int64_t>(read(Within::kTensor, words + places_->sizes - 1));
    for (int64_t i = 0; i < std::min(dims, TensorPlaces::kMostSizes); ++i) {
      read(Within::kTensor, words + places_->sizes + i);
      read(Within::kTensor, words + places_->strides + i);
    }
    if (storage == nullptr || counter == nullptr) return;
    read(Within::kMemory, storage + places_->data);
    read(Within::kMemory, reinterpret_cast<const uint32_t*>(counter) + places_->version);
  }

  const char* data(const nanobind::object& tensor) const {
    return reinterpret_cast<const char*>(getters_.address(tensor));
  }
  void check(const nanobind::object& tensor) const { getters_.check(tensor); }

  bool reads_memory() const { return places_ != nullptr; }

 private:
  static const uint64_t* pointer(uint64_t word) { return reinterpret_cast<const uint64_t*>(word); }

  bool agree(const std::vector<nanobind::object>& tensors, const TensorPlaces& places) const;

  TensorGetters getters_;
  const TensorPlaces* places_ = nullptr;  // kept for the whole process
};
