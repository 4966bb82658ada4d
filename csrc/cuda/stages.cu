// Launches stages_kernel, or tells how it would.
#include <algorithm>
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/stages.h"
#include "cuda/stages_cut.h"

namespace snv2::SNV2_GPU {
namespace {

constexpr int64_t kMostImages = 65535;  // of a grid along y

template <class T>
int64_t stages_of(const StepCall& call, LaunchInfo* info, bool launches) {
  const GpuStep* const first = call.step;
  const GpuStep* const end = call.plan->end();
  const Device& device = call.device;
  if (device.tuning.stages == 1 || device.cluster < 2) return 0;
  if (!is_staged_unit(*first) || first->stride != 2 || call.batch > kMostImages) return 0;
  // As many units as fit, up to a step that reads all.
  StagesParams<T> params{};
  StagesCut cut;
  for (const GpuStep* step = first + 1; step < end; ++step) {
    // While a cluster writes, others read.
    if (reads_all(*step) && step[-1].out_buffer != first->in_buffer) {
      StagesParams<T> longer{};
      const StagesCut more =
          cut_stages(longer, first, step - first, call.in.channels, call.height, call.width,
                     std::min<int64_t>(device.cluster, 8), device.shared_per_cta);
      if (more.steps == 0) break;
      cut = more;
      params = longer;
    }
    if (!is_staged_unit(*step)) break;
  }
  if (cut.steps == 0 || device.tuning.stages != 2) return 0;
  if (!launches) return cut.steps;

  params.weights = static_cast<const T*>(call.arrays.weights);
  params.parameters = call.arrays.parameters;
  params.tables = call.arrays.tables;
  params.in = static_cast<const T*>(call.in.data);
  params.in_pitch = call.in.channel;
  params.in_image = call.in.image;
  params.out = static_cast<T*>(call.out.data);
  params.out_pitch = call.out.channel;
  params.out_image = call.out.image;

  const StagedMap& last = params.maps[params.unit[params.units - 1].out];
  if (info != nullptr) {
    info->kernel = "stages";
    info->ctas = cut.cluster * call.batch;
    info->cluster = cut.cluster;
    info->threads = kStagesThreads;
    info->shared_bytes = cut.shared_bytes;
    info->columns = last.columns();
    info->launches = 1;
    return cut.steps;
  }

  std::vector<Buffer> buffers;
  const auto constant = [&](const void* data, int64_t bytes) {
    buffers.push_back(constants(data, bytes));
  };
  const auto& header = call.plan->header();
  constant(params.weights, header.weight_count * static_cast<int64_t>(sizeof(T)));
  constant(params.parameters, header.parameter_count * 4);
  constant(params.tables, call.plan->table_count() * 4);
  constexpr int64_t kSize = sizeof(T);
  buffers.push_back(updates(call.in.data, call.in.channels * call.in.channel * kSize,
                            first->in_channels * call.batch * call.in.image * kSize, 0));
  buffers.push_back(updates(call.out.data, call.out.channels * call.out.channel * kSize, 0,
                            params.results * call.batch * call.out.image * kSize));

  Launch config;
  config.grid_x = static_cast<uint32_t>(cut.cluster);
  config.grid_y = static_cast<uint32_t>(call.batch);
  config.threads = kStagesThreads;
  config.cluster = static_cast<uint32_t>(cut.cluster);
  config.shared_bytes = cut.shared_bytes;
  config.overlaps = call.overlaps;
  config.stream = call.stream;
  launch(config, buffers, stages_kernel<T>, params);
  return cut.steps;
}

int64_t with_dtype(const StepCall& call, LaunchInfo* info, bool launches) {
  int64_t steps = 0;
  with_type(call.plan->dtype(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2) steps = stages_of<T>(call, info, launches);
  });
  return steps;
}

}  // namespace

int64_t steps_of_stages(const StepCall& call) { return with_dtype(call, nullptr, false); }
void run_stages(const StepCall& call, LaunchInfo* info) { with_dtype(call, info, true); }

}  // namespace snv2::SNV2_GPU
