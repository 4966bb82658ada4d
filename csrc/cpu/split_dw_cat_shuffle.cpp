// split_dw_cat_shuffle: the passthrough half is copied, the main half goes through a depthwise
// 3x3 with BN and ReLU, and both are written straight to their shuffled places.
#include "cpu/dw_rows.h"

namespace snv2::cpu::SNV2_ISA {

void split_dw_cat_shuffle(const FeatureMap& x, const Depthwise3x3& dw, const FeatureMap& y,
                          Range items, float* scratch) {
  with_type(y.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t half = x.channels / 2;
    if (y.layout == Layout::kContiguous) {
      for (int64_t item = items.begin; item < items.end; ++item) {
        const int64_t image = item / half, c = item % half;
        T* const out = plane_of<T>(y, image, 2 * c + 1);
        PlaneCopy<T> copy(plane_of<const T>(x, image, c), plane_of<T>(y, image, 2 * c), x.plane());
        dw_plane(plane_of<const T>(x, image, half + c), x.height, x.width, Filter(dw, c),
                 [&](int64_t row, int64_t column, int64_t count, auto result) SNV2_INLINED {
                   copy.template step<decltype(result)>();
                   store_floats(out + row * x.width + column, result, count);
                 });
      }
      return;
    }
    const T* const in = static_cast<const T*>(x.data);
    T* const out = static_cast<T*>(y.data);
    dw_rows<T>(x, half, half, dw, items, scratch,
               [=, step = x.channels, ahead = kLines * x.width * x.channels](
                   int64_t pixel, int64_t c, int64_t count, auto result) SNV2_INLINED {
                 using V = decltype(result);
                 const T* from = in + pixel * step + c;
                 T* to = out + pixel * step + 2 * c;
                 prefetch(from + ahead);
                 prefetch_to_write<2 * sizeof(Raw<T, V>)>(to + ahead);
                 if (count == kLanesOf<V>) {
                   store_pairs_of<T>(to, load_raw<V>(from), result);
                   return;
                 }
                 T lanes[kLanesOf<V>];
                 store_floats(lanes, result);
                 for (int64_t i = 0; i < count; ++i) to[2 * i] = from[i], to[2 * i + 1] = lanes[i];
               });
  });
}

}  // namespace snv2::cpu::SNV2_ISA
