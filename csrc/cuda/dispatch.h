// From values known at run time to types known to the compiler.
#pragma once

#include <stdexcept>

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

// Calls f(Act{}) with the class of an activation.
template <class F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kRelu:
      return f(Relu{});
  }
  throw std::invalid_argument("unknown activation");
}

}  // namespace snv2::SNV2_GPU
