// dw_conv3x3: depthwise 3x3, scale, shift and ReLU, one read and one write.
#include "cpu/dw_rows.h"

namespace snv2::cpu::SNV2_ISA {

void dw_conv3x3(const FeatureMap& x, const Depthwise3x3& dw, const FeatureMap& y, Range items,
                float* scratch) {
  with_type(y.dtype, [&](auto type) {
    using T = decltype(type);
    if (y.layout == Layout::kContiguous) {
      for (int64_t item = items.begin; item < items.end; ++item) {
        const int64_t image = item / y.channels, c = item % y.channels;
        const T* const in = plane_of<const T>(x, image, c);
        T* const out = plane_of<T>(y, image, c);
        if (dw.stride == 2) {
          dw_plane_stride2(in, x.height, x.width, Filter(dw, c), out, scratch);
        } else {
          dw_plane(in, x.height, x.width, Filter(dw, c),
                   [&](int64_t row, int64_t column, int64_t count, auto result)
                       SNV2_INLINED { store_floats(out + row * x.width + column, result, count); });
        }
      }
      return;
    }
    T* const out = static_cast<T*>(y.data);
    dw_rows<T>(x, 0, x.channels, dw, items, scratch,
               [=, step = y.channels, ahead = kLines * y.width * y.channels](
                   int64_t pixel, int64_t c, int64_t count, auto result) SNV2_INLINED {
                 T* const to = out + pixel * step + c;
                 prefetch_to_write<sizeof(Raw<T, decltype(result)>)>(to + ahead);
                 store_floats(to, result, count);
               });
  });
}

}  // namespace snv2::cpu::SNV2_ISA
