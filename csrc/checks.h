// Whether the arguments of an op fit together; shared by all backends.
#pragma once

#include <stdexcept>

#include "snv2/types.h"

namespace snv2 {

inline void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

inline void check_cat_shuffle(const FeatureMap& a, const FeatureMap& b, const FeatureMap& out) {
  require(
      a.dtype == b.dtype && a.dtype == out.dtype && a.layout == b.layout && a.layout == out.layout,
      "a, b and out differ in dtype or layout");
  require(a.batch == b.batch && a.channels == b.channels && a.height == b.height &&
              a.width == b.width && out.batch == a.batch && out.channels == 2 * a.channels &&
              out.height == a.height && out.width == a.width,
          "a, b and out do not fit together");
}

inline void check_dw_conv3x3(const FeatureMap& x, const Depthwise3x3& dw, const FeatureMap& out) {
  require(dw.stride == 1 || dw.stride == 2, "dw.stride must be 1 or 2");
  require(x.dtype == out.dtype && x.layout == out.layout, "x and out differ in dtype or layout");
  require(x.height > 0 && x.width > 0, "x must have at least one pixel");
  require(out.batch == x.batch && out.channels == x.channels &&
              out.height == conv3x3_extent(x.height, dw.stride) &&
              out.width == conv3x3_extent(x.width, dw.stride),
          "out has the wrong shape");
}

inline void check_split_dw_cat_shuffle(const FeatureMap& x, const Depthwise3x3& dw,
                                       const FeatureMap& out) {
  check_dw_conv3x3(x, dw, out);
  require(dw.stride == 1, "dw.stride must be 1");
  require(x.channels % 2 == 0, "x must have an even number of channels");
}

// An op's backward takes what the op took, and a gradient for each map.
inline void check_gradient_of(const FeatureMap& x, const FeatureMap& grad_x) {
  require(x.dtype == grad_x.dtype && x.layout == grad_x.layout,
          "x and grad_x differ in dtype or layout");
  require(x.batch == grad_x.batch && x.channels == grad_x.channels && x.height == grad_x.height &&
              x.width == grad_x.width,
          "grad_x has the wrong shape");
}

}  // namespace snv2
