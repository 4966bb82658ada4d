// Chooses how the head is cut, and launches its kernels.
//
// All candidates are measured by the bytes that the busiest SM asks L2 for: products of few images
// are bound by that, and those of many take the largest blocks by it, as they should.
#include <algorithm>
#include <array>
#include <stdexcept>

#include "cuda/dispatch.h"
#include "cuda/head.h"
#include "cuda/network.h"

namespace snv2::SNV2_GPU {
namespace {

constexpr int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

uint32_t grid_of(int64_t ctas) {
  if (ctas > kMaxGrid) throw std::invalid_argument("head: too many images");
  return static_cast<uint32_t>(ctas);
}

// Features --------------------------------------------------------------------------------------

constexpr int64_t kAtOnce = 64 * 1024;  // all channels are loaded at once if they take no more
constexpr int64_t kMostChunk = 256;     // bytes of a column of a stage

struct FeaturesShape {
  int64_t batch, plane, depth, features, size;
  int64_t most_blocks;
};

struct FeaturesCut {
  int64_t tiles, parts, groups, images;  // see head.h
  int64_t rows;                          // of a CTA
  int64_t blocks, rounds;
  int64_t row_blocks, ctas;
  int64_t chunk, pitch;
  int64_t stage_bytes, sums_at, table_at, shared_bytes;
};

FeaturesCut choose(const FeaturesShape& s, const Device& device) {
  constexpr int64_t kCandidates[][3] = {{2, 1, 2}, {2, 1, 1}, {2, 2, 1}, {2, 4, 1}, {1, 4, 1}};
  FeaturesCut best{};
  int64_t least = 0;
  int64_t most = 1;
  while (most < s.batch && (most + 1) * s.plane <= s.most_blocks * kBlock) ++most;
  for (int64_t images = most; images >= 1; images /= 2) {
    const int64_t columns = images * s.plane;
    for (const auto& [tiles, parts, groups] : kCandidates) {
      FeaturesCut c{};
      c.tiles = tiles, c.parts = parts, c.groups = groups, c.images = images;
      c.rows = kFeatureWarps / parts * tiles * kTileRows;
      c.rounds = ceil_div(columns, s.most_blocks * kBlock);
      c.blocks = std::min(columns / kBlock, s.most_blocks);
      c.row_blocks = ceil_div(s.features, c.rows);
      c.ctas = c.row_blocks * ceil_div(s.batch, images * groups);
      const int64_t bytes = (groups * columns + c.rounds * c.rows) * s.depth * s.size;
      const int64_t cost = ceil_div(c.ctas, device.sms) * bytes;
      if (best.ctas == 0 || cost < least) best = c, least = cost;
    }
  }
  return best;
}

void place(const FeaturesShape& s, const Device& device, int64_t tile_depth, FeaturesCut& c) {
  c.pitch = shared_pitch(c.blocks * kBlock);
  const int64_t all = round_up(s.depth, tile_depth), row = c.pitch * s.size;
  const int64_t sums =
      (c.parts - 1) * (kFeatureWarps / c.parts) * c.tiles * s.most_blocks * 4 * kWarp * 4;
  const int64_t most = c.tiles == 2 ? 2 / c.groups : 3;  // CTAs of an SM, by registers
  const int64_t ctas = std::clamp<int64_t>(ceil_div(c.ctas, device.sms), 1, most);
  const int64_t room =
      std::min(device.shared_per_cta, device.shared_per_sm / ctas - device.reserved_per_cta) -
      sums - round_up(s.depth * 4, 16);
  c.chunk = all;
  if (c.groups * all * row > kAtOnce || c.rounds > 1 || c.groups * all * row > room) {
    const int64_t fit = room / (2 * c.groups * row) / tile_depth * tile_depth;
    c.chunk = std::clamp(fit, tile_depth, std::min(kMostChunk / s.size, all));
  }
  c.stage_bytes = c.chunk * row;
  const bool once = c.chunk == all && c.rounds == 1;
  c.sums_at = (once ? 1 : 2) * c.groups * c.stage_bytes;
  c.table_at = c.sums_at + sums;
  c.shared_bytes = c.table_at + s.depth * 4;
  if (c.shared_bytes > device.shared_per_cta) {
    throw std::invalid_argument("head: too many channels for the shared memory of this device");
  }
}

template <class T, class Act>
void features(const StepCall& call, LaunchInfo* info) {
  constexpr DType dtype = dtype_of<T>();
  const GpuStep& step = *call.step;
  const FeaturesShape s{call.batch,        call.in.image, step.in_channels,
                        step.mid_channels, sizeof(T),     kFeatureBlocks<T>};
  if (s.plane >= int64_t{1} << 30) throw std::invalid_argument("head: images are too large");
  FeaturesCut c = choose(s, call.device);
  place(s, call.device, kTileDepth<T>, c);
  const int64_t products = c.row_blocks * ceil_div(s.batch, c.images);  // of a group
  if (info != nullptr) {
    info->kernel = "features";
    info->ctas = c.ctas;
    info->threads = c.groups * kFeatureThreads;
    info->shared_bytes = c.shared_bytes;
    info->columns = c.blocks * kBlock;
    info->resident = false;
    info->cluster = info->launches = 1;
    info->read_bytes = products * c.rounds * c.blocks * kBlock * s.depth * s.size;
    info->written_bytes = s.batch * s.features * s.size;
    info->weight_bytes = c.ctas / c.row_blocks *
                             (c.rounds * packed_elements(s.features, s.depth, dtype) * s.size +
                              padded_rows(s.features) * 4) +
                         c.ctas * s.depth * 4;
    info->multiply_adds = products * c.rows * c.rounds * round_up(c.blocks, s.size == 4 ? 1 : 2) *
                          kBlock * round_up(s.depth, kTileDepth<T>);
    return;
  }

  FeaturesParams<T> params{};
  params.in = static_cast<const T*>(call.in.data);
  params.in_table = call.arrays.tables + step.in_table;
  params.weights = static_cast<const T*>(call.arrays.weights) + step.pw1_weights;
  params.bias = call.arrays.parameters + step.pw1_bias;
  params.after = {step.pw1_activation.kind, call.arrays.parameters + step.pw1_activation.slopes};
  params.out = static_cast<T*>(call.features);
  params.in_pitch = call.in.channel;
  params.batch = s.batch;
  params.plane = static_cast<int>(s.plane);
  params.width = static_cast<int>(call.width);
  params.row = static_cast<int>(call.in.row);
  params.pixels = static_cast<float>(call.height * call.width);
  params.depth = static_cast<int>(s.depth);
  params.features = static_cast<int>(s.features);
  params.row_blocks = static_cast<int>(c.row_blocks);
  params.images = static_cast<int>(c.images);
  params.parts = static_cast<int>(c.parts);
  params.blocks = static_cast<int>(c.blocks);
  params.rounds = static_cast<int>(c.rounds);
  params.chunk = static_cast<int>(c.chunk);
  params.pitch = static_cast<int>(c.pitch);
  params.stage_bytes = static_cast<int>(c.stage_bytes);
  params.sums_at = static_cast<int>(c.sums_at);
  params.table_at = static_cast<int>(c.table_at);

  const bool slopes = params.after.kind == Activation::kPrelu;  // as many as biases
  const std::array buffers{
      constants(params.in_table, s.depth * 4),
      constants(params.weights, packed_elements(s.features, s.depth, dtype) * s.size),
      constants(params.bias, padded_rows(s.features) * 4),
      constants(slopes ? params.after.slopes : params.bias, padded_rows(s.features) * 4),
      updates(call.in.data, call.in.channels * call.in.channel * s.size,
              s.depth * s.batch * s.plane * s.size, 0),
      writes(params.out, s.batch * s.features * s.size)};
  Launch config;
  config.grid_x = grid_of(c.ctas);
  config.threads = static_cast<uint32_t>(c.groups * kFeatureThreads);
  config.shared_bytes = c.shared_bytes;
  config.overlaps = call.overlaps;
  config.stream = call.stream;
  launch(config, buffers, c.tiles == 2 ? features_kernel<T, Act, 2> : features_kernel<T, Act, 1>,
         params);
}

// Linear ----------------------------------------------------------------------------------------

struct LinearCut {
  int64_t images, row_blocks, groups;
  int64_t shared_bytes;
};

template <class T, class Shape>
LinearCut cut_linear(int64_t batch, int64_t depth, int64_t classes, const Device& device) {
  constexpr int64_t kRows = Shape::kTiles * kTileRows, kMost = Shape::kBlocks * kBlock;
  LinearCut best{};
  int64_t least = 0;
  for (int64_t images = std::min(kMost, round_up(batch, kBlock)); images >= kBlock;
       images -= kBlock) {
    LinearCut c{images, ceil_div(classes, kRows), ceil_div(batch, images), 0};
    const int64_t cost = ceil_div(c.row_blocks * c.groups, device.sms) * (images + kRows);
    if (best.images == 0 || cost < least) best = c, least = cost;
  }
  const int64_t stages = depth > kLinearChunk<T, Shape> ? 2 : 1;
  const int64_t sums = int64_t{kLinearWarps} * Shape::kTiles * Shape::kBlocks * 4 * kWarp * 4;
  best.shared_bytes = std::max<int64_t>(
      stages * best.images * kLinearPitch<T, Shape> * static_cast<int64_t>(sizeof(T)), sums);
  return best;
}

template <class T, class Shape>
void linear(const StepCall& call, LaunchInfo* info) {
  constexpr DType dtype = dtype_of<T>();
  constexpr int64_t kSize = sizeof(T);
  const GpuStep& step = *call.step;
  const int64_t depth = step.mid_channels, classes = step.out_channels;
  const LinearCut c = cut_linear<T, Shape>(call.batch, depth, classes, call.device);
  const int64_t weight_bytes = packed_elements(classes, depth, dtype) * kSize;
  const int64_t ctas = c.row_blocks * c.groups;
  if (info != nullptr) {
    info->kernel = "linear";
    info->ctas = ctas;
    info->threads = kLinearThreads;
    info->shared_bytes = c.shared_bytes;
    info->columns = c.images;
    info->resident = true;
    info->cluster = info->launches = 1;
    info->read_bytes = c.row_blocks * call.batch * depth * kSize;
    info->written_bytes = call.batch * classes * kSize;
    info->weight_bytes = c.groups * (weight_bytes + classes * 4);
    info->multiply_adds = ctas * Shape::kTiles * kTileRows *
                          round_up(c.images, kSize == 4 ? kBlock : 2 * kBlock) *
                          padded_depth(depth, dtype);
    return;
  }

  LinearParams<T> params{};
  params.in = static_cast<const T*>(call.features);
  params.weights = static_cast<const T*>(call.arrays.weights) + step.pw2_weights;
  params.bias = call.arrays.parameters + step.pw2_bias;
  params.out = static_cast<T*>(call.result.data);
  params.out_image = call.result.image;
  params.out_class = call.result.channel;
  params.batch = call.batch;
  params.depth = static_cast<int>(depth);
  params.classes = static_cast<int>(classes);
  params.row_blocks = static_cast<int>(c.row_blocks);
  params.images = static_cast<int>(c.images);
  params.copy = copy_width(params.in, depth);
  const std::array buffers{constants(params.weights, weight_bytes),
                           constants(params.bias, padded_rows(classes) * 4),
                           reads(params.in, call.batch * depth * kSize),
                           writes(params.out, call.batch * classes * kSize)};
  Launch config;
  config.grid_x = grid_of(ctas);
  config.threads = kLinearThreads;
  config.shared_bytes = c.shared_bytes;
  config.overlaps = call.overlaps;
  config.stream = call.stream;
  launch(config, buffers, linear_kernel<T, Shape>, params);
}

}  // namespace

void run_features(const StepCall& call, LaunchInfo* info) {
  with_type(call.plan->dtype(), [&](auto zero) {
    with_class(call.step->pw1_activation,
               [&](auto act) { features<decltype(zero), decltype(act)>(call, info); });
  });
}

void run_linear(const StepCall& call, LaunchInfo* info) {
  with_type(call.plan->dtype(), [&](auto zero) {
    using T = decltype(zero);
    if (call.batch <= FewImages::kBlocks * kBlock) {
      linear<T, FewImages>(call, info);
    } else {
      linear<T, ManyImages<T>>(call, info);
    }
  });
}

}  // namespace snv2::SNV2_GPU
