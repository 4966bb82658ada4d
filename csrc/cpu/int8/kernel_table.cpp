// This instruction set's kernels of networks of integers.
#include "cpu/int8/kernels.h"

namespace snv2::cpu::SNV2_ISA {

// Plans of integers have none of those that are null.
extern const MapKernels<UInt8> kInt8Kernels;
const MapKernels<UInt8> kInt8Kernels = {
    int8::pointwise,
    int8::pointwise_mean,
    int8::linear,
    int8::expand_depthwise,
    int8::panel_depthwise,
    nullptr,  // average_pool
    int8::stem,
    nullptr,  // means
    nullptr,  // mean_features
    nullptr,  // gate
    nullptr,  // scale
    int8::import_planes,
    int8::export_planes,
    int8::multiply_adds,
};

}  // namespace snv2::cpu::SNV2_ISA
