// Runs of elements that one warp moves between global and shared memory.
#pragma once

#include <cstdint>

#include "cuda/mma.h"

namespace snv2::SNV2_GPU {

// Elements that one copy can move from rows that start at `data` or a multiple of `row` elements
// after it: 16 bytes', 4 bytes', or one.
template <class T>
int copy_width(const T* data, int64_t row) {
  const int64_t size = sizeof(T);
  const auto aligned = [&](int64_t bytes) {
    return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0 &&
           row * size % bytes == 0;
  };
  return static_cast<int>(aligned(16) ? 16 / size : aligned(4) ? 4 / size : 1);
}

// Starts the copy of elements [begin, end) of a line to the same places of `to`, and fills the rest
// of `length` with zeros. `begin`, `end` and `length` are multiples of N.
template <int N, class T>
SNV2_DEVICE void load_line(Shared<T> to, Global<const T> from, int begin, int end, int length) {
  for (int i = lane_of_warp() * N; i < length; i += kWarp * N) {
    const bool inside = i >= begin && i < end;
    if constexpr (N * sizeof(T) >= 4) {
      if (inside) {
        cp_async<N>(to + i, from + i);
      } else {
        store_vector<N>(to + i, Vector<T, N>{});
      }
    } else {
      store(to + i, inside ? load(from + i) : T{});
    }
  }
}

// The same with copies of copy_width() elements.
template <class T>
SNV2_DEVICE void load_line(Shared<T> to, Global<const T> from, int begin, int end, int length,
                           int copy) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(T)), kWord = 4 / static_cast<int>(sizeof(T));
  if (copy == kWide) {
    load_line<kWide>(to, from, begin, end, length);
  } else if (copy == kWord) {
    load_line<kWord>(to, from, begin, end, length);
  } else {
    load_line<1>(to, from, begin, end, length);
  }
}

// Stores whole vectors of `count` elements in all. Steps begin on 128 bytes, so that each sector is
// written once.
template <class T>
SNV2_DEVICE void store_line(Global<T> to, Shared<T> from, int count) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const int lead = misalignment(to, 128) / static_cast<int>(sizeof(T));
  for (int i = lane_of_warp() * kVector - lead; i < count; i += kWarp * kVector) {
    if (i >= 0) store_vector<kVector>(to + i, load_vector<kVector>(from + i));
  }
}

}  // namespace snv2::SNV2_GPU
