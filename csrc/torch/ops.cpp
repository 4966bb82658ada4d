// The PyTorch ops of the CPU backend, through the stable ABI of torch 2.11 and newer.
#include "ops.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "checked_plans.h"
#include "snv2/cpu.h"
#include "snv2/pool.h"
#include "thread_memory.h"

#if defined(__linux__)
// A function of the OpenMP library that torch brings; null where it brings none.
extern "C" __attribute__((weak)) int omp_in_parallel();
#else
constexpr int (*omp_in_parallel)() = nullptr;
#endif

namespace {

using namespace snv2::binding;
using snv2::PlanResult;

// Torch's threads in the place of ours, if the environment variable SNV2_POOL asks for them.
bool uses_torch_pool() {
  static const std::string name = [] {
    const char* const value = std::getenv("SNV2_POOL");
    return std::string(value != nullptr && *value != 0 ? value : "own");
  }();
  STD_TORCH_CHECK(name == "own" || name == "torch", "SNV2_POOL: expected own or torch, got ", name);
  return name == "torch";
}

void run_in_torch_pool(void*, int64_t count, snv2::ParallelFor::Body body, void* arg) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(arg, i);
  });
}

// As many threads as torch would use, but not its own, whose callers wait for all of them awake.
// Inside one of its parallel regions, that is the calling thread alone.
snv2::ParallelFor pool() {
  snv2::ParallelFor pool = snv2::shared_pool(torch::stable::get_num_threads());
  if (omp_in_parallel != nullptr && omp_in_parallel() != 0) {
    pool.run = nullptr;
  } else if (uses_torch_pool()) {
    pool.run = run_in_torch_pool;
  }
  return pool;
}

struct Cpu {
  static constexpr auto cat_shuffle = &snv2::cpu::cat_shuffle;
  static constexpr auto dw_conv3x3 = &snv2::cpu::dw_conv3x3;
  static constexpr auto split_dw_cat_shuffle = &snv2::cpu::split_dw_cat_shuffle;
  static constexpr auto cat_shuffle_backward = &snv2::cpu::cat_shuffle_backward;
  static constexpr auto depthwise_backward_workspace = &snv2::cpu::depthwise_backward_workspace;
  static constexpr auto dw_conv3x3_backward = &snv2::cpu::dw_conv3x3_backward;
  static constexpr auto split_dw_cat_shuffle_backward = &snv2::cpu::split_dw_cat_shuffle_backward;

  snv2::ParallelFor where = pool();

  explicit Cpu(const Tensor&) {}

  static void check_device(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  }
};

void check_image(const Tensor& x) {
  check_map(x, "x");
  Cpu::check_device(x, "x");
  check_pixels(x);
}

const snv2::Plan& plan_of(const Tensor& plan, const Tensor& weights, const Tensor& x) {
  parameters(weights, "weights", weights.numel(), x);
  return checked_plan<snv2::Plan>(plan, weights.numel());
}

// A classifier's result is [N, classes]: a map of one pixel.
snv2::FeatureMap result_of(const Tensor& out, snv2::Layout layout) {
  if (out.dim() == 4) return map_of(out, layout);
  return {out.data_ptr(), *dtype_of(out), layout, out.size(0), out.size(1), 1, 1};
}

void run_network(const snv2::Plan& plan, const snv2::FeatureMap& x, const Tensor& weights,
                 void* workspace, int64_t workspace_bytes, const std::vector<Tensor>& results,
                 snv2::Layout layout) {
  std::vector<snv2::FeatureMap> maps;
  for (const Tensor& out : results) maps.push_back(result_of(out, layout));
  snv2::cpu::run_network(plan, static_cast<const float*>(weights.const_data_ptr()), x, maps.data(),
                         static_cast<int64_t>(maps.size()), workspace, workspace_bytes, pool());
}

