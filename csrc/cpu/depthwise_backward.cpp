// Gradients of dw_conv3x3 and split_dw_cat_shuffle, in one pass over the gradient and x.
//
// A work item is a channel of some images (contiguous layout) or some rows of some channels
// (channels-last). A block of its rows, which fits in the L1 cache, is marched over three times:
//   the convolution again, to clear the gradient where the ReLU cut off; that is kept as floats,
//   the sums that the parameters' gradients are made of,
//   grad_x, the same convolution turned round.
// The gradient of stride 2 is spread over the pixels of x, with zeros between.
#include <algorithm>
#include <cmath>

#include "cpu/dw_rows.h"

namespace snv2::cpu::SNV2_ISA {
namespace {

template <class V>
SNV2_INLINE Taps<V> turned(const Taps<V>& taps) {
  Taps<V> result;
  unroll<9>([&](auto i)
                SNV2_INLINED { result.weight[i / 3][i % 3] = taps.weight[2 - i / 3][2 - i % 3]; });
  result.scale = taps.scale;
  result.shift = V{};
  result.lowest = lowest_of<V>(false);
  return result;
}

// Returns the gradient where the ReLU let y through, as it does a NaN.
template <class V>
SNV2_INLINE V masked(V gradient, V y) {
  return V{} >= y ? V{} : gradient;
}

// The range and one place to either side.
Range around(Range range, int64_t end) {
  return {std::max<int64_t>(range.begin - 1, 0), std::min(range.end + 1, end)};
}

// The sums of an item, in lanes. A few terms at a time are added in float, so that no chain of
// roundings is long.
struct Totals {
  float run[kDepthwiseSums][kPanel] = {};
  double sums[kDepthwiseSums][kPanel] = {};
  int terms = 0;  // of a run

  void flush() {
    terms = 0;
    for (int i = 0; i < kDepthwiseSums; ++i) {
      for (int lane = 0; lane < kPanel; ++lane) {
        sums[i][lane] += double{run[i][lane]};
        run[i][lane] = 0.0f;
      }
    }
  }

  bool finite() const {
    double zeros[kPanel] = {};
    for (const auto& lanes : sums) {
      for (int lane = 0; lane < kPanel; ++lane) zeros[lane] += 0.0 * lanes[lane];
    }
    return std::all_of(zeros, zeros + kPanel, [](double zero) { return zero == 0.0; });
  }
};

// The run of a vector of channels, or of columns of one, in registers: up to kTerms terms.
template <class V, int kTerms>
class Run {
 public:
  explicit SNV2_INLINE Run(Totals& totals) : totals_(totals) { load_run(); }
  SNV2_INLINE ~Run() { store_run(); }
  Run(const Run&) = delete;

  // in: x's neighbours across the line at one place; before, here and after: gradients along it.
  // kPlace and kNeighbour are the steps from tap to tap.
  template <int kPlace, int kNeighbour>
  SNV2_INLINE void add(const V (&in)[3], V before, V here, V after) {
    unroll<3>([&](auto j) SNV2_INLINED {
      sums_[j * kNeighbour] += in[j] * after;
      sums_[j * kNeighbour + kPlace] += in[j] * here;
      sums_[j * kNeighbour + 2 * kPlace] += in[j] * before;
    });
    sums_[9] += here;
    if (++terms_ == kTerms) {
      store_run();
      totals_.flush();
      load_run();
    }
  }

 private:
  SNV2_INLINE void load_run() {
    terms_ = totals_.terms;
    unroll<kDepthwiseSums>([&](auto i) SNV2_INLINED { sums_[i] = load<V>(totals_.run[i]); });
  }
  SNV2_INLINE void store_run() {
    totals_.terms = terms_;
    unroll<kDepthwiseSums>([&](auto i) SNV2_INLINED { store(totals_.run[i], sums_[i]); });
  }

