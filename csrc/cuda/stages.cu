// Launches stages_kernel, or tells how it would.
#include <algorithm>
#include <map>
#include <vector>

#include "cuda/dispatch.h"
#include "cuda/stages.h"
#include "cuda/stages_cost.h"
#include "cuda/stages_cut.h"

namespace snv2::SNV2_GPU {
namespace {

constexpr int64_t kMostImages = 65535;  // of a grid along y

// Units in one launch: how they are cut, and whether that is expected to be faster than a launch
// each.
template <class T>
struct Choice {
  StagesCut cut;
  StagesParams<T> params;  // but for memory outside
  StagesCost cost;
  bool faster;
};

// Cycles of a launch, by the estimate that it was cut by.
double cycles_of(const LaunchInfo& info, const Device& device) {
  constexpr double kLaunch = 2300;  // from one kernel to the next
  const auto busy = static_cast<double>(std::min(info.ctas, device.sms));
  const double issue = static_cast<double>(info.instructions) / (CostModel::kIssue * busy);
  return std::max(static_cast<double>(info.cycles), issue) + kLaunch;
}

// As many units as fit, up to a step that reads all planes.
template <class T>
Choice<T> choose(const StepCall& call) {
  const GpuStep* const first = call.step;
  const Device& device = call.device;
  Choice<T> choice{};
  for (const GpuStep* step = first + 1; step < call.plan->end(); ++step) {
    if (step->in_buffer != step[-1].out_buffer) break;
    // While a cluster writes, others read.
    if (reads_all(*step) && step[-1].out_buffer != first->in_buffer) {
      Choice<T> more{};
      more.cut = cut_stages(more.params, *call.plan, first, step - first, call.in.channels,
                            call.height, call.width, device);
      if (more.cut.steps == 0) break;
      choice = more;
    }
    if (!is_staged_unit(*step)) break;
  }
  if (choice.cut.steps == 0) return choice;
  choice.cost = cost_of(choice.params, choice.cut, call.batch, device);
  LaunchInfo whole{};
  whole.ctas = choice.cut.cluster * call.batch;
  whole.instructions = static_cast<int64_t>(choice.cost.instructions);
  whole.cycles = static_cast<int64_t>(choice.cost.cycles);
  double apart = 0;
  StepCall unit = call;
  for (int64_t i = 0; i < choice.cut.steps; ++i) {
    unit.step = first + i;
    LaunchInfo info{};
    run_unit(unit, &info);
    apart += cycles_of(info, device);
    if (unit.step->stride == 2) {
      unit.height = conv3x3_extent(unit.height, 2);
      unit.width = conv3x3_extent(unit.width, 2);
    }
  }
  choice.faster = cycles_of(whole, device) < apart;
  return choice;
}

// choose(), which takes longer than a launch, remembered for each kind of call.
template <class T>
const Choice<T>& remembered(const StepCall& call) {
  constexpr size_t kMost = 64;
  const Device& d = call.device;
  std::vector<int64_t> key{call.batch,
                           call.height,
                           call.width,
                           call.in.channels,
                           call.plan->header().weight_count,
                           call.plan->header().parameter_count,
                           d.sms,
                           d.shared_per_sm,
                           d.shared_per_cta,
                           d.reserved_per_cta,
                           d.cluster,
                           d.clusters_at_once[0][0],
                           d.clusters_at_once[0][1],
                           d.clusters_at_once[1][0],
                           d.clusters_at_once[1][1],
                           d.tuning.columns,
                           d.tuning.rows_per_cta,
                           d.tuning.weights};
  const auto* const words = reinterpret_cast<const int64_t*>(call.step);
  key.insert(key.end(), words, words + (call.plan->end() - call.step) * kGpuStepWords);
  thread_local std::map<std::vector<int64_t>, Choice<T>> choices;
  if (const auto found = choices.find(key); found != choices.end()) return found->second;
  if (choices.size() >= kMost) choices.clear();
  return choices[key] = choose<T>(call);
}

void describe(const StepCall& call, const StagesCut& cut, const StagesCost& cost,
              const StagedMap& first, const StagedMap& last, int64_t read, int64_t written,
              LaunchInfo& info) {
  info.kernel = "stages";
  info.ctas = cut.cluster * call.batch;
  info.cluster = cut.cluster;
  info.threads = kStagesThreads;
  info.shared_bytes = cut.shared_bytes;
  info.columns = last.columns();
  info.launches = 1;
  // A CTA also reads the row above its own.
  const int64_t size = size_of(call.plan->dtype());
  info.read_bytes = call.batch * read * (first.height + cut.cluster - 1) * first.row * size;
  info.written_bytes = call.batch * written * last.height * last.row * size;
  info.weight_bytes = static_cast<int64_t>(cost.weight_bytes);
  info.multiply_adds = static_cast<int64_t>(cost.multiply_adds);
  info.instructions = static_cast<int64_t>(cost.instructions);
  info.cycles = static_cast<int64_t>(cost.cycles);
}

// Returns how many steps are taken, and with `launches` launches or describes them.
template <class T>
int64_t stages_of(const StepCall& call, LaunchInfo* info, bool launches) {
  constexpr int64_t kWhereFaster = 1, kSize = sizeof(T);
  const GpuStep& first = *call.step;
  const int64_t asked = call.device.tuning.stages;
  if (asked == 0 || call.device.cluster < 2 || call.batch > kMostImages) return 0;
  if (!is_staged_unit(first) || first.stride != 2) return 0;
  const Choice<T>& choice = remembered<T>(call);
  const StagesCut& cut = choice.cut;
  if (cut.steps == 0 || (asked == kWhereFaster && !choice.faster)) return 0;
  if (!launches) return cut.steps;

  StagesParams<T> params = choice.params;
  const StagedMap& last = params.maps[params.unit[params.units - 1].out];
  if (info != nullptr) {
    describe(call, cut, choice.cost, params.maps[0], last, first.in_channels, params.results,
             *info);
    return cut.steps;
  }
  params.weights = static_cast<const T*>(call.arrays.weights);
  params.parameters = call.arrays.parameters;
  params.tables = call.arrays.tables;
  params.in = static_cast<const T*>(call.in.data);
  params.in_pitch = call.in.channel;
  params.in_image = call.in.image;
  params.out = static_cast<T*>(call.out.data);
  params.out_pitch = call.out.channel;
  params.out_image = call.out.image;

  const GpuPlanHeader& header = call.plan->header();
  const Buffer buffers[] = {constants(params.weights, header.weight_count * kSize),
                            constants(params.parameters, header.parameter_count * 4),
                            constants(params.tables, call.plan->table_count() * 4),
                            updates(call.in.data, call.in.channels * call.in.channel * kSize,
                                    first.in_channels * call.batch * call.in.image * kSize, 0),
                            updates(call.out.data, call.out.channels * call.out.channel * kSize, 0,
                                    params.results * call.batch * call.out.image * kSize)};
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
