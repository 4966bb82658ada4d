// What the two builds of the CUDA kernels share. The file that includes this defines SNV2_GPU, the
// namespace of its build.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "checked_plans.h"
#include "ops.h"
#include "snv2/cuda.h"

namespace snv2::binding::SNV2_GPU {

namespace gpu = snv2::SNV2_GPU;

struct GpuKernels {
  static constexpr auto cat_shuffle = &gpu::cat_shuffle;
  static constexpr auto dw_conv3x3 = &gpu::dw_conv3x3;
  static constexpr auto split_dw_cat_shuffle = &gpu::split_dw_cat_shuffle;
  static constexpr auto cat_shuffle_backward = &gpu::cat_shuffle_backward;
  static constexpr auto depthwise_backward_workspace = &gpu::depthwise_backward_workspace;
  static constexpr auto dw_conv3x3_backward = &gpu::dw_conv3x3_backward;
  static constexpr auto split_dw_cat_shuffle_backward = &gpu::split_dw_cat_shuffle_backward;
};

inline constexpr const char* kConformanceSchema = "conformance(Tensor words, int index) -> Tensor";

// Case `index` of gpu::conformance_cases() on these 32-bit words.
template <class Backend>
Tensor conformance(const Tensor& words, int64_t index) {
  Backend::check_device(words, "words");
  const gpu::ConformanceCase* const cases = gpu::conformance_cases();
  int64_t count = 0;
  while (cases[count].name != nullptr) ++count;
  STD_TORCH_CHECK(index >= 0 && index < count, "index must be in [0, ", count, "), got ", index);
  STD_TORCH_CHECK(words.scalar_type() == ScalarType::Int && words.is_contiguous() &&
                      words.numel() == cases[index].in_words,
                  "words must be ", cases[index].in_words, " contiguous int32 for case ",
                  cases[index].name);
  const auto address = reinterpret_cast<uintptr_t>(words.const_data_ptr());
  STD_TORCH_CHECK(address % 16 == 0, "words must be aligned to 16 bytes");
  const Backend backend(words);
  Tensor out = new_tensor("the result", {cases[index].out_words}, ScalarType::Int, words);
  gpu::run_conformance(index, words.const_data_ptr(), out.data_ptr(), backend.where);
  return out;
}

// Networks ---------------------------------------------------------------------------------

inline constexpr int64_t kWorkspaceAlign = 256;

// The aligned part of some bytes.
struct Workspace {
  void* data;
  int64_t size;

  explicit Workspace(const Tensor& bytes) : data(bytes.data_ptr()), size(0) {
    auto space = static_cast<size_t>(bytes.numel());
    if (std::align(kWorkspaceAlign, 1, data, space) != nullptr) size = static_cast<int64_t>(space);
  }
};

// One array of a plan, where x is.
inline const void* array_of(const Tensor& t, const char* name, ScalarType type, int64_t count,
                            const Tensor& x) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.device() == x.device(), name,
                  " must be contiguous, of the plan's dtype and on the device of x");
  STD_TORCH_CHECK(t.numel() == count, name, " must have ", count, " elements, got ", t.numel());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name,
                  " must be aligned to 16 bytes");
  return t.const_data_ptr();
}

inline ScalarType scalar_type_of(DType dtype) {
  if (dtype == DType::kFloat32) return ScalarType::Float;
  return dtype == DType::kFloat16 ? ScalarType::Half : ScalarType::BFloat16;
}

// What a plan's steps take, beside the words. The contents of `tables` are not looked at.
inline gpu::PlanArrays arrays_of(const GpuPlan& plan, const Tensor& weights,
                                 const Tensor& parameters, const Tensor& tables, const Tensor& x) {
  const GpuPlanHeader& header = plan.header();
  return {array_of(weights, "weights", scalar_type_of(plan.dtype()), header.weight_count, x),
          static_cast<const float*>(
              array_of(parameters, "parameters", ScalarType::Float, header.parameter_count, x)),
          static_cast<const int32_t*>(
              array_of(tables, "tables", ScalarType::Int, plan.table_count(), x))};
}

