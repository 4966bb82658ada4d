// Lanes of the gradients' kernels: they march down some columns of a channel.
//
// In the first phase a lane computes the convolution again, reading each row of x once and adding
// it to the results that it is part of, and clears the gradient where the ReLU cut off. In the
// second it has a window of rows of what is left of the gradient in registers. Each of its values
// is multiplied with a weight, which makes grad_x, the convolution turned round, and with the x
// under it, which makes the sum of that weight's tap: so x is read without its neighbours. The
// window is zero outside of the map. That is no matter for grad_x, but would not silence an
// infinite x: there the sums leave x out.
#pragma once

#include "cuda/backward_block.h"
#include "cuda/mma.h"
#include "snv2/types.h"

namespace snv2::SNV2_GPU {

// Elements of a row of zeros, which stands for a row of the gradient that is not there.
constexpr int zeros_of(int pixel) { return (kPieceColumns + 1) * pixel + 1; }

// A thread's channel: its weights, and its sums.
struct ChannelGradient {
  Shared<float> weight, scale, shift;  // where they lie: in registers they would spill
  float sums[kDepthwiseSums] = {};
};

// The sums of a piece, those of every second column apart, and the gradients' of a row at once:
// short chains round less often.
class PieceSums {
 public:
  SNV2_DEVICE void add(int tap, int column, float gradient, float x) {
    float& sum = sums_[column % 2][tap];
    sum = multiply_add(gradient, x, sum);
  }
  SNV2_DEVICE void add_row(float gradients) { gradients_ += gradients; }
  SNV2_DEVICE void add_to(ChannelGradient& of) const {
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) of.sums[tap] += sums_[0][tap] + sums_[1][tap];
    of.sums[9] += gradients_;
  }

 private:
  float sums_[2][9] = {}, gradients_ = 0.0f;
};

template <int kPixel, class T, int... I>
SNV2_DEVICE void clear_cut(Address<T> at, const float (&y)[sizeof...(I)],
                           std::integer_sequence<int, I...>) {
  (clear_unless_above_zero<I * kPixel>(y[I], at), ...);
}

// Clears the gradient of a piece where the ReLU cut off. x has `height` rows.
template <int kStride, class Shape, class X, class Grad>
SNV2_DEVICE void cut(const X& x_block, const Grad& grad, const ChannelGradient& of,
                     const Piece& piece, int height) {
  constexpr int kColumns = kPieceColumns, kOwn = kColumns * kStride;
  constexpr int kLast = kStride == 1 ? kColumns : kOwn - 1, kInputs = kLast + 2;
  const int begin = piece.rows.begin, end = piece.rows.end;
  const int pitch = x_block.pitch(), column = piece.column * kStride;
  const bool left = column > 0;
  const int inside = x_block.columns.end - column;
  auto source = x_block.at(begin * kStride, column);
  Address result(grad.at(begin, piece.column));
  float x[kInputs], first[kColumns], second[kColumns], weight[9];
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) weight[tap] = load(of.weight + tap);
  const float scale = load(of.scale), shift = load(of.shift);
  const auto read = [&](auto at) {
    read_columns<Shape, -1, kLast, kOwn, X::kPixel>(x, at, left, inside);
  };
  // out = in and three taps from kTap on.
  const auto add = [&](auto tap, float (&out)[kColumns], const float (&in)[kColumns]) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      float sum = in[i];
#pragma unroll
      for (int k = 0; k < 3; ++k) sum += weight[tap.value + k] * x[i * kStride + k];
      out[i] = sum;
    }
  };
  constexpr std::integral_constant<int, 0> kAbove;
  constexpr std::integral_constant<int, 3> kMiddle;
  constexpr std::integral_constant<int, 6> kBelow;
  constexpr float kNone[kColumns] = {};
  const auto finish = [&](const float (&sums)[kColumns]) {
    float y[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      y[i] = sums[i] * scale + shift;
      if (!Shape::kWhole && i >= piece.columns) y[i] = 1.0f;  // of another lane, or of none
    }
    clear_cut<Grad::kPixel>(result, y, std::make_integer_sequence<int, kColumns>{});
    result = result + grad.pitch();
  };