// The results of a plan in new memory.
std::vector<Tensor> new_results(const snv2::Plan& plan, const std::vector<PlanResult>& planned,
                                const Tensor& x, const Tensor& weights, bool classify) {
  check_classify(plan.header().classify, classify);
  STD_TORCH_CHECK(x.size(1) == plan.header().in_channels, "x must have ", plan.header().in_channels,
                  " channels, got ", x.size(1));
  const snv2::Layout layout = layout_of(x);
  const Tensor in = dense(x, layout, "x");
  std::vector<Tensor> results = empty_results(x, planned, classify, layout);
  const int64_t bytes = snv2::cpu::workspace_bytes(plan, x.size(0), x.size(2), x.size(3),
                                                   torch::stable::get_num_threads());
  const ThreadMemory workspace(bytes);
  run_network(plan, map_of(in, layout), weights, workspace.data(), bytes, results, layout);
  return results;
}

std::vector<Tensor> network_results(const Tensor& x, const Tensor& weights,
                                    const Tensor& plan_words, std::vector<int64_t> channels,
                                    std::vector<int64_t> halvings, bool classify) {
  check_image(x);
  const snv2::Plan& plan = plan_of(plan_words, weights, x);
  const std::vector<PlanResult> planned = results_of(plan);
  check_results(planned, channels, halvings);
  return new_results(plan, planned, x, weights, classify);
}

Tensor network(const Tensor& x, const Tensor& weights, const Tensor& plan_words,
               int64_t out_channels, int64_t halvings, bool classify) {
  check_image(x);
  const snv2::Plan& plan = plan_of(plan_words, weights, x);
  const std::vector<PlanResult> planned = results_of(plan);
  check_result(planned, out_channels, halvings);
  return new_results(plan, planned, x, weights, classify)[0];
}

// Bytes [N, H, W, C] as a map.
snv2::FeatureMap pixels_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous() && x.is_cpu(),
                  "x of bytes must be a contiguous CPU tensor [N, H, W, C]");
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0, "x must have at least one pixel");
  check_storage(x);
  return {x.data_ptr(), snv2::DType::kUint8, snv2::Layout::kChannelsLast,
          x.size(0),    x.size(3),           x.size(1),
          x.size(2)};
}

void network_out(const Tensor& x, const Tensor& weights, const Tensor& plan_words, Tensor workspace,
                 std::vector<Tensor> results) {
  const bool bytes = x.scalar_type() == ScalarType::Byte;
  if (!bytes) check_image(x);
  const snv2::Plan& plan = plan_of(plan_words, weights, x);
  const snv2::Layout layout = bytes ? snv2::Layout::kContiguous : layout_of(x);
  STD_TORCH_CHECK(bytes || is_dense(x, layout), "x must be dense");
  const auto dtype = bytes && !results.empty() ? dtype_of(results[0]) : dtype_of(x);
  for (size_t i = 0; i < results.size(); ++i) {
    const Tensor& out = results[i];
    const bool scores = plan.header().classify != 0 && i + 1 == results.size();
    STD_TORCH_CHECK(out.is_cpu() && dtype.has_value() && dtype_of(out) == dtype,
                    "results must be CPU tensors of x's dtype, for bytes of one dtype");
    STD_TORCH_CHECK(out.dim() == (scores ? 2 : 4), "results have the wrong rank");
    STD_TORCH_CHECK(scores ? out.is_contiguous() : is_dense(out, layout),
                    "results must be dense in x's memory format");
  }
  parameters(workspace, "workspace", workspace.numel(), x);
  run_network(plan, bytes ? pixels_of(x) : map_of(x, layout), weights, workspace.data_ptr(),
              workspace.numel() * static_cast<int64_t>(sizeof(float)), results, layout);
}

}  // namespace

STABLE_TORCH_LIBRARY(snv2, m) {
  define_ops(m);
  define_gpu_ops(m);
  m.def(
      "network(Tensor x, Tensor weights, Tensor plan, int out_channels, int halvings, "
      "bool classify) -> Tensor");
  m.def(
      "network_results(Tensor x, Tensor weights, Tensor plan, int[] channels, int[] halvings, "
      "bool classify) -> Tensor[]");
  m.def(
      "network_out(Tensor x, Tensor weights, Tensor plan, Tensor(a!) workspace, "
      "Tensor(b!)[] results) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(snv2, CPU, m) {
  implement_ops<Cpu>(m);
  m.impl("network", TORCH_BOX(&network));
  m.impl("network_results", TORCH_BOX(&network_results));
  m.impl("network_out", TORCH_BOX(&network_out));
}
