// Chooses the tile of the stem, and launches stem_kernel.
//
// Banks. In 16 bits four lanes read eight words in a row, and four such groups must not meet. Rows
// [c][dy] of three planes are an odd multiple of 8 words apart, modulo 32, planes three times that:
// any four rows that differ modulo 4 are apart. Of pixels they read every sixth word; two
// neighbours of each are apart from two in the next row if that is 16 words further, modulo 32. Of
// the last row four neighbours are read, which are apart if half of the lanes begin with the other
// one of their two columns.
#include <algorithm>
#include <array>
#include <stdexcept>

#include "cuda/dispatch.h"
#include "cuda/network.h"
#include "cuda/stem.h"

namespace snv2::SNV2_GPU {
namespace {

constexpr int64_t kMostRows = 8;                 // beyond, the lines that two tiles share are few
constexpr int64_t kWarpsPerSm = 2 * kStemWarps;  // what registers allow

constexpr int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }
// The least value from `least` on that is `rest` modulo `unit`.
constexpr int64_t at_least(int64_t least, int64_t rest, int64_t unit) {
  return rest + round_up(std::max<int64_t>(least - rest, 0), unit);
}

struct Shape {
  int64_t batch, channels, height, width;
  int64_t out, out_height, out_width;
  int64_t size;
  Taps taps;
  bool bytes;
  int64_t channel_block;  // channels of a CTA
  int64_t weight_pitch;   // elements