#pragma unroll
  for (int i = 0; i < kColumns; ++i) first[i] = 0.0f;
  if (begin > 0) {
    read(source + -pitch);
    add(kAbove, first, kNone);
  }
  if constexpr (kStride == 1) {
    read(source);
    add(kMiddle, second, first);
    add(kAbove, first, kNone);
#pragma unroll 1
    for (int row = begin + 1; row < end; ++row) {
      source = source + pitch;
      read(source);
      float sums[kColumns];
      add(kBelow, sums, second);
      finish(sums);
      add(kMiddle, second, first);
      add(kAbove, first, kNone);
    }
    if (end < height) {
      read(source + pitch);
      add(kBelow, second, second);
    }
    finish(second);
  } else {
#pragma unroll 1
    for (int row = begin; row < end; ++row) {
      read(source);
      add(kMiddle, second, first);
      if (2 * row + 1 < height) {
        read(source + pitch);
        add(kBelow, second, second);
        add(kAbove, first, kNone);
      }
      source = source + 2 * pitch;
      finish(second);
    }
  }
}

SNV2_DEVICE void scale_weights(float (&weight)[9], const ChannelGradient& of) {
  const float scale = load(of.scale);
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) weight[tap] = load(of.weight + tap) * scale;
}

// Writes a piece of the gradient of x, which has `height` rows, and adds up the sums. The piece is
// one of the gradient: at stride 2 a pixel of it has four of x. results.put<Shape>(values, n) gets
// the first n values of one row of x after the other. `zeros` is
// column 0 of a row of them.
template <class Shape, class X, class Grad, class Results>
SNV2_DEVICE void turn_round(std::integral_constant<int, 1>, const X& x_block, const Grad& grad,
                            decltype(Grad::data) zeros, ChannelGradient& of, const Piece& piece,
                            int height, Results results) {
  constexpr int kColumns = kPieceColumns;
  const int end = piece.rows.end, inside = grad.columns.end - piece.column;
  const bool left = piece.column > 0;
  int y = piece.rows.begin;
  auto next = grad.at(y, piece.column);
  auto source = x_block.at(y, piece.column);
  PieceSums sums;
  float weight[9];
  scale_weights(weight, of);
  using Row = float[kColumns + 2];
  const auto read = [&](Row& row, auto at) {
    read_columns<Shape, -1, kColumns, kColumns, Grad::kPixel>(row, at, left, inside);
  };
  const auto step = [&](const Row& above, const Row& middle, Row& below) {
    const bool has_below = y + 1 < height;
    next = next + grad.pitch();
    read(below, has_below ? next : zeros);
    float x[kColumns], to[kColumns], of_row = 0.0f;
    read_columns<Shape, 0, kColumns - 1, kColumns, X::kPixel>(x, source, false, inside);
    source = source + x_block.pitch();
    const auto add = [&](const Row& row, auto tap) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (!Shape::kWhole && i >= piece.columns) break;
#pragma unroll
        for (int k = 0; k < 3; ++k) {
          bool outside = false;
          if (i == 0 && k == 0) outside = !left;
          if (k == 2 && (!Shape::kWhole || i == kColumns - 1)) {
            outside = i + 1 >= inside;
          }
          sums.add(tap.value - k, i, row[i + k], outside ? 0.0f : x[i]);
        }
      }
    };
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < 3; ++k) sum += weight[8 - k] * above[i + k];
#pragma unroll
      for (int k = 0; k < 3; ++k) sum += weight[5 - k] * middle[i + k];
#pragma unroll
      for (int k = 0; k < 3; ++k) sum += weight[2 - k] * below[i + k];
      to[i] = sum;
      if (Shape::kWhole || i < piece.columns) of_row = i == 0 ? middle[1] : of_row + middle[i + 1];
    }
    sums.add_row(of_row);
    if (y > 0) add(above, std::integral_constant<int, 8>{});
    add(middle, std::integral_constant<int, 5>{});
    if (has_below) add(below, std::integral_constant<int, 2>{});
    results.template put<Shape>(to, piece.columns);
    ++y;
  };
  Row rows[3];
  read(rows[0], y > 0 ? next + -grad.pitch() : zeros);
  read(rows[1], next);
  // Rows take turns, so that none is moved where pieces are whole.
