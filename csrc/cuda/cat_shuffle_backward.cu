// cat_shuffle_backward: grad_a[:, i] = grad[:, 2i]; grad_b[:, i] = grad[:, 2i + 1].
#include <array>

#include "checks.h"
#include "cuda/cat_shuffle.h"

namespace snv2::SNV2_GPU {

void cat_shuffle_backward(const FeatureMap& grad, const FeatureMap& grad_a,
                          const FeatureMap& grad_b, Stream stream) {
  check_cat_shuffle(grad_a, grad_b, grad);
  if (grad.numel() == 0) return;
  const std::array buffers{reads(grad), writes(grad_a), writes(grad_b)};
  cat_shuffle<true>(grad_a, grad_b, grad, buffers, stream);
}

}  // namespace snv2::SNV2_GPU