// A map of the plan's dtype, dense in `layout`.
template <class Backend>
gpu::Image image_of(const Tensor& x, const GpuPlan& plan, Layout layout) {
  check_map(x, "x");
  check_pixels(x);
  STD_TORCH_CHECK(x.scalar_type() == scalar_type_of(plan.dtype()), "x must have the plan's dtype");
  STD_TORCH_CHECK(x.size(1) == plan.header().in_channels, "x must have ", plan.header().in_channels,
                  " channels, got ", x.size(1));
  STD_TORCH_CHECK(is_dense(x, layout), "x must be dense");
  gpu::Image image = {};
  image.map = map_of(x, layout);
  return image;
}

// Bytes, [N, H, W, C], and what makes them the network's pixels.
inline gpu::Image bytes_of(const Tensor& x, const GpuPlan& plan, const std::vector<double>& scale,
                           const std::vector<double>& shift) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions [N, H, W, C], got ", x.dim());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte && x.is_contiguous(),
                  "x must be contiguous uint8 where scale and shift are given");
  STD_TORCH_CHECK(plan.begin()->kind == GpuStepKind::kStem,
                  "plan must begin with a stem where x is bytes");
  gpu::Image image = {};
  image.bytes = true;
  const int64_t channels = plan.header().in_channels;
  constexpr auto kMost = static_cast<int64_t>(sizeof image.scale / sizeof *image.scale);
  STD_TORCH_CHECK(channels <= kMost, "plan must take at most ", kMost, " channels of bytes");
  STD_TORCH_CHECK(x.size(3) == channels, "x must have ", channels, " channels, got ", x.size(3));
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0, "x must have at least one pixel");
  STD_TORCH_CHECK(static_cast<int64_t>(scale.size()) == channels && shift.size() == scale.size(),
                  "scale and shift must have ", channels, " elements each");
  std::copy(scale.begin(), scale.end(), image.scale);
  std::copy(shift.begin(), shift.end(), image.shift);
  image.map = {x.data_ptr(), plan.dtype(), Layout::kContiguous, x.size(0), channels,
               x.size(1),    x.size(2)};
  return image;
}

// A map, or the scores of a classifier as a map of one pixel. The kernels check its extents.
inline FeatureMap result_of(const Tensor& out, Layout layout, const Tensor& x, DType dtype) {
  STD_TORCH_CHECK(out.device() == x.device() && dtype_of(out) == dtype,
                  "results must be of the plan's dtype, on the device of x");
  if (out.dim() == 2) {
    STD_TORCH_CHECK(out.is_contiguous(), "results of 2 dimensions must be contiguous");
    return {out.data_ptr(), dtype, layout, out.size(0), out.size(1), 1, 1};
  }
  STD_TORCH_CHECK(out.dim() == 4, "results must have 4 dimensions [N, C, H, W], or 2, got ",
                  out.dim());
  STD_TORCH_CHECK(is_dense(out, layout), "results must be dense in x's memory format");
  return map_of(out, layout);
}

// The results of a plan in new memory.
template <class Backend>
std::vector<Tensor> new_results(const GpuPlan& plan, const std::vector<PlanResult>& planned,
                                const Tensor& x, const Tensor& weights, const Tensor& parameters,
                                const Tensor& tables, bool classify) {
  check_classify(plan.header().classify, classify);
  const gpu::PlanArrays arrays = arrays_of(plan, weights, parameters, tables, x);
  const Backend backend(x);
  const Layout layout = layout_of(x);
  const Tensor in = dense(x, layout, "x");
  const gpu::Image image = image_of<Backend>(in, plan, layout);

  std::vector<Tensor> results = empty_results(x, planned, classify, layout);
  std::vector<FeatureMap> maps;
  for (const Tensor& out : results) maps.push_back(result_of(out, layout, x, plan.dtype()));
  if (x.size(0) == 0) return results;
  const gpu::Device device = gpu::current_device();
  const int64_t bytes = gpu::workspace_bytes(plan, x.size(0), x.size(2), x.size(3), device);
  const Tensor memory =
      new_tensor("the workspace", {bytes + kWorkspaceAlign - 1}, ScalarType::Byte, x);
  const Workspace workspace(memory);
  gpu::run_network(plan, arrays, image, maps.data(), static_cast<int64_t>(maps.size()),
                   workspace.data, workspace.size, device, backend.where);
  return results;
}

