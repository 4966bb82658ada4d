// Blocks of maps in shared memory, and the pieces of them that lanes take: for gradients.
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
  SNV2_DEVICE Extent with_halo(int halo, int limit) const {
    return {begin > halo ? begin - halo : 0, end + halo < limit ? end + halo : limit};
  }
  // Results of that stride whose middle tap is inside.
  SNV2_DEVICE Extent results(int stride) const {
    return {(begin + stride - 1) / stride, (end - 1) / stride + 1};
  }
};

constexpr int kPieceColumns = 7;  // of results, of a lane: rows of the networks are multiples

// kWhole: each piece has kPieceColumns columns.
template <bool kWholePieces>
struct Pieces {
  static constexpr bool kWhole = kWholePieces;
};

// Some rows of some columns of results.
struct Piece {
  int column, columns;
  Extent rows;
};

// Calls f(piece) for every step-th piece of a block, neighbours having neighbouring columns. There
// are as many pieces to a column as make good use of the threads.
template <class Shape, class F>
SNV2_DEVICE void for_pieces(int first, int step, const Extent& rows, const Extent& columns,
                            const F& f) {
  const int width = columns.size(), height = rows.size();
  const int groups = (width + kPieceColumns - 1) / kPieceColumns;
  const int across = Shape::kWhole ? kPieceColumns : (width + groups - 1) / groups;
  const int most = step / groups < 1 ? 1 : step / groups;
  const int down = (height + most - 1) / most, pieces = (height + down - 1) / down;
#pragma unroll 1
  for (int i = first; i < groups * pieces; i += step) {
    const int piece = i / groups, begin = piece * down;
    const int column = (i - piece * groups) * across;
    f(Piece{columns.begin + column,
            Shape::kWhole || column + across < width ? across : width - column,
            {rows.begin + begin, rows.begin + (begin + down < height ? begin + down : height)}});
  }
}

// A block of a channel of a map in shared memory, whose pixels are kPixel elements apart.
template <class T, int kPixelElements>
struct Block {
  static constexpr int kPixel = kPixelElements;

  Shared<T> data;
  Extent rows, columns;

  SNV2_DEVICE int pixels() const { return rows.size() * columns.size(); }
  SNV2_DEVICE int pitch() const { return columns.size() * kPixel; }
  SNV2_DEVICE Shared<T> at(int y, int x) const {
    return data + ((y - rows.begin) * columns.size() + x - columns.begin) * kPixel;
  }
};

// Reads columns kFirst to kLast of a row, of which that at `at` is column 0; zero outside of the
// map, which has a column -1 if `left`, and `inside` columns from 0 on. kOwn columns are known to
// be there where pieces are whole. Lanes read what is there in any case, so that they stay
// together.
template <class Shape, int kFirst, int kLast, int kOwn, int kPixel, class T>
SNV2_DEVICE void read_columns(float (&x)[kLast - kFirst + 1], Shared<T> at, bool left, int inside) {
#pragma unroll
  for (int i = kFirst; i <= kLast; ++i) {
    float& to = x[i - kFirst];
    const bool own = i >= 0 && i < kOwn;
    if (Shape::kWhole && own) {
      to = to_float(load(at + i * kPixel));
    } else {
      const bool has = i < 0 ? left : i < inside;
      const float value = to_float(load(at + (has ? i * kPixel : 0)));
      to = has ? value : 0.0f;
    }
  }
}

// Starts the copy of a block of pixels whose first channel is at `from`, N of kRoom channels by a
// thread of a team. `channels` is a multiple of N.
template <int kRoom, int N, class T>
SNV2_DEVICE void load_pixels(Shared<T> to, const Extent& rows, const Extent& columns,
                             const Strided<const T>& map, Global<const T> from, int channels,
                             int thread, int team) {
  constexpr int kUnrolled = 4;
  const int each = kRoom / N < team ? kRoom / N : team, together = team / each;
  const int first = thread / each, across = columns.size(), pixels = rows.size() * across;
  const int result_step = together * kRoom;
  const auto copy = [](Shared<T> result, Global<const T> source) {
    if constexpr (N * sizeof(T) >= 4) {
      cp_async<N>(result, source);
    } else {
      store(result, load(source));
    }
  };
  const Global<const T> corner = from + map.at(0, 0, rows.begin, columns.begin);
#pragma unroll 1
  for (int channel = thread % each * N; channel < channels; channel += each * N) {
    Shared<T> result = to + (first * kRoom + channel);
    if (across * map.pixel == map.row) {  // one row after the other
      Global<const T> source = corner + (first * map.pixel + channel);
      const int64_t step = together * map.pixel;
      int left = pixels - first;
      const auto next = [&] {
        copy(result, source);
        result = result + result_step;
        source = source + step;
      };
#pragma unroll 1
      for (; left > (kUnrolled - 1) * together; left -= kUnrolled * together) {
#pragma unroll
        for (int i = 0; i < kUnrolled; ++i) next();
      }
#pragma unroll 1
      for (; left > 0; left -= together) next();
    } else {
      const int step_row = together / across, step_column = together % across;
      const int64_t step = step_row * map.row + step_column * map.pixel;
      const int64_t wrap = map.row - across * map.pixel;
      int column = first % across;
      Global<const T> source = corner + (map.at(0, 0, first / across, column) + channel);
#pragma unroll 1
      for (int i = first; i < pixels; i += together) {
        copy(result, source);
        result = result + result_step;
        column += step_column;
        source = source + (column < across ? step : step + wrap);
        column = column < across ? column : column - across;
      }
    }
  }
}
template <int kRoom, class T>
SNV2_DEVICE void load_pixels(Shared<T> to, const Extent& rows, const Extent& columns,
                             const Strided<const T>& map, Global<const T> from, int channels,
                             int copy, int thread, int team) {
  constexpr int kWord = 4 / static_cast<int>(sizeof(T));
  const auto load = [&](auto n) {
    load_pixels<kRoom, n.value>(to, rows, columns, map, from, channels, thread, team);
  };
  if (copy == 4 * kWord) {
    load(std::integral_constant<int, 4 * kWord>{});
  } else if (copy == 2 * kWord) {
    load(std::integral_constant<int, 2 * kWord>{});
  } else if (copy == kWord) {
    load(std::integral_constant<int, kWord>{});
  } else {
    load(std::integral_constant<int, 1>{});
  }
}
// Returns how many elements that takes, of pixels that are `pixel` elements apart.
template <class T>
int pixel_copy(const T* data, int64_t pixel) {
  const int64_t size = sizeof(T);
  const uintptr_t places = reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(pixel * size);
  for (const int bytes : {16, 8, 4}) {
    if (places % static_cast<uintptr_t>(bytes) == 0) return static_cast<int>(bytes / size);
  }
  return 1;
}

// The same of one channel of a contiguous map: a warp takes a row.
template <class T>
SNV2_DEVICE void load_rows(const Block<T, 1>& to, const Strided<const T>& map, Global<const T> from,
                           int copy) {
  const int width = to.columns.size();
  for (int row = static_cast<int>(threadIdx.x) / kWarp; row < to.rows.size();
       row += static_cast<int>(blockDim.x) / kWarp) {
    load_line(to.data + row * width, from + map.at(0, 0, to.rows.begin + row, to.columns.begin), 0,
              width, width, copy);
  }
}

}  // namespace snv2::SNV2_GPU
