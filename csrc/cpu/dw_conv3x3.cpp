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
        dw_plane(plane_of<const T>(x, image, c), x, dw, c, plane_of<T>(y, image, c), scratch);
      }
      return;
    }
    ChannelsLastRows<T> rows(x, 0, x.channels, dw, scratch);
    for (int64_t item = items.begin; item < items.end; ++item) {
      const int64_t image = item / y.height, row = item % y.height;
      T* out = row_of<T>(y, image, row);
      rows.run(image, row, [&](int64_t p, const float* values) {
        write_floats(values, y.channels, out + p * y.channels, 1);
      });
    }
  });
}

}  // namespace snv2::cpu::SNV2_ISA
