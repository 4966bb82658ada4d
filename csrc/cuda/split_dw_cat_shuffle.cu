// split_dw_cat_shuffle: out[:, 2i] = x[:, i]; out[:, 2i + 1] = relu(dw3x3(x[:, C/2 + i])).
#include "checks.h"
#include "cuda/depthwise.h"

namespace snv2::SNV2_GPU {

void split_dw_cat_shuffle(const FeatureMap& x, const Depthwise3x3& dw, const FeatureMap& out,
                          Stream stream) {
  check_split_dw_cat_shuffle(x, dw, out);
  if (out.numel() == 0) return;
  with_type(out.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_depthwise<true, Main::kStride1, T>(x, dw, true, out, stream);
  });
}

}  // namespace snv2::SNV2_GPU