  Totals& totals_;
  int terms_;
  V sums_[kDepthwiseSums];
};

// The border's zeros times infinity are NaN. So where a total is not finite it is summed up again
// of pixels inside the map: gradient(row, column) times x(row, column).
template <class Gradient, class X>
void add_inside(const DepthwiseBackward& op, Range rows, int lane, const Gradient& gradient,
                const X& x, Totals& totals) {
  const int64_t stride = op.dw.stride;
  for (int64_t row = ceil_div(rows.begin, stride) * stride; row < rows.end; row += stride) {
    for (int64_t column = 0; column < op.x.width; column += stride) {
      const float g = gradient(row, column);
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t y = row + tap / 3 - 1, z = column + tap % 3 - 1;
        if (y < 0 || y >= op.x.height || z < 0 || z >= op.x.width) continue;
        totals.sums[tap][lane] += double{g * x(y, z)};
      }
      totals.sums[9][lane] += double{g};
    }
  }
}

// Contiguous layout ------------------------------------------------------------------------------

template <class T>
class PlanesBackward {
 public:
  PlanesBackward(const DepthwiseBackward& op, float* scratch)
      : op_(op),
        height_(op.x.height),
        width_(op.x.width),
        gradient_(scratch),
        spread_(scratch + (backward_rows(op.x) + 4) * width_ + kPanel) {}

  void run(int64_t item) const {
    Totals totals;
    run(item, totals, false);
    if (!totals.finite()) {
      totals = {};
      run(item, totals, true);
    }
    float* const to = op_.sums + item * kDepthwiseSums;
    for (int64_t i = 0; i < kDepthwiseSums; ++i) {
      double sum = 0;
      for (const double lane : totals.sums[i]) sum += lane;
      to[i] = static_cast<float>(sum);
    }
  }

 private:
  void run(int64_t item, Totals& totals, bool inside) const {
    const int64_t channel = item % op_.channels, part = item / op_.channels;
    const int64_t main = op_.x.channels - op_.channels, every = op_.passthrough() ? 2 : 1;
    const Filter filter(op_.dw, channel);
    const int64_t end = std::min((part + 1) * op_.images(), op_.x.batch);
    for (int64_t image = part * op_.images(); image < end; ++image) {
      const T* const x = plane_of<const T>(op_.x, image, main + channel);
      const T* const grad = plane_of<const T>(op_.grad, image, (channel + 1) * every - 1);
      PlaneCopy<T> copy(plane_of<const T>(op_.grad, image, channel * every),
                        plane_of<T>(op_.grad_x, image, channel),
                        op_.passthrough() ? op_.x.plane() : 0);
      for (int64_t row = 0; row < height_; row += backward_rows(op_.x)) {
        const Range rows{row, std::min(row + backward_rows(op_.x), height_)};
        mask(x, grad, filter, rows);
        if (inside) {
          add_inside(
              op_, rows, 0, [&](int64_t y, int64_t i) { return gradient_row(y, rows)[i]; },
              [&](int64_t y, int64_t i) { return to_float(x[y * width_ + i]); }, totals);
        } else {
          add(x, rows, totals);
        }
        compute_grad_x(filter, rows, plane_of<T>(op_.grad_x, image, main + channel), copy);
      }
    }
    totals.flush();
  }

  // Rows of x that are read for a block's; the outermost are right only at the border.
  Range rows_read(Range rows) const { return around(around(rows, height_), height_); }

  const float* gradient_row(int64_t row, Range rows) const {
    return gradient_ + (row - rows_read(rows).begin) * width_;
  }

  void mask(const T* x, const T* grad, const Filter& filter, Range rows) const {
    const Range read = rows_read(rows);
    if (op_.dw.stride == 1) {
      mask_from(grad + read.begin * width_, x, filter, read);
      return;
    }
    std::fill_n(spread_, read.size() * width_, 0.0f);
    for (int64_t row = ceil_div(read.begin, 2) * 2; row < read.end; row += 2) {
      const T* const from = grad + row / 2 * op_.grad.width;
      float* const to = spread_ + (row - read.begin) * width_;
      for (int64_t i = 0; i < op_.grad.width; ++i) to[2 * i] = to_float(from[i]);
    }
    mask_from(spread_, x, filter, read);
  }

