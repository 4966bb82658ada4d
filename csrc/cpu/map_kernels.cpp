// This instruction set's kernels of networks.
#include "cpu/simd.h"

namespace snv2::cpu::SNV2_ISA {

void pointwise(const Pointwise<Element, Element>&, Range, Range);
void pointwise_mean(const Pointwise<Element, Element>&, Range);
void linear(const Pointwise<Element, float>&, Range, Range);
void expand_depthwise(const ExpandDepthwise<Element>&, Range, Range, float*);
void panel_depthwise(const PanelDepthwise<Element>&, Range, Range, float*);
void average_pool(const AveragePool<Element>&, Range, Range);
void stem(const Stem<Element>&, Range, float*);
void means(const Element*, int64_t, Range, float*);
void mean_features(const float*, const int64_t*, int64_t, Element*, int64_t);
void gate(const Gate&);
void scale(const Scale<Element>&, Range);
void import_planes(const FeatureMap&, int64_t, const int64_t*, int64_t, const float*, Element*,
                   Range);
void export_planes(const Element*, const int32_t*, const float*, const FeatureMap&, int64_t, Range);
int64_t multiply_adds(int64_t);

extern const MapKernels<Element> kMapKernels;
const MapKernels<Element> kMapKernels = {
    pointwise,    pointwise_mean, linear,        expand_depthwise, panel_depthwise,
    average_pool, stem,           means,         mean_features,    gate,
    scale,        import_planes,  export_planes, multiply_adds,
};

}  // namespace snv2::cpu::SNV2_ISA
