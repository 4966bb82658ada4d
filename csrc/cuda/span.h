// Flat runs of elements between global and shared memory, and the plain arithmetic shared by the
// depthwise kernels.
//
// A feature map may start at any element, and a plane of 7 x 7 fp16 is 98 bytes: hardly any run
// starts on a vector. A span therefore lies in shared memory at the same place modulo 16 bytes as
// in global memory, so that all but its two ends move by 16 bytes. Warps step over 512 bytes that
// start on a 128-byte line, not on the span, so that a span touches each of its 32-byte sectors
// once; only the ends can touch one twice.
#pragma once

#include <cstdint>
#include <utility>

#include "cuda/isa.h"
#include "snv2/types.h"

namespace snv2::SNV2_GPU {

constexpr int kThreads = 256;
constexpr int64_t kMaxGrid = 0x7fffffff;

// `bytes` after p: of a stride that is no constant no product is left.
template <class T>
SNV2_DEVICE Shared<T> advance(Shared<T> p, int bytes) {
  return (p.template as<unsigned char>() + bytes).template as<T>();
}

constexpr int kAnyTeam = 0;  // a team of all threads of the CTA, however many

template <int kTeam>
SNV2_DEVICE int team_size() {
  return kTeam == kAnyTeam ? static_cast<int>(blockDim.x) : kTeam;
}

// Shared bytes that hold a span of `bytes` at any phase; a multiple of 16.
constexpr int64_t span_bytes(int64_t bytes) { return (bytes + 15) / 16 * 16 + 16; }

// Elements before the first 16-byte boundary, given where the span lies modulo 16.
template <class T>
SNV2_DEVICE int span_head(int phase, int count) {
  const int head = ((16 - phase) & 15) / static_cast<int>(sizeof(T));
  return head < count ? head : count;
}

// Which vector a thread moves first, of a span whose vectors begin at p: steps of the team begin on
// a line.
template <int kTeam, class P>
SNV2_DEVICE int first_vector(P p, int thread) {
  const int first = thread - misalignment(p, 128) / 16;
  return first < 0 ? first + team_size<kTeam>() : first;
}

// Calls move(to, from, n) for every kTeam-th vector of `left` that lie from `to` and `from` on, n
// of them at once. What four of them load is on its way before the first is stored.
template <int kTeam, class To, class From, class Move>
SNV2_DEVICE void move_vectors(To to, From from, int left, int stride, const Move& move) {
  if constexpr (kTeam != kAnyTeam) {
#pragma unroll 1
    for (; left > 3 * kTeam; left -= 4 * kTeam) {
      move(to, from, std::make_integer_sequence<int, 4>{});
      to = to + 4 * stride;
      from = from + 4 * stride;
    }
  }
#pragma unroll 1
  for (; left > 0; left -= team_size<kTeam>()) {
    move(to, from, std::make_integer_sequence<int, 1>{});
    to = to + stride;
    from = from + stride;
  }
}

template <int N, int kStride, class T, int... I>
SNV2_DEVICE void copy_in(Shared<T> to, Global<const T> from, std::integer_sequence<int, I...>) {
  (cp_async<N, I * kStride>(to, from), ...);
}
template <int N, int kStride, class T, int... I>
SNV2_DEVICE void copy_out(Global<T> to, Shared<T> from, std::integer_sequence<int, I...>) {
  const Vector<T, N> values[] = {load_vector<N>(from + I * kStride)...};
  (store_vector<N, I * kStride>(to, values[I]), ...);
}

// Starts the copy of `count` elements to `room`, 16-byte aligned, by a team of kTeam threads, of
// which this is `thread`, and returns where the first one will be. cp_async_commit and _wait, and
// the barrier, are the caller's.
template <int kTeam = kThreads, class T>
SNV2_DEVICE Shared<T> load_span(Shared<unsigned char> room, Global<const T> from, int count,
                                int thread = static_cast<int>(threadIdx.x)) {
  constexpr int kVector = 16 / sizeof(T);
  const int phase = misalignment(from, 16);
  const Shared<T> to = (room + phase).template as<T>();
  const int head = span_head<T>(phase, count);
  const int vectors = (count - head) / kVector;
  const int tail = head + vectors * kVector;
  if (thread < head) store(to + thread, load(from + thread));
  const int first = first_vector<kTeam>(from + head, thread);
  const int at = head + first * kVector;
  move_vectors<kTeam>(to + at, from + at, vectors - first, team_size<kTeam>() * kVector,
                      [](auto t, auto f, auto n) { copy_in<kVector, kTeam * kVector>(t, f, n); });
  if (tail + thread < count) store(to + (tail + thread), load(from + (tail + thread)));
  return to;
}

// Stores `count` elements that lie at from, at the phase of `to`, by a team of threads.
template <int kTeam = kThreads, class T>
SNV2_DEVICE void store_span(Global<T> to, Shared<T> from, int count,
                            int thread = static_cast<int>(threadIdx.x)) {
  constexpr int kVector = 16 / sizeof(T);
  const int head = span_head<T>(misalignment(to, 16), count);
  const int vectors = (count - head) / kVector;
  const int tail = head + vectors * kVector;
  if (thread < head) store(to + thread, load(from + thread));
  const int first = first_vector<kTeam>(to + head, thread);
  const int at = head + first * kVector;
  move_vectors<kTeam>(to + at, from + at, vectors - first, team_size<kTeam>() * kVector,
                      [](auto t, auto f, auto n) { copy_out<kVector, kTeam * kVector>(t, f, n); });
  if (tail + thread < count) store(to + (tail + thread), load(from + (tail + thread)));
}

// The same for spans of whole vectors that begin on one, by all threads of the CTA: less is to be
// found out. Steps begin on a sector.
template <class P>
SNV2_DEVICE int first_of_sectors(P p) {
  const int first = static_cast<int>(threadIdx.x) - misalignment(p, 32) / 16;
  return first < 0 ? first + static_cast<int>(blockDim.x) : first;
}
template <class T>
SNV2_DEVICE void load_vectors(Shared<T> to, Global<const T> from, int count) {
  constexpr int kVector = 16 / sizeof(T);
  const int first = first_of_sectors(from), at = first * kVector;
  move_vectors<kAnyTeam>(to + at, from + at, count / kVector - first,
                         static_cast<int>(blockDim.x) * kVector,
                         [](auto t, auto f, auto n) { copy_in<kVector, 0>(t, f, n); });
}
template <class T>
SNV2_DEVICE void store_vectors(Global<T> to, Shared<T> from, int count) {
  constexpr int kVector = 16 / sizeof(T);
  const int first = first_of_sectors(to), at = first * kVector;
  move_vectors<kAnyTeam>(to + at, from + at, count / kVector - first,
                         static_cast<int>(blockDim.x) * kVector,
                         [](auto t, auto f, auto n) { copy_out<kVector, 0>(t, f, n); });
}

// Copies `count` floats, a few per thread.
template <int kTeam = kThreads>
SNV2_DEVICE void load_parameters(Shared<float> to, const float* from, int count) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kTeam) {
    store(to + i, load(Global<const float>{from} + i));
  }
}

