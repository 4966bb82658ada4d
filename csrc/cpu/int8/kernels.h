// The kernels of networks of integers; what each computes says MapKernels in cpu/kernels.h.
#pragma once

#include "cpu/simd.h"

namespace snv2::cpu::SNV2_ISA::int8 {

void pointwise(const Pointwise<UInt8, UInt8>&, Range panels, Range pixels);
void pointwise_mean(const Pointwise<UInt8, UInt8>&, Range panels);
void linear(const Pointwise<UInt8, float>&, Range panels, Range pixels);
void expand_depthwise(const ExpandDepthwise<UInt8>&, Range panels, Range out_rows, float* scratch);
void panel_depthwise(const PanelDepthwise<UInt8>&, Range panels, Range out_rows, float* scratch);
void stem(const Stem<UInt8>&, Range out_rows, float* scratch);
void import_planes(const FeatureMap&, int64_t image, const int64_t* channels, int64_t planes,
                   const float* affine, UInt8* y, Range pixels);
void export_planes(const UInt8* x, const int32_t* offsets, const float* affine, const FeatureMap& y,
                   int64_t image, Range pixels);
int64_t multiply_adds(int64_t count);

}  // namespace snv2::cpu::SNV2_ISA::int8
