// Blocks of maps in shared memory, and how threads march down their columns: for gradients.
#pragma once

#include "cuda/line.h"
#include "cuda/span.h"

namespace snv2::SNV2_GPU {

constexpr int64_t kMostPixels = 1 << 20;  // of a row or column: with halos they are int

// Strides of a map in elements; main is where the convolution's channels begin.
template <class T>
struct Strided {
  T* data;
  int64_t main, image, channel, row, pixel;

  SNV2_DEVICE int64_t at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return n * image + c * channel + y * row + x * pixel;
  }
};

struct Extent {
  int begin, end;

  SNV2_DEVICE int size() const { return end - begin; }
  SNV2_DEVICE bool has(int i) const { return i >= begin && i < end; }
  SNV2_DEVICE int nearest(int i) const { return i < begin ? begin : i < end ? i : end - 1; }
  SNV2_DEVICE Extent with_halo(int halo, int limit) const {
    return {begin > halo ? begin - halo : 0, end + halo < limit ? end + halo : limit};
  }
  // Results of that stride whose middle tap is inside.
  SNV2_DEVICE Extent results(int stride) const {
    return {(begin + stride - 1) / stride, (end - 1) / stride + 1};
  }
};

// Calls f(column, begin, end) for every step-th piece of a block: some rows of a column. There are
// as many pieces to a column as make good use of the threads.
template <class F>
SNV2_DEVICE void for_pieces(int first, int step, const Extent& rows, const Extent& columns,
                            const F& f) {
  const int width = columns.size(), height = rows.size();
  const int most = step / width < 1 ? 1 : step / width;
  const int each = (height + most - 1) / most, pieces = (height + each - 1) / each;
#pragma unroll 1
  for (int i = first; i < width * pieces; i += step) {
    const int piece = i / width, begin = piece * each;
    f(columns.begin + i - piece * width, rows.begin + begin,
      rows.begin + (begin + each < height ? begin + each : height));
  }
}

// A block of a map in shared memory.
template <class T>
struct Block {
  Shared<T> data;
  Extent rows, columns;
  int channel, pixel;  // strides

  SNV2_DEVICE Shared<T> at(int c, int y, int x) const {
    return data + (c * channel + ((y - rows.begin) * columns.size() + x - columns.begin) * pixel);
  }
};

// Starts the copy of a block of pixels whose first channel is at `from`, N of kRoom channels by a
// thread. `channels` is a multiple of N.
template <int kRoom, int N, class T>
SNV2_DEVICE void load_pixels(const Block<T>& to, const Strided<const T>& map, Global<const T> from,
                             int channels) {
  constexpr int kEach = kRoom / N, kStep = kThreads / kEach;
  const int thread = static_cast<int>(threadIdx.x);
  const int first = thread / kEach, channel = thread % kEach * N;
  if (channel >= channels) return;
  const int across = to.columns.size(), pixels = to.rows.size() * across;
  const int step_row = kStep / across, step_column = kStep % across;
  const int64_t step = step_row * map.row + step_column * map.pixel;
  const int64_t wrap = map.row - across * map.pixel;
  int column = first % across;
  Global<const T> source =
      from + (map.at(0, 0, to.rows.begin + first / across, to.columns.begin + column) + channel);
  Shared<T> result = to.data + (first * kRoom + channel);
#pragma unroll 1
  for (int i = first; i < pixels; i += kStep) {
    if constexpr (N * sizeof(T) >= 4) {
      cp_async<N>(result, source);
    } else {
      store(result, load(source));
    }
    result = result + kStep * kRoom;
    column += step_column;
    source = source + (column < across ? step : step + wrap);
    column = column < across ? column : column - across;
  }
}
template <int kRoom, class T>
SNV2_DEVICE void load_pixels(const Block<T>& to, const Strided<const T>& map, Global<const T> from,
                             int channels, int copy) {
  constexpr int kWide = 16 / static_cast<int>(sizeof(T)), kWord = 4 / static_cast<int>(sizeof(T));
  if (copy == kWide) {
    load_pixels<kRoom, kWide>(to, map, from, channels);
  } else if (copy == kWord) {
    load_pixels<kRoom, kWord>(to, map, from, channels);
  } else {
    load_pixels<kRoom, 1>(to, map, from, channels);
  }
}

// The same of one channel of a contiguous map: a warp takes a row.
template <class T>
SNV2_DEVICE void load_rows(const Block<T>& to, const Strided<const T>& map, Global<const T> from,
                           int copy) {
  const int width = to.columns.size();
  for (int row = static_cast<int>(threadIdx.x) / kWarp; row < to.rows.size();
       row += kThreads / kWarp) {
    load_line(to.data + row * width, from + map.at(0, 0, to.rows.begin + row, to.columns.begin), 0,
              width, width, copy);
  }
}

// Three neighbouring columns of a channel of a block, row by row; zero outside of the map. The
// columns beside it are read as the middle one, so that the lanes stay together. The one before it
// may not be wanted.
template <class T, bool kBefore = true>
class ThreeColumns {
 public:
  SNV2_DEVICE ThreeColumns(const Block<T>& block, int channel, int column, int row, int height,
                           int width)
      : at_(block.at(channel, row, column)),
        pitch_(block.columns.size() * block.pixel),
        row_(row),
        height_(height),
        left_(column > 0),
        right_(column + 1 < width),
        before_(left_ ? -block.pixel : 0),
        after_(right_ ? block.pixel : 0) {}
  SNV2_DEVICE bool left() const { return left_; }
  SNV2_DEVICE bool right() const { return right_; }
  SNV2_DEVICE void read_next(float (&values)[3]) {
#pragma unroll
    for (int i = 0; i < 3; ++i) values[i] = 0.0f;
    if (static_cast<unsigned>(row_) < static_cast<unsigned>(height_)) {
      float before = 0.0f;
      if constexpr (kBefore) before = to_float(load(at_ + before_));
      const float after = to_float(load(at_ + after_));
      values[0] = left_ ? before : 0.0f;
      values[1] = to_float(load(at_));
      values[2] = right_ ? after : 0.0f;
    }
    at_ = at_ + pitch_;
    ++row_;
  }

 private:
  Shared<T> at_;
  int pitch_, row_, height_;
  bool left_, right_;
  int before_, after_;
};

// Three rows of three columns, of which one or two are new in each step.
template <int kStride, class T>
class Window {
 public:
  float values[3][3];

  // Starts with the window of result `row`.
  SNV2_DEVICE Window(const Block<T>& block, int channel, int column, int row, int height, int width)
      : columns(block, channel, column, row * kStride - 1, height, width) {
    columns.read_next(values[kStride == 1 ? 1 : 2]);
    if constexpr (kStride == 1) columns.read_next(values[2]);
  }
  SNV2_DEVICE void next() {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      values[0][i] = values[kStride][i];
      if constexpr (kStride == 1) values[1][i] = values[2][i];
    }
    if constexpr (kStride == 2) columns.read_next(values[1]);
    columns.read_next(values[2]);
  }

  ThreeColumns<T> columns;
};

}  // namespace snv2::SNV2_GPU
