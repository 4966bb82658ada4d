// dw_conv3x3: depthwise 3x3, then scale, shift and perhaps ReLU.
#include "checks.h"
#include "cuda/depthwise.h"

namespace snv2::SNV2_GPU {

void dw_conv3x3(const FeatureMap& x, const Depthwise3x3& dw, const FeatureMap& out, Stream stream) {
  check_dw_conv3x3(x, dw, out);
  if (out.numel() == 0) return;
  with_type(out.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (dw.stride == 1) {
      launch_depthwise<false, Main::kStride1, T>(x, dw, dw.relu, out, stream);
    } else {
      launch_depthwise<false, Main::kStride2, T>(x, dw, dw.relu, out, stream);
    }
  });
}

}  // namespace snv2::SNV2_GPU
