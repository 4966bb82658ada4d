// The kernels that AMX has of its own; all others of a network are AVX-512's.
#pragma once

#include "cpu/kernels.h"

namespace snv2::cpu {

namespace avx512_bf16 {
extern const MapKernels<BFloat16> kMapKernels;
}
namespace avx512_vnni {
extern const MapKernels<UInt8> kInt8Kernels;
}

namespace amx {

void pointwise(const Pointwise<BFloat16, BFloat16>& op, Range panels, Range pixels);
void pointwise_mean(const Pointwise<BFloat16, BFloat16>& op, Range panels);
void linear(const Pointwise<BFloat16, float>& op, Range panels, Range pixels);
void expand_depthwise(const ExpandDepthwise<BFloat16>& op, Range panels, Range out_rows,
                      float* scratch);
void stem(const Stem<BFloat16>& op, Range out_rows, float* scratch);
int64_t multiply_adds(int64_t count);

namespace int8 {

void pointwise(const Pointwise<UInt8, UInt8>& op, Range panels, Range pixels);
void pointwise_mean(const Pointwise<UInt8, UInt8>& op, Range panels);
void linear(const Pointwise<UInt8, float>& op, Range panels, Range pixels);
void expand_depthwise(const ExpandDepthwise<UInt8>& op, Range panels, Range out_rows,
                      float* scratch);
int64_t multiply_adds(int64_t count);

}  // namespace int8
}  // namespace amx
}  // namespace snv2::cpu
