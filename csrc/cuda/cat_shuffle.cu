// cat_shuffle: out[:, 2i] = a[:, i]; out[:, 2i + 1] = b[:, i].
#include "checks.h"
#include "cuda/depthwise.h"

namespace snv2::SNV2_GPU {

void cat_shuffle(const FeatureMap& a, const FeatureMap& b, const FeatureMap& out, Stream stream) {
  check_cat_shuffle(a, b, out);
  if (out.numel() == 0) return;
  const std::array buffers{reads(a), reads(b), writes(out)};
  with_type(out.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* a_data = static_cast<const T*>(a.data);
    const T* b_data = static_cast<const T*>(b.data);
    T* out_data = static_cast<T*>(out.data);
    if (out.layout == Layout::kChannelsLast) {
      const int64_t tiles = ceil_div(a.numel() * static_cast<int64_t>(sizeof(T)), kZipBytes);
      launch(launch_of(tiles, kZipShared, stream), buffers, zip_kernel<T>,
             ZipParams<T>{a_data, b_data, out_data, a.numel()});
      return;
    }
    Operands<T> op{};
    op.pass = a_data;
    op.source = b_data;
    op.out = out_data;
    op.pass_image = op.source_image = a.channels * a.plane();
    op.out_image = out.channels * out.plane();
    op.source_pixel = a.channels;
    op.batch = a.batch;
    op.channels = a.channels;
    op.height = op.out_height = a.height;
    op.width = op.out_width = a.width;
    launch_planes<true, Main::kCopy>(op, buffers, stream);
  });
}

}  // namespace snv2::SNV2_GPU
