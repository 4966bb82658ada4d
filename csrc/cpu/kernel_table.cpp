// This instruction set's table of kernels.
#include "cpu/simd.h"

namespace snv2::cpu::SNV2_ISA {

extern const MapKernels<float> kMapKernels;
extern const MapKernels<UInt8> kInt8Kernels;
void cat_shuffle(const FeatureMap&, const FeatureMap&, const FeatureMap&, Range);
void dw_conv3x3(const FeatureMap&, const Depthwise3x3&, const FeatureMap&, Range, float*);
void split_dw_cat_shuffle(const FeatureMap&, const Depthwise3x3&, const FeatureMap&, Range, float*);
void cat_shuffle_backward(const FeatureMap&, const FeatureMap&, const FeatureMap&, Range);
void depthwise_backward(const DepthwiseBackward&, Range, float*);

#define SNV2_STRING(x) #x
#define SNV2_NAME(x) SNV2_STRING(x)

extern const Kernels kTable;
const Kernels kTable = {
    SNV2_NAME(SNV2_ISA),  &kMapKernels,         nullptr,
    &kInt8Kernels,        cat_shuffle,          dw_conv3x3,
    split_dw_cat_shuffle, cat_shuffle_backward, depthwise_backward,
};

}  // namespace snv2::cpu::SNV2_ISA