  int64_t elements() const { return taps == Taps::kPixels3 ? 3 : 1; }  // of a line's pixel
  int64_t planes() const { return taps == Taps::kPixels3 ? 1 : channels; }
  int64_t channel_blocks() const { return ceil_div(out, channel_block); }
};

// How the stem is cut; pitches are in elements, places in bytes.
struct Cut {
  int64_t rows, columns;  // of a tile
  int64_t strips, panes;  // tiles of an image
  int64_t line_pitch, plane_pitch;
  int64_t stage_pitch, stage_row;
  int64_t stage_at, weights_at;
  int64_t shared_bytes;
};

void place(const Shape& s, Cut& c) {
  const int64_t lines = stem_lines(c.rows);
  const int64_t length = (4 * c.columns + stem_halo(s.bytes)) * s.elements();
  c.line_pitch = round_up(length, 8);
  if (s.size == 2 && s.taps == Taps::kPlanes3) {
    c.line_pitch = at_least(length, 16, 32);
  } else if (s.size == 2 && s.taps == Taps::kPixels3) {
    c.line_pitch = at_least(length, 32, 64);
  }
  c.plane_pitch = lines * c.line_pitch;
  if (s.size == 2 && s.taps == Taps::kPlanes3) {
    c.plane_pitch = at_least(c.plane_pitch, 3 * c.line_pitch % 64, 64);
  }
  // Channels that four groups of lanes store are 8 words apart, modulo 32: every second one, and in
  // float32 every sixth.
  c.stage_row = row_pitch(c.columns);
  c.stage_pitch =
      s.size == 4 ? at_least(c.rows * c.stage_row, 12, 16) : at_least(c.rows * c.stage_row, 8, 32);
  c.stage_at = round_up(s.planes() * c.plane_pitch * s.size, 16);
  c.weights_at = c.stage_at + s.channel_block * c.stage_pitch * s.size;
  c.shared_bytes = c.weights_at + s.channels * 9 * s.weight_pitch * s.size;
}

// The rule: as few panes as warps can take; rows for one CTA per SM, since the rows that two tiles
// share cost more than a second CTA hides, but no more than leave shared memory for as many warps
// as registers allow.
Cut choose(const Shape& s, const Device& device) {
  Cut c{};
  c.panes = ceil_div(s.out_width, int64_t{kStemColumns} * kStemWarps);
  // Panes begin on sectors; a line is whole vectors.
  c.columns = round_up(ceil_div(s.out_width, c.panes), c.panes > 1 ? 8 : 2);
  c.panes = ceil_div(s.out_width, c.columns);
  const int64_t rows = ceil_div(s.batch * c.panes * s.out_height, device.sms);
  const int64_t ctas = kWarpsPerSm / ceil_div(c.columns, kStemColumns);
  c.rows = std::min({s.out_height, kMostRows, std::max<int64_t>(rows, 1)});
  for (;; --c.rows) {
    c.strips = ceil_div(s.out_height, c.rows);
    place(s, c);
    const int64_t each = c.shared_bytes + device.reserved_per_cta;
    if (c.rows == 1 || ctas * each <= device.shared_per_sm) break;
  }
  c.rows = ceil_div(s.out_height, c.strips);  // evenly
  place(s, c);
  return c;
}

void describe(const Shape& s, const Cut& c, DType dtype, LaunchInfo& info) {
  int64_t lines = 0, conv_rows = 0;
  for (int64_t i = 0; i < c.strips; ++i) {
    const int64_t row = i * c.rows, rows = std::min(c.rows, s.out_height - row);
    const int64_t first = 4 * row - 3;
    lines += std::min(s.height, first + stem_lines(rows)) - std::max<int64_t>(first, 0);
    conv_rows += s.size == 4 ? 2 * rows + 2 : 2 * rows + 1;
  }
  int64_t pixels = 0, groups = 0;
  for (int64_t i = 0; i < c.panes; ++i) {
    const int64_t column = i * c.columns, first = 4 * column - stem_halo(s.bytes);
    pixels += std::min(s.width, 4 * (column + c.columns)) - std::max<int64_t>(first, 0);
    groups += ceil_div(std::min(c.columns, s.out_width - column), kStemColumns);
  }
  const int64_t depth = s.size == 4 ? s.channels * 9 : s.taps == Taps::kAny ? 48 : 32;
  info.kernel = "stem";
  info.ctas = s.batch * c.strips * c.panes * s.channel_blocks();
  info.threads = kWarp * ceil_div(c.columns, kStemColumns);
  info.shared_bytes = c.shared_bytes;
  info.columns = c.rows * c.columns;
  info.resident = true;
  info.cluster = info.launches = 1;
  info.read_bytes =
      s.channel_blocks() * s.batch * s.channels * lines * pixels * (s.bytes ? 1 : s.size);
  info.written_bytes = s.batch * s.out * s.out_height * row_pitch(s.out_width) * s.size;
  info.weight_bytes =
      info.ctas * (packed_elements(s.out, s.channels * 9, dtype) * s.size + padded_rows(s.out) * 4);
  info.multiply_adds =
      s.batch * conv_rows * groups * 16 * depth * s.channel_blocks() * s.channel_block;
}

template <class T, class Act, Taps kTaps>
void run(const StepCall& call, LaunchInfo* info) {
  constexpr DType dtype = dtype_of<T>();
  const GpuStep& step = *call.step;
  const Image& image = *call.image;
  Shape s{};
  s.batch = call.batch, s.channels = step.in_channels;
  s.height = call.height, s.width = call.width;
  s.out = step.out_channels;
  const int64_t conv_height = conv3x3_extent(s.height, 2), conv_width = conv3x3_extent(s.width, 2);
  s.out_height = conv3x3_extent(conv_height, 2), s.out_width = conv3x3_extent(conv_width, 2);
  s.size = sizeof(T);
  s.taps = kTaps;
  s.bytes = image.bytes;
  s.channel_block = Convolution<T, kTaps, Act>::kChannels;
  s.weight_pitch = Convolution<T, kTaps, Act>::kWeightPitch;
  constexpr int64_t kMostExtent = int64_t{1} << 29;  // elements of a line are counted in 31 bits
  if (std::max(s.height, s.width) >= kMostExtent) {
    throw std::invalid_argument("stem: more than 2^29 rows or columns");
  }
  const Cut c = choose(s, call.device);
  const int64_t tiles = s.batch * c.strips * c.panes;
  if (tiles >= int64_t{1} << 31) throw std::invalid_argument("stem: too many images");
  if (info != nullptr) return describe(s, c, dtype, *info);

  StemParams<T> params{};
  params.in = image.map.data;
  params.weights = static_cast<const T*>(call.arrays.weights) + step.pw1_weights;
  params.bias = call.arrays.parameters + step.pw1_bias;
  params.after = {step.pw1_activation.kind, call.arrays.parameters + step.pw1_activation.slopes};
  params.out_table = call.arrays.tables + step.out_table;
  params.out = static_cast<T*>(call.out.data);
  params.out_pitch = call.out.channel;
  params.out_row = static_cast<int>(call.out.row);
  params.channels = static_cast<int>(s.channels);
  params.height = static_cast<int>(s.height), params.width = static_cast<int>(s.width);
  params.out_channels = static_cast<int>(s.out);
  params.conv_height = static_cast<int>(conv_height);
  params.conv_width = static_cast<int>(conv_width);
  params.out_height = static_cast<int>(s.out_height);
  params.out_width = static_cast<int>(s.out_width);
  params.rows = static_cast<int>(c.rows), params.columns = static_cast<int>(c.columns);
  params.strips = static_cast<int>(c.strips), params.panes = static_cast<int>(c.panes);
  params.line_pitch = static_cast<int>(c.line_pitch);
  params.plane_pitch = static_cast<int>(c.plane_pitch);
  params.stage_pitch = static_cast<int>(c.stage_pitch);
  params.stage_row = static_cast<int>(c.stage_row);
  params.stage_at = static_cast<int>(c.stage_at);
  params.weights_at = static_cast<int>(c.weights_at);
  params.channels_last = image.map.layout == Layout::kChannelsLast;
  params.bytes = image.bytes;
  const int64_t row = s.width * s.elements();
  if (image.bytes) {
    params.copy = copy_width(static_cast<const uint8_t*>(image.map.data), row);
    std::copy_n(image.scale, 4, params.scale);
    std::copy_n(image.shift, 4, params.shift);
  } else {
    params.copy = copy_width(static_cast<const T*>(image.map.data), row);
  }

  const int64_t pixels = s.batch * s.height * s.width;
  const int64_t written = s.batch * s.out * s.out_height * call.out.row * s.size;
  // Slopes are as many as biases; where there are none, no other bytes are touched than those.
  const bool slopes = params.after.kind == Activation::kPrelu;
  const std::array buffers{
      constants(params.weights, packed_elements(s.out, s.channels * 9, dtype) * s.size),
      constants(params.bias, padded_rows(s.out) * 4),
      constants(slopes ? params.after.slopes : params.bias, padded_rows(s.out) * 4),
      constants(params.out_table, s.out * 4),
      reads(params.in, pixels * s.channels * (image.bytes ? 1 : s.size)),
      updates(params.out, call.out.channels * call.out.channel * s.size, 0, written)};
  Launch config;
  config.grid_x = static_cast<uint32_t>(tiles);
  config.grid_y = static_cast<uint32_t>(s.channel_blocks());
  config.threads = static_cast<uint32_t>(kWarp * ceil_div(c.columns, kStemColumns));
  config.shared_bytes = c.shared_bytes;
  config.overlaps = call.overlaps;
  config.stream = call.stream;
  launch(config, buffers, stem_kernel<T, Act, kTaps>, params);
}

}  // namespace

void run_stem(const StepCall& call, LaunchInfo* info) {
  if (call.step->in_channels > 4) throw std::invalid_argument("stem: more than 4 channels");
  with_type(call.plan->dtype(), [&](auto zero) {
    using T = decltype(zero);
    with_class(call.step->pw1_activation, [&](auto act) {
      using Act = decltype(act);
      if (call.step->in_channels != 3) {
        run<T, Act, Taps::kAny>(call, info);
      } else if (call.image->bytes || call.image->map.layout == Layout::kChannelsLast) {
        run<T, Act, Taps::kPixels3>(call, info);
      } else {
        run<T, Act, Taps::kPlanes3>(call, info);
      }
    });
  });
}

}  // namespace snv2::SNV2_GPU
