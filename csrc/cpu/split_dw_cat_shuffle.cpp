// split_dw_cat_shuffle: the passthrough half is copied, the main half goes through a depthwise
// 3x3 with BN and ReLU, and both are written straight to their shuffled places.
#include <cstring>

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
        std::memcpy(plane_of<T>(y, image, 2 * c), plane_of<T>(x, image, c),
                    static_cast<size_t>(x.plane()) * sizeof(T));
        dw_plane(plane_of<const T>(x, image, half + c), x, dw, c, plane_of<T>(y, image, 2 * c + 1),
                 scratch);
      }
      return;
    }
    ChannelsLastRows<T> rows(x, half, half, dw, scratch);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int64_t image = item / y.height, row = item % y.height;
      const T* in = row_of<T>(x, image, row);
      T* out = row_of<T>(y, image, row);
      rows.run(image, row, [&](int64_t p, const float* values) {
        const T* passthrough = in + p * x.channels;
        T* pixel = out + p * x.channels;
#pragma GCC ivdep
        for (int64_t c = 0; c < half; ++c) {
          pixel[2 * c] = passthrough[c];
          from_float(values[c], pixel[2 * c + 1]);
        }
      });
    }
  });
}

}  // namespace snv2::cpu::SNV2_ISA
