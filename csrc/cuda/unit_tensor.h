// The caller's tensors on their way to X and from the result, whatever their strides. unit.h puts
// it together.
//
// In both directions lanes first find out where their pixels or channels are, and then go along the
// other: an element costs no division. Of contiguous rows a lane takes as many neighbouring pixels
// as divide a row and are aligned in every one. Of pixels of channels, in 16 bits, it takes two
// channels of two pixels, which change places in registers: both sides are words.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/unit_params.h"

namespace snv2::SNV2_GPU {

// A pixel of the caller's tensors: that of column `x` in row `row` of all images.
struct Pixel {
  int64_t image;
  int y, x;

  // `row` rows after row `y0` of image `image0`.
  SNV2_DEVICE Pixel(int64_t image0, int y0, int rows, int column, int height)
      : image(image0), y(y0 + rows), x(column) {
    while (y >= height) y -= height, ++image;
  }
};
template <class T>
SNV2_DEVICE Global<const T> at_in(const UnitParams<T>& params, const Pixel& p) {
  return Global<const T>{params.in} +
         (p.image * params.in_image + p.y * params.in_row + p.x * params.in_pixel);
}
template <class T>
SNV2_DEVICE Global<T> at_result(const UnitParams<T>& params, const Pixel& p) {
  return Global<T>{params.result} +
         (p.image * params.result_image + p.y * params.result_row + p.x * params.result_pixel);
}

// A lane's part of rows of `vectors` each: eight, 16 or 32 lanes take one. All lanes make it, and
// ask nobody afterwards.
struct LanesOfRows {
  int vectors, vector;  // of a row: how many at once, and this lane's first
  int rows, row;

  SNV2_DEVICE explicit LanesOfRows(int most) {
    const int across = most > 16 ? 5 : most > 8 ? 4 : 3, down = 5 - across;
    vectors = 1 << across;
    vector = lane_of_warp() & (vectors - 1);
    rows = unit_warps() << down;
    row = (warp_of_cta() << down) + (lane_of_warp() >> across);
  }
};

// Load ------------------------------------------------------------------------------------------

// Columns of X that are loaded, from column `column0` of row `row0` of all images on, to columns
// `at`, at + 1, ... of X. In a ring a block is never cut.
struct TensorStep {
  int row0, column0, columns, at, wrap;