// Division of 0 <= a < 2^31 by 0 < b < 2^31 with a multiplication. With 2^bits the least power of
// two that is not below b, the multiplier is 2^(31 + bits) / b, rounded up by less than 1: a times
// that is off by less than 2^31, and so by less than 1 / b of the quotient.
struct Divisor {
  uint32_t multiplier = 0, shift = 0;

  Divisor() = default;
  constexpr explicit Divisor(int64_t b) {
    shift = 31;
    while ((int64_t{1} << (shift - 31)) < b) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + b - 1) / b);
  }
  constexpr int divide(int a) const {
    return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(a)) * multiplier) >>
                            shift);
  }
};

enum class Main { kStride1, kStride2 };

constexpr int stride_of(Main main) { return main == Main::kStride2 ? 2 : 1; }

// One call, whatever its layout: out[q] = pass[q / 2] for even q, main(source[q / 2]) for odd q;
// without passthrough, out[q] = main(source[q]). pass and source are images of a larger map:
// each has its own image stride, in elements.
template <class T>
struct Operands {
  const T* pass;
  const T* source;
  T* out;
  int64_t pass_image, source_image, out_image;  // strides
  int64_t source_pixel;                         // stride of pass and source, channels-last
  int64_t batch, channels;                      // channels of source
  int64_t height, width, out_height, out_width;
  const float* weight;
  const float* scale;
  const float* shift;
  bool relu;
};

template <class T>
SNV2_DEVICE T finish(float sum, float scale, float shift, bool with_relu) {
  float y = sum * scale + shift;
  if (with_relu) y = relu(y);
  T out;
  from_float(y, out);
  return out;
}

// The fallback for what fits no tile: rows too wide for shared memory. One thread, one output at a
// time, straight from global memory.
template <class T>
struct DirectParams {
  Operands<T> op;
  bool channels_last;
  int64_t numel;
};

template <class T, bool kPassthrough, Main kMain>
__global__ void __launch_bounds__(kThreads) direct_kernel(DirectParams<T> params) {
  constexpr int kStride = stride_of(kMain);
  const Operands<T>& op = params.op;
  const int64_t out_channels = op.channels * (kPassthrough ? 2 : 1);
  const int64_t out_plane = op.out_height * op.out_width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t o = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; o < params.numel;
       o += step) {
    const int64_t image = o / op.out_image;
    const int64_t rest = o - image * op.out_image;
    const int64_t q = params.channels_last ? rest % out_channels : rest / out_plane;
    const int64_t pixel = params.channels_last ? rest / out_channels : rest % out_plane;
    const int64_t channel = kPassthrough ? q / 2 : q;
    const int64_t row = pixel / op.out_width * kStride, column = pixel % op.out_width * kStride;
    const int64_t pixel_stride = params.channels_last ? op.source_pixel : 1;
    const int64_t offset = (params.channels_last ? channel : channel * op.height * op.width) +
                           (row * op.width + column) * pixel_stride;
    T value;
    if (kPassthrough && q % 2 == 0) {
      value = load(Global<const T>{op.pass} + (image * op.pass_image + offset));
    } else {
      const Global<const T> center =
          Global<const T>{op.source} + (image * op.source_image + offset);
      float sum = 0.0f;
      for (int dy = -1; dy <= 1; ++dy) {
        for (int dx = -1; dx <= 1; ++dx) {
          if (row + dy < 0 || row + dy >= op.height || column + dx < 0 || column + dx >= op.width) {
            continue;
          }
          sum += load(Global<const float>{op.weight} + (channel * 9 + dy * 3 + dx + 4)) *
                 to_float(load(center + (dy * op.width + dx) * pixel_stride));
        }
      }
      value = finish<T>(sum, load(Global<const float>{op.scale} + channel),
                        load(Global<const float>{op.shift} + channel), op.relu);
    }
    store(Global<T>{op.out} + o, value);
  }
}

}  // namespace snv2::SNV2_GPU
