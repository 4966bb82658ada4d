// Planes of two maps in turn: a0 b0 a1 b1 ..., as cat_shuffle has them in contiguous memory, and
// its gradient the other way round.
//
// A plane of 7 x 7 fp16 is 98 bytes, so source and result lie at different places of a vector, and
// planes begin inside of sectors. A tile of such planes goes through shared memory: one span of a,
// one of b and one of the result, all read and written once in whole sectors. Between them a warp
// copies whole planes of one map, 32 units each time, the largest units to which all planes are
// aligned: lanes never meet the end of a plane, where the next one is elsewhere, so neither loads
// nor stores conflict, and places are worked out once for all planes of a tile.
//
// Planes of whole sectors, and planes too large for a tile, are copied as they are.
#pragma once

#include "cuda/mma.h"
#include "cuda/span.h"

namespace snv2::SNV2_GPU {

// Copies elements [begin, end) by the lanes of a warp, N at a time.
template <int N, class To, class From>
SNV2_DEVICE void copy_units(To to, From from, int begin, int end) {
#pragma unroll 4
  for (int i = begin + lane_of_warp() * N; i < end; i += kWarp * N) {
    store_vector<N>(to + i, load_vector<N>(from + i));
  }
}

constexpr int kSpreadBatch = 8;  // planes that a lane has in registers

// Copies `planes` planes that follow each other at `from` to every second plane at `to`, by the
// lanes of a warp, N elements at a time. kPlane is the plane's size if it is known to the compiler:
// no address is then worked out for a plane. kGathers: the other way round.
template <int N, int kPlane, bool kGathers = false, class T>
SNV2_DEVICE void spread_planes(Shared<T> to, Shared<T> from, int plane, int planes) {
  constexpr int kStep = kWarp * N, kTo = kGathers ? 1 : 2, kFrom = kGathers ? 2 : 1;
  if constexpr (kPlane > 0) plane = kPlane;
  for (int i = lane_of_warp() * N; i < plane; i += 2 * kStep) {
    const bool second = i + kStep < plane;
    Shared<T> source = from + i, other = second ? source + kStep : source, result = to + i;
    const auto batch = [&](auto n) {
      Vector<T, N> values[n.value][2];
#pragma unroll
      for (int k = 0; k < n.value; ++k) {
        values[k][0] = load_vector<N>(source + kFrom * k * plane);
        values[k][1] = load_vector<N>(other + kFrom * k * plane);
      }
#pragma unroll
      for (int k = 0; k < n.value; ++k) store_vector<N>(result + kTo * k * plane, values[k][0]);
      if (second) {
#pragma unroll
        for (int k = 0; k < n.value; ++k) {
          store_vector<N>(result + (kTo * k * plane + kStep), values[k][1]);
        }
      }
      source = source + kFrom * n.value * plane;
      other = other + kFrom * n.value * plane;
      result = result + kTo * n.value * plane;
    };
    int k = 0;
#pragma unroll 1
    for (; k + kSpreadBatch <= planes; k += kSpreadBatch) {
      batch(std::integral_constant<int, kSpreadBatch>{});
    }
#pragma unroll 1
    for (; k < planes; ++k) batch(std::integral_constant<int, 1>{});
  }
}

constexpr int kStage4Plane = 49;  // pixels: of maps of 224 x 224

// The same, in units of `unit` bytes, of which all places and planes are multiples.
template <bool kGathers = false, class T>
SNV2_DEVICE void spread_planes(Shared<T> to, Shared<T> from, int plane, int planes, int unit) {
  const int bytes = plane * static_cast<int>(sizeof(T));
  const Shared<uint32_t> words = to.template as<uint32_t>(), source = from.template as<uint32_t>();
  if (unit == 16) {
    spread_planes<4, 0, kGathers>(words, source, bytes / 4, planes);
  } else if (unit == 8) {
    spread_planes<2, 0, kGathers>(words, source, bytes / 4, planes);
  } else if (unit == 4) {
    spread_planes<1, 0, kGathers>(words, source, bytes / 4, planes);
  } else if (plane == kStage4Plane) {
    spread_planes<1, kStage4Plane, kGathers>(to, from, plane, planes);
  } else {
    spread_planes<1, 0, kGathers>(to, from, plane, planes);
  }
}

template <class T>
struct AlternateParams {
  T* a;
  T* b;
  T* out;          // of planes of a and b in turn
  int64_t planes;  // of a
  int64_t plane;   // elements
  int tile;        // planes of a; where a warp takes pieces of planes, elements
  int room;        // bytes of shared memory for a span of a tile
};

constexpr int kSpreadThreads = 2 * kWarp;

// A tile of small planes: the first warp takes those of a, the second those of b.
template <class T, int N, int kPlane>
__global__ void __launch_bounds__(kSpreadThreads) spread_kernel(AlternateParams<T> params) {
  const int thread = static_cast<int>(threadIdx.x);
  const int which = warp_uniform(thread / kWarp);
  const int plane = kPlane > 0 ? kPlane : static_cast<int>(params.plane);
  const Shared<unsigned char> memory = shared_memory();
  const int64_t plane0 = static_cast<int64_t>(blockIdx.x) * params.tile;
  const int64_t left = params.planes - plane0;
  const int planes = static_cast<int>(left < params.tile ? left : params.tile);

  // Load.
  const Global<const T> source{which == 0 ? params.a : params.b};
  const Shared<T> loaded = load_span<kWarp>(memory + which * params.room, source + plane0 * plane,
                                            planes * plane, lane_of_warp());
  cp_async_commit();
  cp_async_wait<0>();
  sync_warp();

  // Spread.
  const Global<T> out = Global<T>{params.out} + 2 * plane0 * plane;
  const Shared<T> staged = (memory + (2 * params.room + misalignment(out, 16))).template as<T>();
  spread_planes<N, kPlane>(staged + which * plane, loaded, plane, planes);
  sync_threads();

  // Store.
  store_span<kSpreadThreads>(out, staged, 2 * planes * plane);
}

// The other way round.
template <class T, int N, int kPlane>
__global__ void __launch_bounds__(kSpreadThreads) gather_kernel(AlternateParams<T> params) {
  const int which = warp_uniform(static_cast<int>(threadIdx.x) / kWarp);
  const int plane = kPlane > 0 ? kPlane : static_cast<int>(params.plane);
  const Shared<unsigned char> memory = shared_memory();
  const int64_t plane0 = static_cast<int64_t>(blockIdx.x) * params.tile;
  const int64_t left = params.planes - plane0;
  const int planes = static_cast<int>(left < params.tile ? left : params.tile);

  // Load.
  const Shared<T> loaded = load_span<kSpreadThreads>(
      memory + 2 * params.room, Global<const T>{params.out} + 2 * plane0 * plane,
      2 * planes * plane);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();

  // Gather.
  const Global<T> to = Global<T>{which == 1 ? params.b : params.a} + plane0 * plane;
  const Shared<T> staged = (memory + (which * params.room + misalignment(to, 16))).template as<T>();
  spread_planes<N, kPlane, true>(staged, loaded + which * plane, plane, planes);
  sync_warp();

  // Store.
  store_span<kWarp>(to, staged, planes * plane, lane_of_warp());
}

// A warp copies a piece of a plane, to or from the planes in turn.
template <class T, int N, bool kBackward>
__global__ void __launch_bounds__(kThreads) alternate_kernel(AlternateParams<T> params) {
  constexpr int kWarps = kThreads / kWarp;
  const int64_t q = static_cast<int64_t>(blockIdx.x) * kWarps +
                    warp_uniform(static_cast<int>(threadIdx.x) / kWarp);
  if (q >= 2 * params.planes) return;
  const int64_t at = static_cast<int64_t>(blockIdx.y) * params.tile;
  const int64_t left = params.plane - at;
  const int count = static_cast<int>(left < params.tile ? left : params.tile);
  const Global<T> both = Global<T>{params.out} + (q * params.plane + at);
  const Global<T> one = Global<T>{q % 2 == 0 ? params.a : params.b} + (q / 2 * params.plane + at);
  if constexpr (kBackward) {
    copy_units<N>(one, Global<const T>{both.address}, 0, count);
  } else {
    copy_units<N>(both, Global<const T>{one.address}, 0, count);
  }
}

}  // namespace snv2::SNV2_GPU
