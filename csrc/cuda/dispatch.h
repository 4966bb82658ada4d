// From values known at run time to types known to the compiler.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "cuda/activation.h"
#include "cuda/mma.h"

namespace snv2::SNV2_GPU {

// Storage types that kernels are compiled for. A copy of them for one test is compiled for one
// type, in a third of the time.
#ifdef SNV2_ONLY_TYPE
template <class T>
constexpr bool kHasType = std::is_same_v<T, SNV2_ONLY_TYPE>;
#else
template <class T>
constexpr bool kHasType = true;
#endif

// Calls f(T{}) with the storage type of dtype.
template <class F>
void with_type(DType dtype, const F& f) {
  const auto call = [&](auto zero) {
    if constexpr (kHasType<decltype(zero)>) return f(zero);
    throw std::invalid_argument("no kernel for this dtype");
  };
  switch (dtype) {
    case DType::kFloat32:
      return call(float{});
    case DType::kFloat16:
      return call(half_t{});
    case DType::kBFloat16:
      return call(bfloat16_t{});
    case DType::kUint8:
      break;  // of plans that a GPU has no kernels for
  }
  throw std::invalid_argument("unknown dtype");
}

// Calls f(Act{}) with the class of a layer's activation.
template <class F>
void with_class(const GpuActivation& act, const F& f) {
  if (act.kind == Activation::kRelu) return f(Relu{});
  f(AnyActivation{});
}

}  // namespace snv2::SNV2_GPU
