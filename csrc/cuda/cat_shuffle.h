// cat_shuffle and its gradient: out[:, 2i] = a[:, i]; out[:, 2i + 1] = b[:, i], and back.
//
// It moves elements and knows nothing of numbers: a dtype is only a size.
#pragma once

#include <algorithm>

#include "cuda/alternate.h"
#include "cuda/launch.h"

namespace snv2::SNV2_GPU {

// In channels-last order cat_shuffle does not know where pixels end: element i of a and of b are
// elements 2i and 2i + 1 of out.
template <class T>
struct ZipParams {
  T* a;
  T* b;
  T* out;         // of elements of a and b in turn
  int64_t count;  // elements of a
  bool paired;    // out is aligned to two elements
};

constexpr int kZipRounds = 4;

// A thread zips kZipRounds times N elements of each, or takes them apart; `count` is a multiple of
// N.
template <class T, int N, bool kBackward>
__global__ void __launch_bounds__(kThreads) zip_kernel(ZipParams<T> params) {
  constexpr int kRound = kThreads * N;
  const int64_t at =
      static_cast<int64_t>(blockIdx.x) * (kZipRounds * kRound) + static_cast<int>(threadIdx.x) * N;
  const int64_t left = params.count - at;
  const Global<T> a = Global<T>{params.a} + at, b = Global<T>{params.b} + at;
  const Global<T> out = Global<T>{params.out} + 2 * at;
  const bool paired = N > 1 || params.paired;
  Vector<T, N> values[kZipRounds][2];
#pragma unroll
  for (int k = 0; k < kZipRounds; ++k) {
    if (k * kRound >= left) break;
    if constexpr (kBackward) {
      const Global<const T> from{(out + 2 * k * kRound).address};
      Vector<T, 2 * N> zipped;
      if (paired) {
        zipped = load_vector<2 * N>(from);
      } else {
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) zipped.values[i] = load(from + i);
      }
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) values[k][i % 2].values[i / 2] = zipped.values[i];
    } else {
      values[k][0] = load_vector<N>(Global<const T>{(a + k * kRound).address});
      values[k][1] = load_vector<N>(Global<const T>{(b + k * kRound).address});
    }
  }
#pragma unroll
  for (int k = 0; k < kZipRounds; ++k) {
    if (k * kRound >= left) break;
    if constexpr (kBackward) {
      store_vector<N>(a + k * kRound, values[k][0]);
      store_vector<N>(b + k * kRound, values[k][1]);
    } else {
      Vector<T, 2 * N> zipped;
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) zipped.values[i] = values[k][i % 2].values[i / 2];
      const Global<T> to = out + 2 * k * kRound;
      if (paired) {
        store_vector<2 * N>(to, zipped);
      } else {
#pragma unroll
        for (int i = 0; i < 2 * N; ++i) store(to + i, zipped.values[i]);
      }
    }
  }
}

inline Launch launch_of(int64_t ctas, int threads, int64_t shared_bytes, Stream stream) {
  Launch config;
  config.grid_x = static_cast<uint32_t>(ctas);
  config.threads = static_cast<uint32_t>(threads);
  config.shared_bytes = shared_bytes;
  config.stream = stream;
  return config;
}

struct Maps {
  void* a;
  void* b;
  void* out;                    // of both in turn
  int64_t planes, plane_bytes;  // of a

  // Returns whether a and b begin at multiples of `each` bytes, and out at one of `both`.
  bool aligned(int64_t each, int64_t both) const {
    const auto modulo = [](const void* p, int64_t bytes) {
      return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes);
    };
    return modulo(a, each) == 0 && modulo(b, each) == 0 && modulo(out, both) == 0;
  }
  // The largest of 16, 8, 4 and 2 bytes of which all planes' places and sizes are multiples.
  int64_t unit() const {
    int64_t bytes = 16;
    while (!aligned(bytes, bytes) || plane_bytes % bytes != 0) bytes /= 2;
    return bytes;
  }
  template <class T>
  AlternateParams<T> params() const {
    return {static_cast<T*>(a),
            static_cast<T*>(b),
            static_cast<T*>(out),
            planes,
            plane_bytes / static_cast<int64_t>(sizeof(T)),
            0,
            0};
  }
};

