// Launches unit_kernel or piece_kernel, or tells how it would. unit.cu, unit_any.cu and
// unit_piece.cu compile them.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cuda/network.h"
#include "cuda/unit.h"
#include "cuda/unit_cut.h"

namespace snv2::SNV2_GPU {

// Units with any activations and windows, by kernels that look them up as they run.
void run_any_unit(const StepCall& call, LaunchInfo* info);
// Those without all parts.
void run_piece(const StepCall& call, LaunchInfo* info);

// Neighbouring pixels of a row that can be moved at once, wherever the row is.
template <class T>
int64_t pixels_at_once(const MapView& map, int64_t width) {
  for (const int64_t count : {4, 2}) {
    const auto whole = [&](int64_t elements) { return elements % count == 0; };
    if (map.pixel == 1 && whole(width) && whole(map.row) && whole(map.channel) &&
        whole(map.image) && reinterpret_cast<uintptr_t>(map.data) % (count * sizeof(T)) == 0) {
      return count;
    }
  }
  return 1;
}

// Whether an even channel of each pixel and the next one are an aligned word.
template <class T>
bool pairs_of_channels(const MapView& map) {
  return map.channel == 1 && map.pixel % 2 == 0 && map.row % 2 == 0 && map.image % 2 == 0 &&
         reinterpret_cast<uintptr_t>(map.data) % (2 * sizeof(T)) == 0;
}

// Elements of the caller's tensor that a lane moves at once.
template <class T>
int64_t elements_at_once(const MapView& map, int64_t width) {
  const int64_t square = sizeof(T) == 2 && pairs_of_channels<T>(map) ? 4 : 1;
  return std::max(pixels_at_once<T>(map, width), square);
}

template <class T, int kStride>
void describe_unit(const UnitParams<T>& params, const Shape& s, const Cut& c, const Device& device,
                   LaunchInfo& info) {
  const char* const names[2][2] = {{"piece stride 1", "piece stride 2"},
                                   {"unit stride 1", "unit stride 2"}};
  info.kernel = names[s.expand && s.project][kStride - 1];
  info.ctas = c.ctas * s.branches() * c.cluster;
  info.cluster = c.cluster;
  info.threads = c.threads;
  info.shared_bytes = c.shared_bytes;
  info.columns = c.columns;
  info.resident = c.weights != Weights::kDirect;
  info.launches = 1;
  int64_t in_rows = 0;
  int64_t steps = 0;
  const int64_t stretch = stretch_rows(s, c.columns);
  for (int64_t row = 0; row < s.rows(); row += c.rows_per_cta) {
    const int64_t end = std::min(row + c.rows_per_cta, s.rows());
    const int reach = static_cast<int>(s.reach);
    const int64_t first = params.heights.template first<kStride>(static_cast<int>(row), reach);
    const int64_t last = params.heights.template needed<kStride>(static_cast<int>(end), reach);
    in_rows += last - first;
    steps += ceil_div(last - first, stretch) * ceil_div(stretch * s.row, c.columns);
  }
  const int64_t in_pixels = in_rows * s.row, out_pixels = s.rows() * s.out_row;
  info.read_bytes = in_rows * (s.in_planes ? s.row : s.width) * s.in * s.size * s.branches();
  info.written_bytes = out_pixels * (params.out != nullptr ? s.out + s.proj : 0) * s.size;
  if (params.result != nullptr) {
    const int64_t pixels = s.rows() * s.out_width;
    info.read_bytes += pixels * (params.result_channels - s.out - s.proj) * s.size;
    info.written_bytes += pixels * params.result_channels * s.size;
  }
  const int64_t passes = info.resident ? c.ctas : steps;
  const DType dtype = dtype_of<T>();
  const int64_t pw1 = s.expand ? packed_elements(s.mid, s.in, dtype) : 0;
  const int64_t pw2 = s.project ? packed_elements(s.out, s.mid, dtype) : 0;
  const int64_t proj = packed_elements(s.proj, s.in, dtype);
  const int64_t dw_words = s.mid * s.dw_floats[0] + (s.proj > 0 ? s.in : 0) * s.dw_floats[1];
  const int64_t words = dw_words + (s.expand ? padded_rows(s.mid) : 0) +
                        (s.project ? padded_rows(s.out) : 0) + padded_rows(s.proj);
  info.weight_bytes = (pw1 + pw2 + proj) * s.size * passes + words * 4 * c.ctas;
  const int64_t shifts = (s.dw_floats[0] > 0 ? s.mid : 0) + (s.proj > 0 ? s.in : 0);
  info.multiply_adds = in_pixels * pw1 + out_pixels * (dw_words - shifts + pw2 + proj);
  const Cost cost = cost_of<T, kStride>(s, device, c);
  info.instructions = static_cast<int64_t>(cost.instructions);
  info.cycles = static_cast<int64_t>(cost.chain);
}

// kPiece: piece_kernel, whose Act is AnyActivation.
template <class T, int kStride, class Act, bool kPiece = false>
void launch_unit(const StepCall& call, LaunchInfo* info) {
  const GpuStep& step = *call.step;
  const DType dtype = dtype_of<T>();
  Shape s{};
  s.in = step.in_channels, s.mid = step.mid_channels;
  s.proj = step.proj_channels, s.out = step.out_channels;
  s.batch = call.batch, s.height = call.height, s.width = call.width;
  s.out_height = conv3x3_extent(s.height, kStride), s.out_width = conv3x3_extent(s.width, kStride);
  s.row = row_pitch(s.width), s.out_row = row_pitch(s.out_width);
  s.in_planes = step.in_buffer != kCallersMap;
  s.result = call.result.data != nullptr;
  s.size = sizeof(T);
  s.dw_floats[0] = depthwise_floats(step.dw_window.window);
  s.dw_floats[1] = depthwise_floats(step.proj_dw_window.window);
  s.any = Act::kAny;
  s.expand = (step.parts & kExpand) != 0;
  s.project = (step.parts & kProject) != 0;
  s.reach = std::max(step.dw_window.reach(), step.proj_dw_window.reach());
  const int64_t in_vector = elements_at_once<T>(call.in, s.width);
  const int64_t out_vector = s.result ? elements_at_once<T>(call.result, s.out_width) : in_vector;
  s.vector = std::min(in_vector, out_vector);
  s.passed = s.result ? step.result_channels - s.out - s.proj : 0;

  if (s.batch * (s.height + 2) >= int64_t{1} << 31) {
    throw std::invalid_argument("x: more than 2^31 rows");
  }
  const bool keeps = call.out.data != nullptr;  // planes, whose table there is

  const auto weights = [&](int64_t at) { return static_cast<const T*>(call.arrays.weights) + at; };
  const auto parameters = [&](int64_t at) { return call.arrays.parameters + at; };
  const auto table = [&](int64_t at) { return call.arrays.tables + at; };
  const auto after = [&](const GpuActivation& act) {
    return After{act.kind, parameters(act.slopes)};
  };
  UnitParams<T> params{};
  params.in = static_cast<const T*>(call.in.data);
  params.in_channel = call.in.channel;
  params.in_image = call.in.image;
  params.in_row = call.in.row;
  params.in_pixel = call.in.pixel;
  params.in_planes = s.in_planes;
  params.out = static_cast<T*>(call.out.data);
  params.out_pitch = call.out.channel;
  params.result = static_cast<T*>(call.result.data);
  params.result_channel = call.result.channel;
  params.result_image = call.result.image;
  params.result_row = call.result.row;
  params.result_pixel = call.result.pixel;
  params.in_vector = static_cast<int>(pixels_at_once<T>(call.in, s.width));
  params.in_pairs = pairs_of_channels<T>(call.in);
  if (s.result) {
    // What passes through has the same pixels.
    const auto vector = static_cast<int>(pixels_at_once<T>(call.result, s.out_width));
    params.result_vector = std::min(vector, params.in_vector);
    params.result_pairs = pairs_of_channels<T>(call.result);
  }
  params.in_table = table(step.in_table);
  params.result_table = table(step.result_table);
  params.in_channels = static_cast<int>(s.in);
  params.result_channels = static_cast<int>(step.result_channels);
  params.batch = static_cast<int>(s.batch);
  params.heights = Heights(s.height, s.out_height);
  params.width = static_cast<int>(s.width);
  params.out_width = static_cast<int>(s.out_width);
  params.row = static_cast<int>(s.row);
  params.out_row = static_cast<int>(s.out_row);
  Branch<T>& main = params.branches[0];
  main.pw1 = s.expand ? weights(step.pw1_weights) : nullptr;
  main.pw2 = s.project ? weights(step.pw2_weights) : nullptr;
  main.pw1_bias = parameters(step.pw1_bias);
  main.pw2_bias = parameters(step.pw2_bias);
  main.dw = parameters(step.dw);
  main.pw1_after = after(step.pw1_activation);
  main.dw_after = after(step.dw_activation);
  main.pw2_after = after(step.pw2_activation);
  main.window = static_cast<int>(step.dw_window.window);
  main.dilation = static_cast<int>(step.dw_window.dilation);
  main.out_table = table(step.out_table + (keeps ? s.proj : 0));
  main.mid = static_cast<int>(s.mid);
  main.out = static_cast<int>(s.out);
  main.depth = main.mid;
  main.first_result = static_cast<int>(s.proj);
  Branch<T>& projection = params.branches[1];
  if (s.proj > 0) {
    projection.pw2 = weights(step.proj_weights);
    projection.pw2_bias = parameters(step.proj_bias);
    projection.dw = parameters(step.proj_dw);
    projection.dw_after = after(step.proj_dw_activation);
    projection.pw2_after = after(step.proj_activation);
    projection.window = static_cast<int>(step.proj_dw_window.window);
    projection.dilation = static_cast<int>(step.proj_dw_window.dilation);
    projection.out_table = table(step.out_table);
    projection.mid = static_cast<int>(s.in);
    projection.out = static_cast<int>(s.proj);
    projection.depth = projection.mid;
  }

  const Cut& c = remembered<T, kStride>(s, call.device);
  if (c.ctas * c.cluster > kMaxGrid) throw std::invalid_argument("x: too many rows for a unit");
  main.at = c.places[0];
  projection.at = c.places[1];
  params.columns = static_cast<int>(c.columns);
  params.stretch_rows = static_cast<int>(stretch_rows(s, c.columns));
  params.stretch = params.stretch_rows * params.row;
  params.ring = static_cast<int>(c.ring);
  params.step_rows = static_cast<int>(c.step_rows);
  params.rows_per_cta = static_cast<int>(c.rows_per_cta);
  params.cluster = static_cast<int>(c.cluster);
  while ((1 << params.cluster_log2) < params.cluster) ++params.cluster_log2;
  params.prefetch = c.prefetch;
  params.by_quads = Divisor(quads_of(c.columns / kBlock));
  params.by_row = Divisor(s.row);
  params.by_stretch = Divisor(params.stretch);
  params.by_out_row = Divisor(s.out_row);
  for (Branch<T>& branch : params.branches) {
    const int64_t groups = ceil_div(share_rows(branch.mid, c.cluster), kGroupChannels<T>);
    branch.groups = static_cast<int>(groups);
    branch.by_groups = Divisor(std::max<int64_t>(groups, 1));
  }
  params.reach = static_cast<int>(s.reach);
  if (info != nullptr) return describe_unit<T, kStride>(params, s, c, call.device, *info);

  // What is touched, and at least how much of it.
  std::vector<Buffer> buffers;
  const auto constant = [&](const void* data, int64_t bytes) {
    if (bytes > 0) buffers.push_back(constants(data, bytes));
  };
  constant(main.pw1, s.expand ? packed_elements(s.mid, s.in, dtype) * s.size : 0);
  constant(main.pw2, s.project ? packed_elements(s.out, s.mid, dtype) * s.size : 0);
  constant(projection.pw2, packed_elements(s.proj, s.in, dtype) * s.size);
  constant(main.pw1_bias, s.expand ? padded_rows(s.mid) * 4 : 0);
  constant(main.pw2_bias, s.project ? padded_rows(s.out) * 4 : 0);
  constant(projection.pw2_bias, padded_rows(s.proj) * 4);
  constant(main.dw, s.mid * s.dw_floats[0] * 4);
  constant(projection.dw, (s.proj > 0 ? s.in : 0) * s.dw_floats[1] * 4);
  const auto slopes = [&](const After& layer, int64_t rows) {
    constant(layer.slopes, layer.kind == Activation::kPrelu ? padded_rows(rows) * 4 : 0);
  };
  slopes(main.pw1_after, s.mid);
  slopes(main.dw_after, s.mid);
  slopes(main.pw2_after, s.out);
  slopes(projection.dw_after, s.in);
  slopes(projection.pw2_after, s.proj);
  constant(params.in_table, s.in * 4);
  constant(table(step.out_table), keeps ? (s.proj + s.out) * 4 : 0);
  const int64_t read = s.in * s.batch * s.height * s.row * s.size;
  const int64_t written = (s.proj + s.out) * s.rows() * s.out_row * s.size;
  const auto bytes_of = [&](const MapView& planes) {
    return planes.channels * planes.channel * s.size;
  };
  const bool in_place = params.in_planes && call.out.data == call.in.data;
  if (!params.in_planes) {
    buffers.push_back(
        reads(call.in.data, call.in.channels * s.batch * s.height * s.width * s.size));
  } else if (!in_place) {
    buffers.push_back(updates(call.in.data, bytes_of(call.in), read, 0));
  }
  if (keeps) {
    buffers.push_back(updates(call.out.data, bytes_of(call.out), in_place ? read : 0, written));
  }
  if (call.result.data != nullptr) {
    constant(params.result_table, step.result_channels * 4);
    buffers.push_back(
        writes(call.result.data, step.result_channels * s.rows() * s.out_width * s.size));
  }

  Launch config;
  config.grid_x = static_cast<uint32_t>(c.ctas * c.cluster);
  config.grid_y = static_cast<uint32_t>(s.branches());
  config.threads = static_cast<uint32_t>(c.threads);
  config.cluster = static_cast<uint32_t>(c.cluster);
  config.shared_bytes = c.shared_bytes;
  config.overlaps = call.overlaps;
  config.stream = call.stream;
  const auto start = [&](auto mode) {
    using Mode = decltype(mode);
    if constexpr (kPiece) {
      constexpr bool kNarrow = std::is_same_v<Mode, Resident> && sizeof(T) == 4;
      using First = std::conditional_t<kNarrow, ResidentNarrow, Mode>;
      launch(
          config, buffers,
          s.expand ? piece_kernel<T, kStride, First, false> : piece_kernel<T, kStride, Mode, true>,
          params);
    } else {
      constexpr bool kNarrow = Act::kAny && std::is_same_v<Mode, Resident> && sizeof(T) == 4;
      using Own = std::conditional_t<kNarrow, ResidentNarrow, Mode>;
      launch(config, buffers,
             s.caller() ? unit_kernel<T, kStride, Own, Act, true>
                        : unit_kernel<T, kStride, Own, Act, false>,
             params);
    }
  };
  switch (c.weights) {
    case Weights::kResident:
      return start(Resident{});
    case Weights::kDirect:
      return start(Direct<T, kStride>{});
    case Weights::kClustered:
      return start(Clustered{});
  }
}

}  // namespace snv2::SNV2_GPU
