// The CUDA backend. All functions enqueue one kernel on `stream` and return; they allocate
// nothing, and can be captured in a graph. Pointers are device memory. Arguments that do not fit
// together throw std::invalid_argument, a launch that fails throws std::runtime_error with
// CUDA's own words. Results are computed in float32 and rounded once.
//
// The same sources are compiled twice, into two libraries: for the GPU in the namespace
// snv2::cuda, and for the emulator (docs/emulator.md) in snv2::emulated, where pointers are
// ordinary memory, `stream` is ignored, and a kernel has run when the call returns.
#pragma once

#include "snv2/types.h"

#ifndef SNV2_GPU
#define SNV2_GPU cuda
#endif

namespace snv2::SNV2_GPU {

using Stream = void*;  // a cudaStream_t

// out[:, 2i] = a[:, i]; out[:, 2i + 1] = b[:, i]
SNV2_API void cat_shuffle(const FeatureMap& a, const FeatureMap& b, const FeatureMap& out,
                          Stream stream);

// dw_conv3x3 of x with padding 1, then scale, shift and ReLU as `dw` says.
SNV2_API void dw_conv3x3(const FeatureMap& x, const Depthwise3x3& dw, const FeatureMap& out,
                         Stream stream);

// out[:, 2i] = x[:, i]; out[:, 2i + 1] = relu(dw3x3(x[:, C/2 + i]))
SNV2_API void split_dw_cat_shuffle(const FeatureMap& x, const Depthwise3x3& dw,
                                   const FeatureMap& out, Stream stream);

// Conformance: one small kernel for each instruction of csrc/cuda/isa.h, to be fed the same
// random bits on a GPU and on the emulator.
struct ConformanceCase {
  const char* name;
  int64_t in_words;   // of 32 bits
  int64_t out_words;  // of 32 bits
};

// All cases, ended by one whose name is null.
SNV2_API const ConformanceCase* conformance_cases();

// Runs case `index` from `in` to `out`, both 16-byte aligned. Throws std::out_of_range if there
// is no such case.
SNV2_API void run_conformance(int64_t index, const void* in, void* out, Stream stream);

}  // namespace snv2::SNV2_GPU