  SNV2_DEVICE int place(int column) const {
    return at + column < wrap ? at + column : at + column - wrap;
  }
};

// Starts the copy, N pixels at once. Padding is a copy of a row's last pixels: it must be there,
// but nobody looks at it.
template <int N, class T>
SNV2_DEVICE void load_contiguous(const UnitParams<T>& params, const Memory<T>& m,
                                 const TensorStep& step) {
  const int64_t image0 = params.heights.by_in.divide(step.row0);
  const int y0 = step.row0 - static_cast<int>(image0) * params.heights.in;
  const int vectors = step.columns / N;
  const LanesOfRows lanes(vectors);
  for (int v = lanes.vector; v < vectors; v += lanes.vectors) {
    const int column = step.column0 + v * N, rows = params.by_row.divide(column);
    const int x = column - rows * params.row, last = params.width - N;
    const Global<const T> from =
        at_in(params, Pixel(image0, y0, rows, x < last ? x : last, params.heights.in));
    Address<T> to(m.x + (lanes.row * m.x_pitch + step.place(v * N)));
#pragma unroll 2
    for (int row = lanes.row; row < params.in_channels; row += lanes.rows) {
      const Global<const T> source = from + load(m.in_table + row) * params.in_channel;
      if constexpr (N * sizeof(T) >= 4) {
        cp_async<N>(to, source);
      } else {
        store_vector(to, Vector<T, 1>{{load(source)}});
      }
      to = to + lanes.rows * m.x_pitch;
    }
  }
}

// Loads pixels whose channels lie side by side.
template <class T>
SNV2_DEVICE void load_pixels(const UnitParams<T>& params, const Memory<T>& m,
                             const TensorStep& step) {
  constexpr int kPair = sizeof(T) == 4 ? 1 : 2;  // channels, and pixels, of a lane
  constexpr int kLanes = kWarp / kPair;          // of a pixel
  const int64_t image0 = params.heights.by_in.divide(step.row0);
  const int y0 = step.row0 - static_cast<int>(image0) * params.heights.in;
  const int first = (warp_of_cta() * kPair + lane_of_warp() / kLanes) * kPair;
  for (int p = first; p < step.columns; p += unit_warps() * kPair * kPair) {
    const int column = step.column0 + p, rows = params.by_row.divide(column);
    const int x = column - rows * params.row, last = params.width - 1;
    const Global<const T> here =
        at_in(params, Pixel(image0, y0, rows, x < last ? x : last, params.heights.in));
    const Shared<T> to = m.x + step.place(p);
    if constexpr (kPair == 1) {
#pragma unroll 2
      for (int row = lane_of_warp(); row < params.in_channels; row += kWarp) {
        cp_async<1>(to + row * m.x_pitch, here + load(m.in_table + row));
      }
    } else {
      const Global<const T> next = here + (x < last ? params.in_pixel : 0);
#pragma unroll 2
      for (int row = lane_of_warp() % kLanes * 2; row < params.in_channels; row += kWarp) {
        const bool both = row + 1 < params.in_channels;
        const int32_t a = load(m.in_table + row), b = load(m.in_table + (both ? row + 1 : row));
        uint32_t words[2];
        if (params.in_pairs && a % 2 == 0 && b == a + 1) {
          words[0] = word_of(load_vector<2>(here + a));
          words[1] = word_of(load_vector<2>(next + a));
        } else {
          words[0] = word_of(load(here + a).bits, load(here + b).bits);
          words[1] = word_of(load(next + a).bits, load(next + b).bits);
        }
        const auto line = (to + row * m.x_pitch).template as<uint32_t>();
        store(line, low_halves(words[0], words[1]));
        if (both) store(line + m.x_pitch / 2, high_halves(words[0], words[1]));
      }
    }
  }
}

template <class T>
SNV2_DEVICE void load_tensor(const UnitParams<T>& params, const Memory<T>& m,
                             const TensorStep& step) {
  if (params.in_channel == 1 && params.in_pixel != 1) {
    load_pixels(params, m, step);
  } else if (params.in_vector == 4) {
    load_contiguous<4>(params, m, step);
  } else if (params.in_vector == 2) {
    load_contiguous<2>(params, m, step);
  } else {
    load_contiguous<1>(params, m, step);
  }
}

// Store -----------------------------------------------------------------------------------------

// Sources of the result's channels, in shared memory: -1 - channel of the input that passes
// through, or a row of this branch's result; or nowhere, where another CTA stores the channel. What
// passes through is stored with the channel beside it. Nothing does beside a projection.
constexpr int32_t kNowhere = int32_t{1} << 30;

template <class T>
SNV2_DEVICE void load_sources(const UnitParams<T>& params, const Branch<T>& branch,
                              Shared<int32_t> to, int rank) {
  const Global<const int32_t> table{params.result_table};
  const auto computed = [&](int32_t entry) {
    return entry >= branch.first_result && entry < branch.first_result + branch.out;
  };
  for (int channel = static_cast<int>(threadIdx.x); channel < params.result_channels;
       channel += unit_threads()) {
    const int beside = channel ^ 1;
    const int32_t entry = load(table + channel);
    const int32_t other = beside < params.result_channels ? load(table + beside) : entry;
    const bool mine = entry >= 0   ? computed(entry)
                      : other >= 0 ? computed(other)
                                   : channel / 2 % params.cluster == rank;
    store(to + channel, !mine ? kNowhere : entry < 0 ? entry : entry - branch.first_result);
  }
}

// Rows that are stored: `rows` from row `local0` of an image on.
struct ResultStep {
  int64_t image0;
  int local0, rows;
};

// Stores rows of pixels, N at once. Of a unit's channels every second one passes through: warps
// take either kind.
template <int N, class T>
SNV2_DEVICE void store_contiguous(const UnitParams<T>& params, const Memory<T>& m,
                                  const ResultStep& step) {
  const int vectors = step.rows * params.out_row / N;
  const LanesOfRows lanes(vectors);
  const int64_t stride = 2 * lanes.rows * params.result_channel;
  for (int v = lanes.vector; v < vectors; v += lanes.vectors) {
    const int line = params.by_out_row.divide(v * N), x = v * N - line * params.out_row;
    if (x >= params.out_width) continue;
    const Pixel pixel(step.image0, step.local0, line, x, params.heights.out);
    const Global<const T> in = at_in(params, pixel);
    const Shared<T> from = m.result + v * N;
    for (int kind = 0; kind < 2; ++kind) {
      int channel = 2 * lanes.row + kind;
      Global<T> to = at_result(params, pixel) + channel * params.result_channel;
#pragma unroll 2
      for (; channel < params.result_channels; channel += 2 * lanes.rows, to = to + stride) {
        const int32_t source = load(m.sources + channel);
        if (source == kNowhere) continue;
        store_vector<N>(to, source < 0 ? load_vector<N>(in + (-1 - source) * params.in_channel)
                                       : load_vector<N>(from + source * m.dw_pitch));
      }
    }
  }
}

// Stores pixels whose channels lie side by side.
template <class T>
SNV2_DEVICE void store_pixels(const UnitParams<T>& params, const Memory<T>& m,
                              const ResultStep& step) {
  constexpr int kPair = sizeof(T) == 4 ? 1 : 2;  // channels, and pixels, of a lane
  const int end = step.rows * params.out_row, warp = warp_of_cta();
  for (int channel = lane_of_warp() * kPair; channel < params.result_channels;
       channel += kWarp * kPair) {
    const bool both = channel + kPair <= params.result_channels;
    const int32_t sources[2] = {load(m.sources + channel),
                                both ? load(m.sources + (channel + kPair - 1)) : kNowhere};
    for (int p = warp * kPair; p < end; p += unit_warps() * kPair) {
      const int line = params.by_out_row.divide(p), x = p - line * params.out_row;
      if (x >= params.out_width) continue;
      const Pixel pixel(step.image0, step.local0, line, x, params.heights.out);
      const Global<const T> in = at_in(params, pixel);
      const Global<T> to = at_result(params, pixel) + channel * params.result_channel;
      if constexpr (kPair == 1) {
        const int32_t source = sources[0];
        if (source == kNowhere) continue;
        store(to, source < 0 ? load(in + (-1 - source) * params.in_channel)
                             : load(m.result + (source * m.dw_pitch + p)));
      } else {
        const bool two = x + 1 < params.out_width;
        const int64_t next = two ? params.in_pixel : 0;
        uint32_t of_channel[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (sources[i] == kNowhere) continue;
          if (sources[i] < 0) {
            const Global<const T> passed = in + (-1 - sources[i]) * params.in_channel;
            of_channel[i] = word_of(load(passed).bits, load(passed + next).bits);
          } else {
            of_channel[i] =
                load((m.result + (sources[i] * m.dw_pitch + p)).template as<uint32_t>());
          }
        }
        const uint32_t of_pixel[2] = {low_halves(of_channel[0], of_channel[1]),
                                      high_halves(of_channel[0], of_channel[1])};
        const bool whole = params.result_pairs && sources[0] != kNowhere && sources[1] != kNowhere;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (i > 0 && !two) break;
          const Global<T> there = to + i * params.result_pixel;
          Vector<T, 2> pair;
          std::memcpy(&pair, &of_pixel[i], sizeof pair);
          if (whole) {
            store_vector<2>(there, pair);
          } else {
            if (sources[0] != kNowhere) store(there, pair.values[0]);
            if (sources[1] != kNowhere) store(there + params.result_channel, pair.values[1]);
          }
        }
      }
    }
  }
}

// Writes rows of the caller's tensor, in logical order.
template <class T>
SNV2_DEVICE void store_result(const UnitParams<T>& params, const Memory<T>& m,
                              const ResultStep& step) {
  if (params.result_channel == 1 && params.result_pixel != 1) {
    store_pixels(params, m, step);
  } else if (params.result_vector == 4) {
    store_contiguous<4>(params, m, step);
  } else if (params.result_vector == 2) {
    store_contiguous<2>(params, m, step);
  } else {
    store_contiguous<1>(params, m, step);
  }
}

}  // namespace snv2::SNV2_GPU
