// Launches unit_kernel, or tells how it would.
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/network.h"
#include "cuda/unit.h"
#include "cuda/unit_cut.h"

namespace snv2::SNV2_GPU {
namespace {

template <class T, int kStride>
void describe(const UnitParams<T>& params, const Shape& s, const Cut& c, LaunchInfo& info) {
  info.kernel = kStride == 1 ? "unit stride 1" : "unit stride 2";
  info.ctas = c.ctas * s.branches() * c.cluster;
  info.cluster = c.cluster;
  info.threads = kUnitThreads;
  info.shared_bytes = c.shared_bytes;
  info.columns = c.columns;
  info.resident = c.weights != Weights::kDirect;
  info.launches = 1;
  int64_t in_pixels = 0;
  int64_t steps = 0;
  for (int64_t row = 0; row < s.rows(); row += c.rows_per_cta) {
    const int64_t end = std::min(row + c.rows_per_cta, s.rows());
    const int height = static_cast<int>(s.height), out_height = static_cast<int>(s.out_height);
    const int64_t first = first_row<kStride>(static_cast<int>(row), height, out_height);
    const int64_t last = rows_needed<kStride>(static_cast<int>(end), height, out_height);
    const int64_t pixels = round_up(last * s.width - first * s.width / s.sector * s.sector, kBlock);
    in_pixels += pixels;
    steps += ceil_div(pixels, c.columns);
  }
  const int64_t out_pixels = s.rows() * s.out_width;
  info.read_bytes = in_pixels * s.in * s.size * s.branches();
  info.written_bytes = out_pixels * (params.out != nullptr ? s.out + s.proj : 0) * s.size;
  if (params.result != nullptr) {
    info.read_bytes += out_pixels * (params.result_channels - s.out - s.proj) * s.size;
    info.written_bytes += out_pixels * params.result_channels * s.size;
  }
  const int64_t passes = info.resident ? c.ctas : steps;
  const DType dtype = dtype_of<T>();
  const int64_t matrices = packed_elements(s.mid, s.in, dtype) +
                           packed_elements(s.out, s.mid, dtype) +
                           packed_elements(s.proj, s.in, dtype);
  const int64_t words = (s.mid + (s.proj > 0 ? s.in : 0)) * kDepthwiseFloats + padded_rows(s.mid) +
                        padded_rows(s.out) + padded_rows(s.proj);
  info.weight_bytes = matrices * s.size * passes + words * 4 * c.ctas;
  info.multiply_adds = in_pixels * padded_rows(s.mid) * padded_depth(s.in, dtype) +
                       out_pixels * (9 * (s.mid + (s.proj > 0 ? s.in : 0)) +
                                     padded_rows(s.out) * padded_depth(s.mid, dtype) +
                                     padded_rows(s.proj) * padded_depth(s.in, dtype));
}

template <class T, int kStride, class Act>
void run(const StepCall& call, LaunchInfo* info) {
  const GpuStep& step = *call.step;
  const DType dtype = dtype_of<T>();
  Shape s{};
  s.in = step.in_channels, s.mid = step.mid_channels;
  s.proj = step.proj_channels, s.out = step.out_channels;
  s.batch = call.batch, s.height = call.height, s.width = call.width;
  s.out_height = conv3x3_extent(s.height, kStride), s.out_width = conv3x3_extent(s.width, kStride);
  s.in_planes = step.in_buffer != kCallersMap;
  s.result = call.result.data != nullptr;
  s.size = sizeof(T), s.sector = kSectorPixels<T>;

  if (s.batch * (s.height + 2) >= int64_t{1} << 31) {
    throw std::invalid_argument("x: more than 2^31 rows");
  }

  const auto weights = [&](int64_t at) { return static_cast<const T*>(call.arrays.weights) + at; };
  const auto parameters = [&](int64_t at) { return call.arrays.parameters + at; };
  const auto table = [&](int64_t at) { return call.arrays.tables + at; };
  UnitParams<T> params{};
  params.in = static_cast<const T*>(call.in.data);
  params.in_channel = call.in.channel;
  params.in_image = call.in.image;
  params.in_pixel = call.in.pixel;
  params.in_planes = s.in_planes;
  params.out = static_cast<T*>(call.out.data);
  params.out_pitch = call.out.channel;
  params.result = static_cast<T*>(call.result.data);
  params.result_channel = call.result.channel;
  params.result_image = call.result.image;
  params.result_pixel = call.result.pixel;
  params.in_table = table(step.in_table);
  params.result_table = table(step.result_table);
  params.in_channels = static_cast<int>(s.in);
  params.result_channels = static_cast<int>(step.result_channels);
  params.batch = static_cast<int>(s.batch);
  params.height = static_cast<int>(s.height);
  params.width = static_cast<int>(s.width);
  params.out_height = static_cast<int>(s.out_height);
  params.out_width = static_cast<int>(s.out_width);
  Branch<T>& main = params.branches[0];
  main.pw1 = weights(step.pw1_weights);
  main.pw2 = weights(step.pw2_weights);
  main.pw1_bias = parameters(step.pw1_bias);
  main.pw2_bias = parameters(step.pw2_bias);
  main.dw = parameters(step.dw);
  main.out_table = table(step.out_table + s.proj);
  main.mid = static_cast<int>(s.mid);
  main.out = static_cast<int>(s.out);
  main.depth = main.mid;
  main.first_result = static_cast<int>(s.proj);
  Branch<T>& projection = params.branches[1];
  if (s.proj > 0) {
    projection.pw2 = weights(step.proj_weights);
    projection.pw2_bias = parameters(step.proj_bias);
    projection.dw = parameters(step.proj_dw);
    projection.out_table = table(step.out_table);
    projection.mid = static_cast<int>(s.in);
    projection.out = static_cast<int>(s.proj);
    projection.depth = projection.mid;
  }

  const Cut& c = remembered<T, kStride>(s, call.device);
  main.at = c.places[0];
  projection.at = c.places[1];
  params.columns = static_cast<int>(c.columns);
  params.ring = static_cast<int>(c.ring);
  params.step_rows = static_cast<int>(c.step_rows);
  params.rows_per_cta = static_cast<int>(c.rows_per_cta);
  params.cluster = static_cast<int>(c.cluster);
  params.prefetch = c.prefetch;
  params.by_blocks = Divisor(c.columns / kBlock);
  if (info != nullptr) return describe<T, kStride>(params, s, c, *info);

  // What is touched, and at least how much of it.
  std::vector<Buffer> buffers;
  const auto constant = [&](const void* data, int64_t bytes) {
    if (bytes > 0) buffers.push_back(constants(data, bytes));
  };
  constant(main.pw1, packed_elements(s.mid, s.in, dtype) * s.size);
  constant(main.pw2, packed_elements(s.out, s.mid, dtype) * s.size);
  constant(projection.pw2, packed_elements(s.proj, s.in, dtype) * s.size);
  constant(main.pw1_bias, padded_rows(s.mid) * 4);
  constant(main.pw2_bias, padded_rows(s.out) * 4);
  constant(projection.pw2_bias, padded_rows(s.proj) * 4);
  constant(main.dw, s.mid * kDepthwiseFloats * 4);
  constant(projection.dw, (s.proj > 0 ? s.in : 0) * kDepthwiseFloats * 4);
  constant(params.in_table, s.in * 4);
  constant(table(step.out_table), (s.proj + s.out) * 4);
  const int64_t read = s.in * s.batch * s.height * s.width * s.size;
  const int64_t written = (s.proj + s.out) * s.rows() * s.out_width * s.size;
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
  if (call.out.data != nullptr) {
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
  config.threads = kUnitThreads;
  config.cluster = static_cast<uint32_t>(c.cluster);
  config.shared_bytes = c.shared_bytes;
  config.overlaps = call.overlaps;
  config.stream = call.stream;
  const auto start = [&](auto mode) {
    using Mode = decltype(mode);
    if (s.caller()) {
      launch(config, buffers, unit_kernel<T, kStride, Mode, Act, true>, params);
    } else {
      launch(config, buffers, unit_kernel<T, kStride, Mode, Act, false>, params);
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

}  // namespace

void run_unit(const StepCall& call, LaunchInfo* info) {
  const GpuStep& s = *call.step;
  const auto relu = [&](const GpuActivation& act, const char* what) {
    require_kernel(act.kind == Activation::kRelu, call, what);
  };
  relu(s.pw1_activation, "pw1_activation");
  relu(s.pw2_activation, "pw2_activation");
  require_kernel(s.dw_activation.kind == Activation::kIdentity, call, "dw_activation");
  require_kernel(s.dw_window.window == 3 && s.dw_window.dilation == 1, call, "dw_window");
  if (s.proj_channels > 0) {
    relu(s.proj_activation, "proj_activation");
    require_kernel(s.proj_dw_activation.kind == Activation::kIdentity, call, "proj_dw_activation");
    require_kernel(s.proj_dw_window.window == 3 && s.proj_dw_window.dilation == 1, call,
                   "proj_dw_window");
  }
  with_type(call.plan->dtype(), [&](auto zero) {
    using T = decltype(zero);
    if (s.stride == 1) {
      run<T, 1, Relu>(call, info);
    } else {
      run<T, 2, Relu>(call, info);
    }
  });
}

}  // namespace snv2::SNV2_GPU
