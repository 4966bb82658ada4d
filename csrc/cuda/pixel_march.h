// A lane of the channels-last kernels: it marches down some columns of its channels.
//
// It reads each row of its columns once, converts it once, and adds it to all results that it is
// part of; those of which rows are still to come stay in registers, so taps are added in their
// order. A lane takes two neighbouring channels of 16 bits where there are enough of them, which
// then move as one word. Columns are multiples of 7 in the networks; what is left of a row at its
// end is some fewer, for a whole warp, as lanes are neighbouring channels.
#pragma once

#include "cuda/mma.h"
#include "cuda/span.h"

namespace snv2::SNV2_GPU {

constexpr int kPixelColumns = 7;  // of results, of a lane

// Where the parameters of a channel lie: those of each 32 channels are a word further, so that
// lanes whose channels are two apart read different banks.
struct PixelParameters {
  Shared<float> weight, scale, shift;

  SNV2_DEVICE PixelParameters(Shared<float> room, int channels)
      : weight(room),
        scale(room + (9 * channels + channels / kWarp)),
        shift(scale + (channels + channels / kWarp)) {}
  template <class T>
  SNV2_DEVICE void load_all(const Operands<T>& op) const {
    const int channels = static_cast<int>(op.channels);
    load_each(weight, op.weight, 9 * channels, 9 * kWarp);
    load_each(scale, op.scale, channels, kWarp);
    load_each(shift, op.shift, channels, kWarp);
  }

 private:
  SNV2_DEVICE static void load_each(Shared<float> to, const float* from, int count, int block) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
      store(to + (i + i / block), load(Global<const float>{from} + i));
    }
  }
};
constexpr int64_t pixel_parameters(int64_t channels) {  // bytes
  return (11 * channels + 3 * (channels / kWarp)) * static_cast<int64_t>(sizeof(float));
}
// Of shared memory: two CTAs per SM, words between parameters not counted.
constexpr int64_t pixel_shared(int64_t channels) {
  return 96 * 1024 + 3 * (channels / kWarp) * static_cast<int64_t>(sizeof(float));
}

template <class T, bool kPassthrough, int kStride, int kChannels>
class PixelMarch {
 public:
  static constexpr int kInputs = (kPixelColumns - 1) * kStride + 3;  // columns that are read

  // Of `channel` and the results from column `column` on. `paired`: a result that is passed through
  // and one that is not can be stored at once.
  SNV2_DEVICE PixelMarch(const PixelParameters& parameters, const Operands<T>& op, int channel,
                         int column, bool paired)
      : pixel_(static_cast<int>(op.source_pixel)),
        out_pixel_(static_cast<int>(op.channels) * kUnit),
        main_(channel + (kPassthrough ? static_cast<int>(op.channels) : 0) +
              column * kStride * pixel_),
        pass_(channel + column * pixel_),
        out_(channel * kUnit + column * out_pixel_),
        columns_(static_cast<int>(op.out_width) - column),
        inputs_(static_cast<int>(op.width) - column * kStride + 1),
        left_(column > 0),
        paired_(paired),
        least_(op.relu ? 0.0f : -kInfinity) {
    if constexpr (kChannels == 2) least_pair_ = rounded_pair<T>(least_, least_);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
      const int c = channel + k, block = channel / kWarp;
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        taps_[tap][k] = load(parameters.weight + (c * 9 + block + tap));
      }
      scale_[k] = load(parameters.scale + (c + block));
      shift_[k] = load(parameters.shift + (c + block));
    }
    restart();
  }

  SNV2_DEVICE void restart() {
#pragma unroll
    for (int i = 0; i < kPixelColumns; ++i) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) first_[i][k] = second_[i][k] = 0.0f;
    }
  }

  // Reads what row of results `row` adds to the rows before it, from at(row of inputs), and writes
  // it to `out` if that is `wanted`. Rows are taken in turn, from the one on that is kBefore before
  // the first to be written.
  static constexpr int kBefore = 3 - kStride;
  template <class At>
  SNV2_DEVICE void step(int row, int height, bool wanted, const At& at, Shared<T> out) {
    if (columns_ >= kPixelColumns) {
      step<true>(row, height, wanted, at, out);
    } else {
      step<false>(row, height, wanted, at, out);
    }
  }

 private:
  static constexpr int kUnit = kPassthrough ? 2 : 1;
  static constexpr float kInfinity = __builtin_inff();
  using Sums = float[kPixelColumns][kChannels];
  using Inputs = float[kInputs][kChannels];

  template <bool kWhole, class At>
  SNV2_DEVICE void step(int row, int height, bool wanted, const At& at, Shared<T> out) {
    Inputs x;
    if constexpr (kStride == 2) {
      if (wanted) {
        read<kWhole>(x, at(row * 2) + main_);
        add<3>(second_, first_, x);
      }
    }
    const int last = row * kStride + 1;
    const bool has = last >= 0 && last < height;
    if (has) read<kWhole>(x, at(last) + main_);
    if (wanted) {
      Sums sums;
#pragma unroll
      for (int i = 0; i < kPixelColumns; ++i) {
#pragma unroll
        for (int k = 0; k < kChannels; ++k) sums[i][k] = second_[i][k];
      }
      if (has) add<6>(sums, second_, x);
      Shared<T> passed = out;
      if constexpr (kPassthrough) passed = at(row) + pass_;
      write<kWhole>(out + out_, passed, sums);
    }
    if (!has) return;
    if constexpr (kStride == 1) add<3>(second_, first_, x);
    constexpr Sums kNone = {};
    add<0>(first_, kNone, x);
  }

  template <bool kWhole>
  SNV2_DEVICE void read(Inputs& x, Shared<T> at) const {
    Shared<T> from = at;
#pragma unroll
    for (int i = 1; i < kInputs - 1; ++i) {
      read_one(x[i], from, kWhole || i < inputs_);
      from = from + pixel_;
    }
    read_one(x[0], at + -pixel_, left_);
    read_one(x[kInputs - 1], from, kInputs - 1 < inputs_);
  }
  SNV2_DEVICE static void read_one(float (&x)[kChannels], Shared<T> at, bool has) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) x[k] = 0.0f;
    if (!has) return;
    const Vector<T, kChannels> values = load_vector<kChannels>(at);
