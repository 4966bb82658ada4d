// cat_shuffle: one read of each input, one write. Planes are copied whole in the contiguous
// layout; in channels-last the two inputs are interleaved element by element.
#include <cstring>

#include "cpu/dw_rows.h"

namespace snv2::cpu::SNV2_ISA {

void cat_shuffle(const FeatureMap& a, const FeatureMap& b, const FeatureMap& y, Range items) {
  with_type(y.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t channels = a.channels;
    for (int64_t item = items.begin; item < items.end; ++item) {
      if (y.layout == Layout::kContiguous) {
        const int64_t image = item / channels, c = item % channels;
        const size_t bytes = static_cast<size_t>(y.plane()) * sizeof(T);
        std::memcpy(plane_of<T>(y, image, 2 * c), plane_of<T>(a, image, c), bytes);
        std::memcpy(plane_of<T>(y, image, 2 * c + 1), plane_of<T>(b, image, c), bytes);
      } else {
        const int64_t image = item / y.height, row = item % y.height;
        const T* left = row_of<T>(a, image, row);
        const T* right = row_of<T>(b, image, row);
        T* out = row_of<T>(y, image, row);
#pragma GCC ivdep
        for (int64_t i = 0; i < y.width * channels; ++i) {
          out[2 * i] = left[i];
          out[2 * i + 1] = right[i];
        }
      }
    }
  });
}

}  // namespace snv2::cpu::SNV2_ISA
