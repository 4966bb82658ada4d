// cat_shuffle: out[:, 2i] = a[:, i]; out[:, 2i + 1] = b[:, i].
#include <array>

#include "checks.h"
#include "cuda/cat_shuffle.h"

namespace snv2::SNV2_GPU {

void cat_shuffle(const FeatureMap& a, const FeatureMap& b, const FeatureMap& out, Stream stream) {
  check_cat_shuffle(a, b, out);
  if (out.numel() == 0) return;
  const std::array buffers{reads(a), reads(b), writes(out)};
  cat_shuffle<false>(a, b, out, buffers, stream);
}

}  // namespace snv2::SNV2_GPU