#pragma unroll 1
  while (true) {
    step(rows[0], rows[1], rows[2]);
    if (y >= end) break;
    if constexpr (!Shape::kWhole) {
#pragma unroll
      for (int i = 0; i < kColumns + 2; ++i) {
        rows[0][i] = rows[1][i];
        rows[1][i] = rows[2][i];
      }
      continue;
    }
    step(rows[1], rows[2], rows[0]);
    if (y >= end) break;
    step(rows[2], rows[0], rows[1]);
    if (y >= end) break;
  }
  sums.add_to(of);
}

// At stride 2 a result is part of two rows and columns, and of one more after each.
template <class Shape, class X, class Grad, class Results>
SNV2_DEVICE void turn_round(std::integral_constant<int, 2>, const X& x_block, const Grad& grad,
                            decltype(Grad::data) zeros, ChannelGradient& of, const Piece& piece,
                            int height, Results results) {
  constexpr int kColumns = kPieceColumns;
  const int end = piece.rows.end, inside = grad.columns.end - piece.column;
  const int x_inside = x_block.columns.end - 2 * piece.column;
  const int x_columns = 2 * piece.columns < x_inside ? 2 * piece.columns : x_inside;
  int y = piece.rows.begin;
  auto next = grad.at(y, piece.column);
  auto source = x_block.at(2 * y, 2 * piece.column);
  PieceSums sums;
  using Row = float[kColumns + 1];
  using Inputs = float[2 * kColumns];
  float w[9];
  scale_weights(w, of);
  const auto read = [&](Row& row, auto at) {
    read_columns<Shape, 0, kColumns, kColumns, Grad::kPixel>(row, at, false, inside);
  };
  const auto read_x = [&](Inputs& x) {
    read_columns<Shape, 0, 2 * kColumns - 1, 2 * kColumns, X::kPixel>(x, source, false, x_inside);
    source = source + x_block.pitch();
  };
  // Adds what a row of the gradient is to a row of x: at its own column by kTap, at the ones beside
  // by those around it.
  const auto add = [&](auto tap, const Row& row, const Inputs& x, Inputs& to) {
    constexpr int kTap = tap.value;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (!Shape::kWhole && i >= piece.columns) break;
      float& even = to[2 * i];
      float& odd = to[2 * i + 1];
      even += w[kTap] * row[i];
      odd += w[kTap + 1] * row[i];
      odd += w[kTap - 1] * row[i + 1];
      const bool last = !Shape::kWhole || i == kColumns - 1;
      const bool outside = last && (i + 1 >= inside);
      sums.add(kTap, i, row[i], x[2 * i]);
      // Where there is no such x it was read as zero, which would not silence an infinite gradient.
      const float own = Shape::kWhole || 2 * i + 1 < x_inside ? row[i] : 0.0f;
      sums.add(kTap + 1, i, own, x[2 * i + 1]);
      sums.add(kTap - 1, i, row[i + 1], outside ? 0.0f : x[2 * i + 1]);
    }
  };
  const auto step = [&](const Row& above, Row& below) {
    const bool has_below = y + 1 < (height + 1) / 2;
    next = next + grad.pitch();
    read(below, has_below ? next : zeros);
    float of_row = above[0];
#pragma unroll
    for (int i = 1; i < kColumns; ++i) {
      if (Shape::kWhole || i < piece.columns) of_row += above[i];
    }
    sums.add_row(of_row);
    {
      Inputs x, to = {};
      read_x(x);
      add(std::integral_constant<int, 4>{}, above, x, to);
      results.template put<Shape>(to, x_columns);
    }
    if (2 * y + 1 < height) {
      Inputs x, to = {};
      read_x(x);
      add(std::integral_constant<int, 7>{}, above, x, to);
      if (has_below) add(std::integral_constant<int, 1>{}, below, x, to);
      results.template put<Shape>(to, x_columns);
    }
    ++y;
  };
  Row rows[2];
  read(rows[0], next);
#pragma unroll 1
  while (true) {
    step(rows[0], rows[1]);
    if (y >= end) break;
    if constexpr (!Shape::kWhole) {
#pragma unroll
      for (int i = 0; i < kColumns + 1; ++i) rows[0][i] = rows[1][i];
      continue;
    }
    step(rows[1], rows[0]);
    if (y >= end) break;
  }
  sums.add_to(of);
}

}  // namespace snv2::SNV2_GPU
