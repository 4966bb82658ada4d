// From values known at run time to types known to the compiler.
#pragma once

#include <stdexcept>

#include "cuda/activation.h"
#include "cuda/mma.h"

namespace snv2::SNV2_GPU {

// Calls f(T{}) with the storage type of dtype.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat16:
      return f(half_t{});
    case DType::kBFloat16:
      return f(bfloat16_t{});
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