  template <class Grad>
  void mask_from(const Grad* grad, const T* x, const Filter& filter, Range read) const {
    if (!op_.dw.relu) return read_floats(grad, read.size() * width_, gradient_);
    dw_plane(x + read.begin * width_, read.size(), width_, filter,
             [&](int64_t row, int64_t column, int64_t count, auto y) SNV2_INLINED {
               const int64_t at = row * width_ + column;
               const auto gradient = load_floats<decltype(y)>(grad + at, count);
               store_floats(gradient_ + at, masked(gradient, y), count);
             });
  }

  void add(const T* x, Range rows, Totals& totals) const {
    const Range read = around(rows, height_);
    for_each_columns(x + read.begin * width_, read.size(), width_,
                     [&](auto v, int64_t column, const auto& columns) SNV2_INLINED {
                       using V = decltype(v);
                       constexpr int64_t kCount = kLanesOf<V>;
                       // Each column once, though vectors overlap.
                       const auto first =
                           static_cast<uint32_t>(ceil_div(column, kCount) * kCount - column);
                       const auto end = static_cast<uint32_t>(std::min(width_ - column, kCount));
                       const auto ours = (lane_numbers<V>() >= first) & (lane_numbers<V>() < end);
                       const auto gradient = [&](int64_t row) SNV2_INLINED {
                         if (row < rows.begin || row >= rows.end) return V{};
                         return ours ? load<V>(gradient_row(row, rows) + column) : V{};
                       };
                       Run<V, 16> run(totals);
                       V before = {}, here = gradient(read.begin);
                       for (int64_t row = read.begin; row < read.end; ++row) {
                         V in[3];
                         columns(row - read.begin, in);
                         const V after = gradient(row + 1);
                         run.template add<3, 1>(in, before, here, after);
                         before = here;
                         here = after;
                       }
                     });
  }

  void compute_grad_x(const Filter& filter, Range rows, T* grad_x, PlaneCopy<T>& copy) const {
    const Range read = around(rows, height_);
    for_each_columns(gradient_row(read.begin, rows), read.size(), width_,
                     [&](auto v, int64_t column, const auto& columns) SNV2_INLINED {
                       using V = decltype(v);
                       march<1>(turned(filter.taps<V>()), read.size(), columns,
                                [&](int64_t i, int, V result) SNV2_INLINED {
                                  copy.template step<V>();
                                  const int64_t row = read.begin + i;
                                  if (row < rows.begin || row >= rows.end) return;
                                  store_floats(grad_x + row * width_ + column, result,
                                               columns.count(i));
                                });
                     });
  }

  const DepthwiseBackward& op_;
  const int64_t height_, width_;
  float* const gradient_;  // [rows + 4][width], where the ReLU let it through
  float* const spread_;    // likewise, of stride 2
};

// Channels-last ----------------------------------------------------------------------------------

template <class T>
class RowsBackward {
 public:
  RowsBackward(const DepthwiseBackward& op, float* scratch)
      : op_(op),
        height_(op.x.height),
        width_(op.x.width),
        main_(op.x.channels - op.channels),
        packed_(op.dw, op.channels, scratch),
        gradient_(scratch + 9 * op.channels) {}