template <class Backend>
std::vector<Tensor> gpu_network_results(const Tensor& x, const Tensor& weights,
                                        const Tensor& parameters, const Tensor& tables,
                                        const Tensor& plan_words, std::vector<int64_t> channels,
                                        std::vector<int64_t> halvings, bool classify) {
  check_map(x, "x");
  Backend::check_device(x, "x");
  const GpuPlan& plan = checked_plan<GpuPlan>(plan_words);
  const std::vector<PlanResult> planned = results_of(plan);
  check_results(planned, channels, halvings);
  return new_results<Backend>(plan, planned, x, weights, parameters, tables, classify);
}

template <class Backend>
Tensor gpu_network(const Tensor& x, const Tensor& weights, const Tensor& parameters,
                   const Tensor& tables, const Tensor& plan_words, int64_t out_channels,
                   int64_t halvings, bool classify) {
  check_map(x, "x");
  Backend::check_device(x, "x");
  const GpuPlan& plan = checked_plan<GpuPlan>(plan_words);
  const std::vector<PlanResult> planned = results_of(plan);
  check_result(planned, out_channels, halvings);
  return new_results<Backend>(plan, planned, x, weights, parameters, tables, classify)[0];
}

// `x` is a map, or bytes where scale and shift are not empty. `workspace` has workspace_bytes() and
// kWorkspaceAlign - 1 bytes: of these, the ones from the first aligned address on are used.
template <class Backend>
void gpu_network_out(const Tensor& x, const Tensor& weights, const Tensor& parameters,
                     const Tensor& tables, const Tensor& plan_words, Tensor workspace,
                     std::vector<Tensor> results, std::vector<double> scale,
                     std::vector<double> shift) {
  Backend::check_device(x, "x");
  const GpuPlan& plan = checked_plan<GpuPlan>(plan_words);
  const gpu::PlanArrays arrays = arrays_of(plan, weights, parameters, tables, x);
  const bool bytes = !scale.empty() || !shift.empty();
  if (!bytes) check_map(x, "x");
  const Layout layout = bytes ? Layout::kContiguous : layout_of(x);
  const gpu::Image image =
      bytes ? bytes_of(x, plan, scale, shift) : image_of<Backend>(x, plan, layout);
  STD_TORCH_CHECK(static_cast<int64_t>(results.size()) == plan.header().result_count,
                  "results must be ", plan.header().result_count, ", got ", results.size());
  std::vector<FeatureMap> maps;
  for (size_t i = 0; i < results.size(); ++i) {
    const bool scores = plan.header().classify != 0 && i + 1 == results.size();
    STD_TORCH_CHECK(results[i].dim() == (scores ? 2 : 4), "results have the wrong rank");
    maps.push_back(result_of(results[i], layout, x, plan.dtype()));
  }
  STD_TORCH_CHECK(workspace.scalar_type() == ScalarType::Byte && workspace.is_contiguous() &&
                      workspace.device() == x.device(),
                  "workspace must be a contiguous uint8 tensor on the device of x");
  if (x.size(0) == 0) return;
  const Backend backend(x);
  const Workspace part(workspace);
  gpu::run_network(plan, arrays, image, maps.data(), static_cast<int64_t>(maps.size()), part.data,
                   part.size, gpu::current_device(), backend.where);
}

inline std::vector<int64_t> values_of(const gpu::Device& d) {
  const gpu::Tuning& t = d.tuning;
  const auto& at_once = d.clusters_at_once;
  return {d.sms,     d.shared_per_sm, d.shared_per_cta, d.reserved_per_cta, d.l2_bytes,
          d.cluster, at_once[0][0],   at_once[0][1],    at_once[1][0],      at_once[1][1],
          t.columns, t.rows_per_cta,  t.weights,        t.images,           t.stages};
}

// v has one value for each that values_of() gives.
inline gpu::Device device_from(const std::vector<int64_t>& v) {
  return {v[0],
          v[1],
          v[2],
          v[3],
          v[4],
          v[5],
          {{v[6], v[7]}, {v[8], v[9]}},
          {v[10], v[11], v[12], v[13], v[14]}};
}

// The current device as numbers, in the order of snv2_kernels.gpu.DEVICE_FIELDS.
inline std::vector<int64_t> gpu_device() { return values_of(gpu::current_device()); }

