// From values known at run time to types known to the compiler.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/mma.h"
#include "cuda/network.h"

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

// What a plan may ask for and no kernel runs.
inline void require_kernel(bool ok, const StepCall& call, const char* what) {
  if (ok) return;
  const int64_t step = call.step - call.plan->begin();
  throw std::invalid_argument("plan: step " + std::to_string(step) + ": no kernel for its " + what);
}

}  // namespace snv2::SNV2_GPU