  void run(int64_t item) const {
    const int64_t part = item / op_.channel_groups(), blocks = op_.row_blocks();
    const Range channels = part_of(op_.channels, op_.channel_groups(), item % op_.channel_groups());
    const Range rows = part_of(height_, blocks, part % blocks);
    const int64_t group = part / blocks;
    const int64_t end = std::min((group + 1) * op_.images(), op_.x.batch);
    for_each_strip(channels.size(), [&](auto v, int64_t i) SNV2_INLINED {
      using V = decltype(v);
      const int64_t c = channels.begin + i;
      const int64_t count = std::min<int64_t>(channels.size(), kLanesOf<V>);
      const Taps<V> taps = packed_.taps<V>(c, count);
      const auto run_strip = [&](bool inside) {
        Totals totals;
        for (int64_t image = group * op_.images(); image < end; ++image) {
          mask(taps, image, rows, c, count);
          if (inside) {
            add_inside_of<V>(image, rows, c, count, totals);
          } else {
            add<V>(image, rows, c, count, totals);
          }
          compute_grad_x(turned(taps), image, rows, c, count);
        }
        totals.flush();
        return totals;
      };
      Totals totals = run_strip(false);
      if (!totals.finite()) totals = run_strip(true);
      float* const to = op_.sums + (part * op_.channels + c) * kDepthwiseSums;
      for (int64_t lane = 0; lane < count; ++lane) {
        for (int64_t sum = 0; sum < kDepthwiseSums; ++sum) {
          to[lane * kDepthwiseSums + sum] = static_cast<float>(totals.sums[sum][lane]);
        }
      }
    });
  }

 private:
  template <class V>
  float* gradient_row(int64_t row, Range rows) const {
    return gradient_ + (row - around(rows, height_).begin) * width_ * kLanesOf<V>;
  }

  // x's rows around one, channels from c of the convolution on.
  template <int kCount>
  Rows<T, kCount> x_rows(int64_t image, int64_t first, int64_t c) const {
    return {row_of<const T>(op_.x, image, 0) + main_ + c, first, height_, width_ * op_.x.channels,
            op_.x.channels};
  }

  template <class V>
  SNV2_INLINE void mask(Taps<V> taps, int64_t image, Range rows, int64_t c, int64_t count) const {
    const Range read = around(rows, height_);
    if (op_.dw.stride == 1) {
      // Another block copies what passes through the rows around these.
      const auto around_them = [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          mask_rows<1, 1, false>(taps, image, row, c, count, gradient_row<V>(row, rows));
        }
      };
      around_them(read.begin, rows.begin);
      for_each_lines(rows, [&](auto lines, int64_t row) SNV2_INLINED {
        mask_rows<lines, 1, true>(taps, image, row, c, count, gradient_row<V>(row, rows));
      });
      around_them(rows.end, read.end);
      return;
    }
    for (int64_t row = read.begin; row < read.end; ++row) {
      float* const to = gradient_row<V>(row, rows);
      if (row % 2 == 0) {
        mask_rows<1, 2, false>(taps, image, row, c, count, to);
      } else {
        std::fill_n(to, width_ * kLanesOf<V>, 0.0f);
      }
    }
  }

  // Computes masked gradients of kCount rows, and where kCopies copies what passes through them.
  template <int kCount, int kStride, bool kCopies, class V>
  SNV2_INLINE void mask_rows(Taps<V> taps, int64_t image, int64_t row, int64_t c, int64_t count,
                             float* to) const {
    const int64_t channels = op_.x.channels, width = width_, grad_width = op_.grad.width;
    const bool relu = op_.dw.relu, passthrough = op_.passthrough();
    const T* const grad =
        row_of<const T>(op_.grad, image, row / kStride) + (passthrough ? 2 * c : c);
    T* const passed = row_of<T>(op_.grad_x, image, row) + c;
    const auto x = x_rows<kCount + 2>(image, row - 1, c);
    march<kCount>(
        taps, width, [&](int64_t i, V(&in)[kCount + 2]) SNV2_INLINED { x.load(i, count, in); },
        [=](int64_t i, int line, V y) SNV2_INLINED {
          V gradient = {};
          if (i % kStride == 0) {
            const T* const pixel = grad + (line * grad_width + i / kStride) * channels;
            gradient = passthrough
                           ? split<V, kCopies>(pixel, count, passed + (line * width + i) * channels)
                           : load_floats<V>(pixel, count);
          }
          store(to + (line * width + i) * kLanesOf<V>, relu ? masked(gradient, y) : gradient);
        });
  }

