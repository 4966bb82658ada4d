// cat_shuffle_backward: grad_a[:, i] = grad[:, 2i]; grad_b[:, i] = grad[:, 2i + 1].
//
// Both layouts are one: runs of elements, a plane each in the contiguous layout and one element in
// channels-last, go to a and to b in turn, and an image's last run does not matter. A tile is some
// runs, which are one span of the gradient, or a piece of one of a and of one of b.
#include <algorithm>
#include <array>

#include "checks.h"
#include "cuda/depthwise.h"

namespace snv2::SNV2_GPU {
namespace {

template <class T>
struct UnzipParams {
  const T* grad;
  T* a;
  T* b;
  int64_t runs;    // of a
  int64_t run;     // elements
  int64_t pieces;  // of a run; 1 if a tile is whole runs
  int64_t tiles;   // in all
  int tile_runs;   // 1 if there are several pieces
  int piece;       // elements, at most
  Divisor by_run;
};

constexpr int64_t kUnzipBytes = 8 * 1024;  // of a in a tile
constexpr int64_t kUnzipShared = 4 * span_bytes(kUnzipBytes);

template <class T>
__global__ void __launch_bounds__(kThreads) unzip_kernel(UnzipParams<T> params) {
  constexpr int kRoom = static_cast<int>(span_bytes(kUnzipBytes));
  const Shared<unsigned char> memory = shared_memory();
  for (int64_t tile = blockIdx.x; tile < params.tiles; tile += gridDim.x) {
    const int64_t run0 = tile / params.pieces * params.tile_runs;
    const int64_t piece0 = tile % params.pieces * params.piece;
    const int runs = static_cast<int>(params.runs - run0 < params.tile_runs ? params.runs - run0
                                                                            : params.tile_runs);
    const int piece =
        static_cast<int>(params.run - piece0 < params.piece ? params.run - piece0 : params.piece);
    const int count = runs * piece;
    // Load.
    const Global<const T> grad = Global<const T>{params.grad} + (2 * run0 * params.run + piece0);
    const bool whole = params.pieces == 1;
    const Shared<T> first = load_span(memory, grad, whole ? 2 * count : count);
    const Shared<T> second =
        whole ? first + piece : load_span(memory + kRoom, grad + params.run, count);
    cp_async_commit();
    cp_async_wait<0>();
    sync_threads();

    // Unzip.
    const Global<T> a = Global<T>{params.a} + (run0 * params.run + piece0);
    const Global<T> b = Global<T>{params.b} + (run0 * params.run + piece0);
    const Shared<T> staged_a = (memory + (2 * kRoom + misalignment(a, 16))).template as<T>();
    const Shared<T> staged_b = (memory + (3 * kRoom + misalignment(b, 16))).template as<T>();
    const bool paired = params.run == 1 && misalignment(grad, 2 * static_cast<int>(sizeof(T))) == 0;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const int skipped = runs == 1 ? 0 : params.by_run.divide(i) * piece;
      if (paired) {
        const Vector<T, 2> pair = load_vector<2>(first + 2 * i);
        store(staged_a + i, pair.values[0]);
        store(staged_b + i, pair.values[1]);
      } else {
        store(staged_a + i, load(first + (skipped + i)));
        store(staged_b + i, load(second + (skipped + i)));
      }
    }
    sync_threads();

    // Store.
    store_span(a, staged_a, count);
    store_span(b, staged_b, count);
    if (tile + gridDim.x < params.tiles) sync_threads();
  }
}

}  // namespace

void cat_shuffle_backward(const FeatureMap& grad, const FeatureMap& grad_a,
                          const FeatureMap& grad_b, Stream stream) {
  check_cat_shuffle(grad_a, grad_b, grad);
  if (grad.numel() == 0) return;
  const std::array buffers{reads(grad), writes(grad_a), writes(grad_b)};
  with_type(grad.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kTile = kUnzipBytes / static_cast<int64_t>(sizeof(T));
    UnzipParams<T> params{};
    params.grad = static_cast<const T*>(grad.data);
    params.a = static_cast<T*>(grad_a.data);
    params.b = static_cast<T*>(grad_b.data);
    params.run = grad.channel_stride();
    params.runs = grad_a.numel() / params.run;
    params.tile_runs = static_cast<int>(std::max<int64_t>(1, kTile / params.run));
    params.pieces = ceil_div(params.run, kTile);
    params.piece = static_cast<int>(std::min(params.run, kTile));
    params.tiles = ceil_div(params.runs, params.tile_runs) * params.pieces;
    params.by_run = Divisor(params.piece);
    static_assert(kTile < kMaxDividend, "Divisor");
    launch(launch_of(params.tiles, kUnzipShared, stream), buffers, unzip_kernel<T>, params);
  });
}

}  // namespace snv2::SNV2_GPU