template <bool kBackward, class T, int N>
void launch_zip(const Maps& maps, const Buffers& buffers, Stream stream) {
  const int64_t count = maps.planes * maps.plane_bytes / static_cast<int64_t>(sizeof(T));
  const bool paired = maps.aligned(1, 2 * sizeof(T));
  launch(launch_of(ceil_div(count, int64_t{kZipRounds} * kThreads * N), kThreads, 0, stream),
         buffers, zip_kernel<T, N, kBackward>,
         ZipParams<T>{static_cast<T*>(maps.a), static_cast<T*>(maps.b), static_cast<T*>(maps.out),
                      count, paired});
}

template <bool kBackward, class T>
void zip(const Maps& maps, const Buffers& buffers, Stream stream) {
  constexpr int kWide = 8 / sizeof(T);  // elements of 8 bytes, which make 16 of the result
  const bool wide = maps.aligned(8, 16) && maps.planes * maps.plane_bytes % 8 == 0;
  return wide ? launch_zip<kBackward, T, kWide>(maps, buffers, stream)
              : launch_zip<kBackward, T, 1>(maps, buffers, stream);
}

// Bytes of one map in a tile: so few that there are tiles for all SMs, so many that what a thread
// does once is little beside them.
constexpr int64_t kSpreadBytes = 6400;

template <bool kBackward, class T, int N, int kPlane>
void launch_spread(const Maps& maps, const Buffers& buffers, Stream stream) {
  AlternateParams<T> params = maps.params<T>();
  const int64_t most = kSpreadBytes / maps.plane_bytes;
  params.tile = static_cast<int>(most < kSpreadBatch ? most : most / kSpreadBatch * kSpreadBatch);
  const int64_t span = params.tile * maps.plane_bytes;
  params.room = static_cast<int>(span_bytes(span));
  launch(launch_of(ceil_div(params.planes, params.tile), kSpreadThreads,
                   2 * params.room + span_bytes(2 * span), stream),
         buffers, kBackward ? gather_kernel<T, N, kPlane> : spread_kernel<T, N, kPlane>, params);
}

template <bool kBackward, class T, int N>
void launch_alternate(const Maps& maps, const Buffers& buffers, Stream stream) {
  constexpr int64_t kPiece = 16 * 1024, kMostPieces = 65535;
  AlternateParams<T> params = maps.params<T>();
  params.tile = static_cast<int>(std::max(kPiece / static_cast<int64_t>(sizeof(T)),
                                          ceil_div(ceil_div(params.plane, N), kMostPieces) * N));
  Launch config = launch_of(ceil_div(2 * params.planes, kThreads / kWarp), kThreads, 0, stream);
  config.grid_y = static_cast<uint32_t>(ceil_div(params.plane, params.tile));
  launch(config, buffers, alternate_kernel<T, N, kBackward>, params);
}

template <bool kBackward>
void alternate(const Maps& maps, const Buffers& buffers, Stream stream) {
  constexpr int64_t kSector = 32;
  const int64_t unit = maps.unit();
  if (maps.plane_bytes > kSpreadBytes || (unit == 16 && maps.plane_bytes % kSector == 0)) {
    return unit == 16  ? launch_alternate<kBackward, uint32_t, 4>(maps, buffers, stream)
           : unit >= 4 ? launch_alternate<kBackward, uint32_t, 1>(maps, buffers, stream)
                       : launch_alternate<kBackward, uint16_t, 1>(maps, buffers, stream);
  }
  if (unit >= 4) {
    return unit == 16  ? launch_spread<kBackward, uint32_t, 4, 0>(maps, buffers, stream)
           : unit == 8 ? launch_spread<kBackward, uint32_t, 2, 0>(maps, buffers, stream)
                       : launch_spread<kBackward, uint32_t, 1, 0>(maps, buffers, stream);
  }
  return maps.plane_bytes == kStage4Plane * 2
             ? launch_spread<kBackward, uint16_t, 1, kStage4Plane>(maps, buffers, stream)
             : launch_spread<kBackward, uint16_t, 1, 0>(maps, buffers, stream);
}

// Moves a and b to `both`, or back.
template <bool kBackward>
void cat_shuffle(const FeatureMap& a, const FeatureMap& b, const FeatureMap& both,
                 const Buffers& buffers, Stream stream) {
  const int64_t size = size_of(both.dtype);
  const Maps maps{a.data, b.data, both.data, a.batch * a.channels, a.plane() * size};
  if (both.layout == Layout::kContiguous) return alternate<kBackward>(maps, buffers, stream);
  return size == 2 ? zip<kBackward, uint16_t>(maps, buffers, stream)
                   : zip<kBackward, uint32_t>(maps, buffers, stream);
}

}  // namespace snv2::SNV2_GPU