// Choices for all launches of networks from now on, 0 where the rule holds.
inline void gpu_tune(int64_t columns, int64_t rows_per_cta, int64_t weights, int64_t images,
                     int64_t stages) {
  gpu::set_tuning({columns, rows_per_cta, weights, images, stages});
}

// Planning, for networks that are not run now. `device` is what gpu_device() tells, or empty for
// the current one.
inline gpu::Device device_of(const std::vector<int64_t>& device) {
  if (device.empty()) return gpu::current_device();
  const size_t fields = values_of({}).size();
  STD_TORCH_CHECK(device.size() == fields, "device must have ", fields, " numbers, got ",
                  device.size());
  return device_from(device);
}

inline int64_t gpu_workspace_bytes(const Tensor& plan_words, int64_t batch, int64_t height,
                                   int64_t width, std::vector<int64_t> device) {
  return gpu::workspace_bytes(checked_plan<GpuPlan>(plan_words), batch, height, width,
                              device_of(device));
}

// The launches of a network: names of kernels, a line each, and the numbers of each LaunchInfo in
// the order of snv2_kernels.gpu.LAUNCH_NUMBERS.
inline std::tuple<std::string, std::vector<int64_t>> gpu_launches(const Tensor& plan_words,
                                                                  int64_t batch, int64_t height,
                                                                  int64_t width,
                                                                  std::vector<int64_t> device) {
  const GpuPlan& plan = checked_plan<GpuPlan>(plan_words);
  const gpu::Device where = device_of(device);
  int64_t count = 0;
  gpu::describe_network(plan, batch, height, width, where, nullptr, 0, count);
  std::vector<gpu::LaunchInfo> infos(static_cast<size_t>(count));
  gpu::describe_network(plan, batch, height, width, where, infos.data(), count, count);
  std::string names;
  std::vector<int64_t> numbers;
  for (const gpu::LaunchInfo& i : infos) {
    names.append(i.kernel).push_back('\n');
    numbers.insert(numbers.end(),
                   {i.step, i.ctas, i.threads, i.shared_bytes, i.columns, int64_t{i.resident},
                    i.cluster, i.launches, i.read_bytes, i.written_bytes, i.weight_bytes,
                    i.multiply_adds, i.instructions, i.cycles});
  }
  return {names, numbers};
}

// Names of the cases, a line each, and for each the words that it takes and gives.
inline std::tuple<std::string, std::vector<int64_t>> conformance_cases() {
  std::string names;
  std::vector<int64_t> words;
  for (const gpu::ConformanceCase* c = gpu::conformance_cases(); c->name != nullptr; ++c) {
    names.append(c->name).push_back('\n');
    words.insert(words.end(), {c->in_words, c->out_words});
  }
  return {names, words};
}

template <class Library>
void define_gpu_tools(Library& m) {
  m.def(kConformanceSchema);
  m.def("conformance_cases() -> (str, int[])");
  m.def("gpu_device() -> int[]");
  m.def(
      "gpu_tune(int columns=0, int rows_per_cta=0, int weights=0, int images=0, "
      "int stages=0) -> ()");
  m.def("gpu_workspace_bytes(Tensor plan, int batch, int height, int width, int[] device) -> int");
  m.def(
      "gpu_launches(Tensor plan, int batch, int height, int width, int[] device) -> (str, int[])");
}

template <class Backend, class Library>
void implement_gpu_ops(Library& m) {
  implement_ops<Backend>(m);
  m.impl("gpu_network", TORCH_BOX(&gpu_network<Backend>));
  m.impl("gpu_network_results", TORCH_BOX(&gpu_network_results<Backend>));
  m.impl("gpu_network_out", TORCH_BOX(&gpu_network_out<Backend>));
  m.impl("conformance", TORCH_BOX(&conformance<Backend>));
}

// Registers the ops that take no map.
template <class Library>
void implement_gpu_tools(Library& m) {
  m.impl("conformance_cases", TORCH_BOX(&conformance_cases));
  m.impl("gpu_device", TORCH_BOX(&gpu_device));
  m.impl("gpu_tune", TORCH_BOX(&gpu_tune));
  m.impl("gpu_workspace_bytes", TORCH_BOX(&gpu_workspace_bytes));
  m.impl("gpu_launches", TORCH_BOX(&gpu_launches));
}

}  // namespace snv2::binding::SNV2_GPU
