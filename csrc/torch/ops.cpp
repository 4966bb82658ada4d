// The PyTorch ops of the CPU backend: schemas, checks and dispatch, through the stable ABI of
// torch 2.11 and newer.
//
// Checks here keep a call of torch.ops.snv2.* from reading memory it should not; the public
// functions in snv2_kernels/ops.py check first and name the user's own arguments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>

#include "snv2/cpu.h"

namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Torch's own pool.
snv2::ParallelFor torch_pool() {
  snv2::ParallelFor pool;
  pool.threads = torch::stable::get_num_threads();
  pool.run = [](void*, int64_t count, snv2::ParallelFor::Body body, void* arg) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(arg, i);
    });
  };
  return pool;
}

std::optional<snv2::DType> dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return snv2::DType::kFloat32;
    case ScalarType::Half:
      return snv2::DType::kFloat16;
    case ScalarType::BFloat16:
      return snv2::DType::kBFloat16;
    default:
      return std::nullopt;
  }
}

void check_map(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.dim() == 4, name, " must have 4 dimensions [N, C, H, W], got ", t.dim());
  STD_TORCH_CHECK(dtype_of(t).has_value(), name, " must be float32, float16 or bfloat16");
}

// Float parameters, dense, on the CPU.
const float* parameters(const Tensor& t, const char* name, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous(), name,
                  " must be a contiguous float32 CPU tensor");
  STD_TORCH_CHECK(t.numel() == count, name, " must have ", count, " elements, got ", t.numel());
  return static_cast<const float*>(t.const_data_ptr());
}

// True if t is dense in channels-last order.
bool is_channels_last(const Tensor& t) {
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != expected) return false;
    expected *= t.size(dim);
  }
  return true;
}

// The layout a result for t has: torch's own rule for convolutions (suggest_memory_format), which
// asks whether the strides grow in channels-last order and takes contiguous where both would do.
snv2::Layout layout_of(const Tensor& t) {
  int64_t smallest = 0;
  if (t.stride(1) == 0) return snv2::Layout::kContiguous;
  for (const int64_t dim : {1, 3, 2, 0}) {
    const int64_t size = t.size(dim), stride = t.stride(dim);
    if (size == 0 || stride < smallest || (dim == 0 && smallest == t.stride(1))) {
      return snv2::Layout::kContiguous;
    }
    smallest = stride * (size > 1 ? size : 1);
  }
  return snv2::Layout::kChannelsLast;
}

MemoryFormat format_of(snv2::Layout layout) {
  return layout == snv2::Layout::kContiguous ? MemoryFormat::Contiguous
                                             : MemoryFormat::ChannelsLast;
}

// t itself where it is dense in `layout`, else a copy.
Tensor dense(const Tensor& t, snv2::Layout layout) {
  const bool ready = layout == snv2::Layout::kContiguous ? t.is_contiguous() : is_channels_last(t);
  return ready ? t : torch::stable::contiguous(t, format_of(layout));
}

snv2::FeatureMap map_of(const Tensor& t, snv2::Layout layout) {
  return {t.data_ptr(), *dtype_of(t), layout, t.size(0), t.size(1), t.size(2), t.size(3)};
}

Tensor empty_map(const Tensor& like, int64_t channels, int64_t height, int64_t width,
                 snv2::Layout layout) {
  return torch::stable::empty({like.size(0), channels, height, width}, like.scalar_type(),
                              std::nullopt, torch::stable::Device(DeviceType::CPU), std::nullopt,
                              format_of(layout));
}

Tensor cat_shuffle(const Tensor& a, const Tensor& b) {
  check_map(a, "a");
  check_map(b, "b");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "a and b must have the same dtype");
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(a.size(dim) == b.size(dim), "a and b must have the same shape");
  }
  const snv2::Layout layout = layout_of(a);
  const Tensor left = dense(a, layout), right = dense(b, layout);
  Tensor out = empty_map(a, 2 * a.size(1), a.size(2), a.size(3), layout);
  snv2::cpu::cat_shuffle(map_of(left, layout), map_of(right, layout), map_of(out, layout),
                         torch_pool());
  return out;
}

snv2::Depthwise3x3 depthwise_of(const Tensor& weight, const Tensor& scale, const Tensor& shift,
                                int64_t channels, int64_t stride, bool relu) {
  return {parameters(weight, "weight", channels * 9), parameters(scale, "scale", channels),
          parameters(shift, "shift", channels), stride, relu};
}

void check_pixels(const Tensor& x) {
  STD_TORCH_CHECK(x.size(2) > 0 && x.size(3) > 0, "x must have at least one pixel");
}

Tensor dw_conv3x3(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                  int64_t stride, bool relu) {
  check_map(x, "x");
  check_pixels(x);
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  const auto dw = depthwise_of(weight, scale, shift, x.size(1), stride, relu);
  const snv2::Layout layout = layout_of(x);
  const Tensor in = dense(x, layout);
  Tensor out = empty_map(x, x.size(1), snv2::conv3x3_extent(x.size(2), stride),
                         snv2::conv3x3_extent(x.size(3), stride), layout);
  snv2::cpu::dw_conv3x3(map_of(in, layout), dw, map_of(out, layout), torch_pool());
  return out;
}