#pragma unroll
    for (int k = 0; k < kChannels; ++k) x[k] = to_float(values.values[k]);
  }

  // out = in and three taps from kTap on.
  template <int kTap>
  SNV2_DEVICE void add(Sums& out, const Sums& in, const Inputs& x) const {
#pragma unroll
    for (int i = 0; i < kPixelColumns; ++i) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        float sum = in[i][k];
#pragma unroll
        for (int dx = 0; dx < 3; ++dx) sum += taps_[kTap + dx][k] * x[i * kStride + dx][k];
        out[i][k] = sum;
      }
    }
  }

  template <bool kWhole>
  SNV2_DEVICE void write(Shared<T> out, Shared<T> passed, const Sums& sums) const {
#pragma unroll
    for (int i = 0; i < kPixelColumns; ++i) {
      if (!kWhole && i >= columns_) break;
      const Vector<T, kChannels> y = finished(sums[i]);
      if constexpr (!kPassthrough) {
        store_vector<kChannels>(out, y);
      } else {
        const Vector<T, kChannels> p = load_vector<kChannels>(passed);
        Vector<T, 2 * kChannels> both;
#pragma unroll
        for (int k = 0; k < 2 * kChannels; ++k) both.values[k] = (k % 2 == 0 ? p : y).values[k / 2];
        if (kChannels > 1 || paired_) {
          store_vector<2 * kChannels>(out, both);
        } else {
          store(out, both.values[0]);
          store(out + 1, both.values[1]);
        }
        passed = passed + pixel_;
      }
      out = out + out_pixel_;
    }
  }
  SNV2_DEVICE Vector<T, kChannels> finished(const float (&sums)[kChannels]) const {
    if constexpr (kChannels == 2) {
      const Vector<T, 2> y =
          rounded_pair<T>(sums[0] * scale_[0] + shift_[0], sums[1] * scale_[1] + shift_[1]);
      return max_nan(y, least_pair_);
    } else {
      return {{rounded<T>(max_nan(sums[0] * scale_[0] + shift_[0], least_))}};
    }
  }

  int pixel_, out_pixel_;  // from one pixel to the next
  int main_, pass_, out_;  // of the first column, from where a row begins
  int columns_, inputs_;   // that there are, up to the end of the row
  bool left_, paired_;
  float least_;
  Vector<T, 2> least_pair_;
  float taps_[9][kChannels], scale_[kChannels], shift_[kChannels];
  Sums first_, second_;  // results of which one row, or two, are read
};

}  // namespace snv2::SNV2_GPU
