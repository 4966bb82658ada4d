// cat_shuffle and its gradient: one read, one write. Planes are copied whole in the contiguous
// layout; in channels-last the two halves are interleaved element by element.
#include <cstring>

#include "cpu/dw_rows.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

// Calls planes(half, whole, elements) for a plane of a or b and the same one of the whole,
// or rows(a, b, whole, elements) for each row of pixels.
template <class T, class Planes, class Rows>
void for_each_item(const FeatureMap& a, const FeatureMap& b, const FeatureMap& whole, Range items,
                   const Planes& planes, const Rows& rows) {
  const int64_t channels = a.channels;
  for (int64_t item = items.begin; item < items.end; ++item) {
    if (whole.layout == Layout::kContiguous) {
      const int64_t image = item / channels, c = item % channels;
      planes(plane_of<T>(a, image, c), plane_of<T>(whole, image, 2 * c), whole.plane());
      planes(plane_of<T>(b, image, c), plane_of<T>(whole, image, 2 * c + 1), whole.plane());
    } else {
      const int64_t image = item / whole.height, row = item % whole.height;
      rows(row_of<T>(a, image, row), row_of<T>(b, image, row), row_of<T>(whole, image, row),
           whole.width * channels);
    }
  }
}

}  // namespace

void cat_shuffle(const FeatureMap& a, const FeatureMap& b, const FeatureMap& y, Range items) {
  with_type(y.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_item<T>(
        a, b, y, items,
        [](const T* half, T* whole, int64_t count) {
          std::memcpy(whole, half, static_cast<size_t>(count) * sizeof(T));
        },
        [](const T* left, const T* right, T* out, int64_t count) {
          if (count < kHalfLanes) {
            for (int64_t i = 0; i < count; ++i) out[2 * i] = left[i], out[2 * i + 1] = right[i];
            return;
          }
          for_each_strip(count, [&](auto v, int64_t i) SNV2_INLINED {
            using V = decltype(v);
            store_pairs<V>(out + 2 * i, load_raw<V>(left + i), load_raw<V>(right + i));
          });
        });
  });
}

void cat_shuffle_backward(const FeatureMap& grad, const FeatureMap& grad_a,
                          const FeatureMap& grad_b, Range items) {
  with_type(grad.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_item<T>(
        grad_a, grad_b, grad, items,
        [](T* half, const T* whole, int64_t count) {
          std::memcpy(half, whole, static_cast<size_t>(count) * sizeof(T));
        },
        [](T* left, T* right, const T* in, int64_t count) {
          if (count < kHalfLanes) {
            for (int64_t i = 0; i < count; ++i) left[i] = in[2 * i], right[i] = in[2 * i + 1];
            return;
          }
          for_each_strip(count, [&](auto v, int64_t i) SNV2_INLINED {
            using V = decltype(v);
            Raw<T, V> even, odd;
            load_pairs<V>(in + 2 * i, even, odd);
            store_raw(left + i, even);
            store_raw(right + i, odd);
          });
        });
  });
}

}  // namespace snv2::cpu::SNV2_ISA