Tensor split_dw_cat_shuffle(const Tensor& x, const Tensor& weight, const Tensor& scale,
                            const Tensor& shift) {
  check_map(x, "x");
  check_pixels(x);
  STD_TORCH_CHECK(x.size(1) % 2 == 0, "x must have an even number of channels, got ", x.size(1));
  const auto dw = depthwise_of(weight, scale, shift, x.size(1) / 2, 1, true);
  const snv2::Layout layout = layout_of(x);
  const Tensor in = dense(x, layout);
  Tensor out = empty_map(x, x.size(1), x.size(2), x.size(3), layout);
  snv2::cpu::split_dw_cat_shuffle(map_of(in, layout), dw, map_of(out, layout), torch_pool());
  return out;
}

snv2::Plan plan_of(const Tensor& plan, const Tensor& weights) {
  STD_TORCH_CHECK(plan.is_cpu() && plan.scalar_type() == ScalarType::Long && plan.is_contiguous(),
                  "plan must be a contiguous int64 CPU tensor");
  parameters(weights, "weights", weights.numel());
  return snv2::Plan(static_cast<const int64_t*>(plan.const_data_ptr()), plan.numel(),
                    weights.numel());
}

// A classifier's result is [N, classes]: a map of one pixel.
snv2::FeatureMap result_of(const Tensor& out, snv2::Layout layout) {
  if (out.dim() == 4) return map_of(out, layout);
  return {out.data_ptr(), *dtype_of(out), layout, out.size(0), out.size(1), 1, 1};
}

void run_network(const snv2::Plan& plan, const Tensor& x, const Tensor& weights,
                 const Tensor& workspace, const Tensor& out, snv2::Layout layout) {
  const auto pool = torch_pool();
  snv2::cpu::run_network(plan, static_cast<const float*>(weights.const_data_ptr()),
                         map_of(x, layout), result_of(out, layout), workspace.data_ptr(),
                         workspace.numel() * static_cast<int64_t>(sizeof(float)), pool);
}

Tensor network(const Tensor& x, const Tensor& weights, const Tensor& plan_words,
               int64_t out_channels, int64_t halvings, bool classify) {
  check_map(x, "x");
  check_pixels(x);
  const snv2::Plan plan = plan_of(plan_words, weights);
  const snv2::PlanHeader& header = plan.header();
  STD_TORCH_CHECK(header.out_channels == out_channels && header.halvings == halvings &&
                      (header.classify != 0) == classify,
                  "out_channels, halvings or classify do not match plan");
  STD_TORCH_CHECK(x.size(1) == header.in_channels, "x must have ", header.in_channels,
                  " channels, got ", x.size(1));
  const snv2::Layout layout = layout_of(x);
  const Tensor in = dense(x, layout);

  int64_t height = x.size(2), width = x.size(3);
  for (int64_t i = 0; i < halvings; ++i) {
    height = snv2::conv3x3_extent(height, 2);
    width = snv2::conv3x3_extent(width, 2);
  }
  const torch::stable::Device cpu(DeviceType::CPU);
  Tensor out =
      classify ? torch::stable::empty({x.size(0), out_channels}, x.scalar_type(), std::nullopt, cpu)
               : empty_map(x, out_channels, height, width, layout);
  const int64_t bytes = snv2::cpu::workspace_bytes(plan, x.size(0), x.size(2), x.size(3),
                                                   torch::stable::get_num_threads());
  const Tensor workspace = torch::stable::empty({bytes / 4}, ScalarType::Float, std::nullopt, cpu);
  run_network(plan, in, weights, workspace, out, layout);
  return out;
}

void network_out(const Tensor& x, const Tensor& weights, const Tensor& plan_words, Tensor workspace,
                 Tensor out) {
  check_map(x, "x");
  check_pixels(x);
  const snv2::Plan plan = plan_of(plan_words, weights);
  const snv2::Layout layout = layout_of(x);
  const bool dense_x =
      layout == snv2::Layout::kContiguous ? x.is_contiguous() : is_channels_last(x);
  STD_TORCH_CHECK(dense_x, "x must be dense");
  STD_TORCH_CHECK(out.is_cpu() && dtype_of(out) == dtype_of(x),
                  "out must be a CPU tensor of x's dtype");
  STD_TORCH_CHECK(out.dim() == (plan.header().classify != 0 ? 2 : 4), "out has the wrong rank");
  const bool contiguous = out.dim() == 2 || layout == snv2::Layout::kContiguous;
  STD_TORCH_CHECK(contiguous ? out.is_contiguous() : is_channels_last(out),
                  "out must be dense in x's memory format");
  parameters(workspace, "workspace", workspace.numel());
  run_network(plan, x, weights, workspace, out, layout);
}

}  // namespace

STABLE_TORCH_LIBRARY(snv2, m) {
  m.def("cat_shuffle(Tensor a, Tensor b) -> Tensor");
  m.def(
      "dw_conv3x3(Tensor x, Tensor weight, Tensor scale, Tensor shift, int stride=1, "
      "bool relu=False) -> Tensor");
  m.def("split_dw_cat_shuffle(Tensor x, Tensor weight, Tensor scale, Tensor shift) -> Tensor");
  m.def(
      "network(Tensor x, Tensor weights, Tensor plan, int out_channels, int halvings, "
      "bool classify) -> Tensor");
  m.def(
      "network_out(Tensor x, Tensor weights, Tensor plan, Tensor(a!) workspace, Tensor(b!) out) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(snv2, CPU, m) {
  m.impl("cat_shuffle", TORCH_BOX(&cat_shuffle));
  m.impl("dw_conv3x3", TORCH_BOX(&dw_conv3x3));
  m.impl("split_dw_cat_shuffle", TORCH_BOX(&split_dw_cat_shuffle));
  m.impl("network", TORCH_BOX(&network));
  m.impl("network_out", TORCH_BOX(&network_out));
}