  // The odd channels; the even ones are stored, if kCopies.
  template <class V, bool kCopies>
  static SNV2_INLINE V split(const T* grad, int64_t count, T* passed) {
    if (count == kLanesOf<V>) {
      Raw<T, V> even, odd;
      load_pairs<V>(grad, even, odd);
      if constexpr (kCopies) store_raw(passed, even);
      return floats_of<V>(odd, T{});
    }
    T lanes[kLanesOf<V>] = {};
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (kCopies) passed[i] = grad[2 * i];
      lanes[i] = grad[2 * i + 1];
    }
    return load_floats<V>(lanes);
  }

  template <class V>
  SNV2_INLINE void add(int64_t image, Range rows, int64_t c, int64_t count, Totals& totals) const {
    Run<V, 32> run(totals);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const Rows<T, 3> x = x_rows<3>(image, row - 1, c);
      const float* const gradient = gradient_row<V>(row, rows);
      V before = {}, here = load<V>(gradient);
      for (int64_t i = 0; i < width_; ++i) {
        V in[3];
        x.load(i, count, in);
        const V after = i + 1 < width_ ? load<V>(gradient + (i + 1) * kLanesOf<V>) : V{};
        run.template add<1, 3>(in, before, here, after);
        before = here;
        here = after;
      }
    }
  }

  template <class V>
  void add_inside_of(int64_t image, Range rows, int64_t c, int64_t count, Totals& totals) const {
    for (int lane = 0; lane < count; ++lane) {
      add_inside(
          op_, rows, lane,
          [&](int64_t row, int64_t i) {
            return gradient_row<V>(row, rows)[i * kLanesOf<V> + lane];
          },
          [&](int64_t row, int64_t i) {
            return to_float(
                row_of<const T>(op_.x, image, row)[i * op_.x.channels + main_ + c + lane]);
          },
          totals);
    }
  }

  template <class V>
  SNV2_INLINE void compute_grad_x(Taps<V> taps, int64_t image, Range rows, int64_t c,
                                  int64_t count) const {
    const Range read = around(rows, height_);
    const int64_t pitch = width_ * kLanesOf<V>;
    const int64_t channels = op_.x.channels, width = width_;
    for_each_lines(rows, [&](auto lines, int64_t row) SNV2_INLINED {
      const Rows<float, lines + 2> gradient(gradient_, row - 1 - read.begin, read.size(), pitch,
                                            kLanesOf<V>);
      T* const to = row_of<T>(op_.grad_x, image, row) + main_ + c;
      march<lines>(
          taps, width,
          [&](int64_t i, V(&in)[lines + 2]) SNV2_INLINED { gradient.load(i, kLanesOf<V>, in); },
          [=](int64_t i, int line, V result)
              SNV2_INLINED { store_floats(to + (line * width + i) * channels, result, count); });
    });
  }

  template <class F>
  static SNV2_INLINE void for_each_lines(Range rows, const F& f) {
    int64_t row = rows.begin;
    for (; row + kLines <= rows.end; row += kLines) f(std::integral_constant<int, kLines>{}, row);
    for (; row < rows.end; ++row) f(std::integral_constant<int, 1>{}, row);
  }

  const DepthwiseBackward& op_;
  const int64_t height_, width_;
  const int64_t main_;  // first channel of the convolution
  const PackedTaps packed_;
  float* const gradient_;  // [rows + 2][width][a vector], where the ReLU let it through
};

}  // namespace

void depthwise_backward(const DepthwiseBackward& op, Range items, float* scratch) {
  with_type(op.x.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](const auto& backward) {
      for (int64_t item = items.begin; item < items.end; ++item) backward.run(item);
    };
    if (op.x.layout == Layout::kContiguous) {
      run(PlanesBackward<T>(op, scratch));
    } else {
      run(RowsBackward<T>(op, scratch));
    }
  });
}

}  // namespace snv2::cpu::SNV2_ISA
