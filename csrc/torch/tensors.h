// Tensors of PyTorch's stable ABI as the plain structs of snv2/types.h.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <iomanip>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "snv2/types.h"

namespace snv2::binding {

using torch::headeronly::DeviceType;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::optional<DType> dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return std::nullopt;
  }
}

// A feature map, on whatever device.
inline void check_map(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions [N, C, H, W], got ", t.dim());
  STD_TORCH_CHECK(dtype_of(t).has_value(), name, " must be float32, float16 or bfloat16");
}

inline void check_pixels(const Tensor& x) {
  STD_TORCH_CHECK(x.size(2) > 0 && x.size(3) > 0, "x must have at least one pixel");
}

// Float parameters, dense, on the device of the map `x`.
inline const float* parameters(const Tensor& t, const char* name, int64_t count, const Tensor& x) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.device() == x.device(), name,
      " must be a contiguous float32 tensor on the device of x");
  STD_TORCH_CHECK(t.numel() == count, name, " must have ", count, " elements, got ", t.numel());
  return static_cast<const float*>(t.const_data_ptr());
}

// True if t is dense in channels-last order.
inline bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

// The layout a result for t has: torch's own rule for convolutions (suggest_memory_format), which
// asks whether the strides grow in channels-last order and takes contiguous where both would do.
inline Layout layout_of(const Tensor& t) {
  int64_t smallest = 0;
  if (t.stride(1) == 0) return Layout::kContiguous;
  for (const int64_t dim : {1, 3, 2, 0}) {
    const int64_t size = t.size(dim), stride = t.stride(dim);
    if (size == 0 || stride < smallest || (dim == 0 && smallest == t.stride(1))) {
      return Layout::kContiguous;
    }
    smallest = stride * (size > 1 ? size : 1);
  }
  return Layout::kChannelsLast;
}

inline MemoryFormat format_of(Layout layout) {
  return layout == Layout::kContiguous ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast;
}

inline bool is_dense(const Tensor& t, Layout layout) {
  return layout == Layout::kContiguous ? t.is_contiguous() : is_channels_last(t);
}

inline double element_bytes(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    default:
      return 2;
  }
}

// Calls `allocate` for `what`. Torch's own exception stays behind the stable ABI, so this one says
// how much was asked for; in floating point, as absurd shapes overflow an integer.
template <class Allocate>
Tensor allocated(const std::string& what, IntHeaderOnlyArrayRef shape, ScalarType type,
                 const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::runtime_error&) {
    double bytes = element_bytes(type);
    for (const int64_t extent : shape) bytes *= static_cast<double>(extent);
    std::ostringstream message;
    message << "cannot allocate memory for " << what << ": " << std::fixed << std::setprecision(0)
            << bytes << " bytes";
    throw std::runtime_error(message.str());
  }
}

// A new tensor on x's device, contiguous by default.
inline Tensor new_tensor(const std::string& what, IntHeaderOnlyArrayRef shape, ScalarType type,
                         const Tensor& x, std::optional<MemoryFormat> format = std::nullopt) {
  return allocated(what, shape, type, [&] {
    return torch::stable::empty(shape, type, std::nullopt, x.device(), std::nullopt, format);
  });
}

// t itself where it is dense in `layout`, else a copy.
inline Tensor dense(const Tensor& t, Layout layout, const std::string& name) {
  if (is_dense(t, layout)) return t;
  return allocated("a dense copy of " + name, t.sizes(), t.scalar_type(),
                   [&] { return torch::stable::contiguous(t, format_of(layout)); });
}

// Checks that memory holds a dense tensor: a storage may have been resized under it.
inline void check_storage(const Tensor& t) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  const auto each = static_cast<int64_t>(element_bytes(t.scalar_type()));
  STD_TORCH_CHECK(t.numel() == 0 || (t.storage_offset() + t.numel()) * each <= bytes,
                  "the storage of a tensor of ", t.numel(), " elements has ", bytes, " bytes");
}

inline FeatureMap map_of(const Tensor& t, Layout layout) {
  check_storage(t);
  return {t.data_ptr(), *dtype_of(t), layout, t.size(0), t.size(1), t.size(2), t.size(3)};
}

// Memory for a result of `like`'s batch, dtype and device.
inline Tensor empty_map(const Tensor& like, int64_t channels, int64_t height, int64_t width,
                        Layout layout) {
  return new_tensor("the result", {like.size(0), channels, height, width}, like.scalar_type(), like,
                    format_of(layout));
}

}  // namespace snv2::binding
