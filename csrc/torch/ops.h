// The ops that every backend has: schemas, checks, memory. Registered by {,emulated_,cuda_}ops.cpp.
//
// Checks here keep a call of torch.ops.snv2.* from reading memory it should not; the public
// functions in snv2_kernels/ops.py check first and name the user's own arguments.
//
// A Backend is a class with the kernels as static functions, a static check_device(map, name), and
// a constructor from a tensor. An object of it is alive around all that an op allocates and
// launches for that tensor, and its member `where` is what the kernels take last.
#pragma once

#include <tuple>
#include <vector>

#include "tensors.h"

namespace snv2::binding {

// A map without elements may have any other extents, so kernels, which loop over those, see none.
// Twice as many channels can be counted.
inline constexpr int64_t kMostChannels = int64_t{1} << 61;

template <class Backend>
Tensor cat_shuffle(const Tensor& a, const Tensor& b) {
  check_map(a, "a");
  check_map(b, "b");
  Backend::check_device(a, "a");
  STD_TORCH_CHECK(a.device() == b.device(), "a and b must be on the same device");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "a and b must have the same dtype");
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(a.size(dim) == b.size(dim), "a and b must have the same shape");
  }
  const Backend backend(a);
  const Layout layout = layout_of(a);
  STD_TORCH_CHECK(a.size(1) <= kMostChannels, "a and b have too many channels: ", a.size(1));
  Tensor out = empty_map(a, 2 * a.size(1), a.size(2), a.size(3), layout);
  if (out.numel() == 0) return out;
  const Tensor left = dense(a, layout, "a"), right = dense(b, layout, "b");
  Backend::cat_shuffle(map_of(left, layout), map_of(right, layout), map_of(out, layout),
                       backend.where);
  return out;
}

inline Depthwise3x3 depthwise_of(const Tensor& x, const Tensor& weight, const Tensor& scale,
                                 const Tensor& shift, int64_t channels, int64_t stride, bool relu) {
  return {parameters(weight, "weight", channels * 9, x), parameters(scale, "scale", channels, x),
          parameters(shift, "shift", channels, x), stride, relu};
}

template <class Backend>
Depthwise3x3 checked_dw_conv3x3(const Tensor& x, const Tensor& weight, const Tensor& scale,
                                const Tensor& shift, int64_t stride, bool relu) {
  check_map(x, "x");
  Backend::check_device(x, "x");
  check_pixels(x);
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  return depthwise_of(x, weight, scale, shift, x.size(1), stride, relu);
}

template <class Backend>
Tensor dw_conv3x3(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                  int64_t stride, bool relu) {
  const auto dw = checked_dw_conv3x3<Backend>(x, weight, scale, shift, stride, relu);
  const Backend backend(x);
  const Layout layout = layout_of(x);
  Tensor out = empty_map(x, x.size(1), conv3x3_extent(x.size(2), stride),
                         conv3x3_extent(x.size(3), stride), layout);
  if (out.numel() == 0) return out;
  const Tensor in = dense(x, layout, "x");
  Backend::dw_conv3x3(map_of(in, layout), dw, map_of(out, layout), backend.where);
  return out;
}

template <class Backend>
Depthwise3x3 checked_split(const Tensor& x, const Tensor& weight, const Tensor& scale,
                           const Tensor& shift) {
  check_map(x, "x");
  Backend::check_device(x, "x");
  check_pixels(x);
  STD_TORCH_CHECK(x.size(1) % 2 == 0, "x must have an even number of channels, got ", x.size(1));
  return depthwise_of(x, weight, scale, shift, x.size(1) / 2, 1, true);
}

template <class Backend>
Tensor split_dw_cat_shuffle(const Tensor& x, const Tensor& weight, const Tensor& scale,
                            const Tensor& shift) {
  const auto dw = checked_split<Backend>(x, weight, scale, shift);
  const Backend backend(x);
  const Layout layout = layout_of(x);
  Tensor out = empty_map(x, x.size(1), x.size(2), x.size(3), layout);
  if (out.numel() == 0) return out;
  const Tensor in = dense(x, layout, "x");
  Backend::split_dw_cat_shuffle(map_of(in, layout), dw, map_of(out, layout), backend.where);
  return out;
}

// Gradients. A gradient has the memory format of what it is of, whatever that of `grad`.

inline void check_gradient(const Tensor& grad, const Tensor& x, int64_t stride) {
  check_map(grad, "grad");
  STD_TORCH_CHECK(grad.device() == x.device(), "grad and x must be on the same device");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad and x must have the same dtype");
  const int64_t height = conv3x3_extent(x.size(2), stride);
  const int64_t width = conv3x3_extent(x.size(3), stride);
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && grad.size(1) == x.size(1) &&
                      grad.size(2) == height && grad.size(3) == width,
                  "grad must be ", x.size(0), " x ", x.size(1), " x ", height, " x ", width);
}

template <class Backend>
std::tuple<Tensor, Tensor> cat_shuffle_backward(const Tensor& grad) {
  check_map(grad, "grad");
  Backend::check_device(grad, "grad");
  STD_TORCH_CHECK(grad.size(1) % 2 == 0, "grad must have an even number of channels, got ",
                  grad.size(1));
  const Backend backend(grad);
  const Layout layout = layout_of(grad);
  Tensor grad_a = empty_map(grad, grad.size(1) / 2, grad.size(2), grad.size(3), layout);
  Tensor grad_b = empty_map(grad, grad.size(1) / 2, grad.size(2), grad.size(3), layout);
  if (grad.numel() == 0) return {grad_a, grad_b};
  const Tensor in = dense(grad, layout, "grad");
  Backend::cat_shuffle_backward(map_of(in, layout), map_of(grad_a, layout), map_of(grad_b, layout),
                                backend.where);
  return {grad_a, grad_b};
}

using DepthwiseGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of x and the parameters

// run(grad, x, grad_x, gradients of the parameters, workspace, where)
template <class Backend, class Run>
DepthwiseGradients depthwise_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                      int64_t channels, const Run& run) {
  const Backend backend(x);
  const Layout layout = layout_of(x);
  const auto floats = [&](IntHeaderOnlyArrayRef shape) {
    return new_tensor("the gradients", shape, ScalarType::Float, x);
  };
  Tensor grad_x = empty_map(x, x.size(1), x.size(2), x.size(3), layout);
  Tensor grad_weight = floats(weight.sizes());
  Tensor grad_scale = floats({channels}), grad_shift = floats({channels});
  if (grad_x.numel() == 0) {
    for (Tensor* const sum : {&grad_weight, &grad_scale, &grad_shift}) torch::stable::zero_(*sum);
    return {grad_x, grad_weight, grad_scale, grad_shift};
  }
  const Tensor in = dense(x, layout, "x"), grad_in = dense(grad, layout, "grad");
  const FeatureMap map = map_of(in, layout);
  const Tensor workspace = floats({Backend::depthwise_backward_workspace(map, channels)});
  run(map_of(grad_in, layout), map, map_of(grad_x, layout),
      Depthwise3x3Gradients{static_cast<float*>(grad_weight.data_ptr()),
                            static_cast<float*>(grad_scale.data_ptr()),
                            static_cast<float*>(grad_shift.data_ptr())},
      static_cast<float*>(workspace.data_ptr()), backend.where);
  return {grad_x, grad_weight, grad_scale, grad_shift};
}

template <class Backend>
DepthwiseGradients dw_conv3x3_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                       const Tensor& scale, const Tensor& shift, int64_t stride,
                                       bool relu) {
  const auto dw = checked_dw_conv3x3<Backend>(x, weight, scale, shift, stride, relu);
  check_gradient(grad, x, stride);
  return depthwise_backward<Backend>(
      grad, x, weight, x.size(1),
      [&](const FeatureMap& grad_in, const FeatureMap& in, auto... rest) {
        Backend::dw_conv3x3_backward(grad_in, in, dw, rest...);
      });
}

template <class Backend>
DepthwiseGradients split_dw_cat_shuffle_backward(const Tensor& grad, const Tensor& x,
                                                 const Tensor& weight, const Tensor& scale,
                                                 const Tensor& shift) {
  const auto dw = checked_split<Backend>(x, weight, scale, shift);
  check_gradient(grad, x, 1);
  return depthwise_backward<Backend>(
      grad, x, weight, x.size(1) / 2,
      [&](const FeatureMap& grad_in, const FeatureMap& in, auto... rest) {
        Backend::split_dw_cat_shuffle_backward(grad_in, in, dw, rest...);
      });
}

template <class Library>
void define_ops(Library& m) {
  m.def("cat_shuffle(Tensor a, Tensor b) -> Tensor");
  m.def(
      "dw_conv3x3(Tensor x, Tensor weight, Tensor scale, Tensor shift, int stride=1, "
      "bool relu=False) -> Tensor");
  m.def("split_dw_cat_shuffle(Tensor x, Tensor weight, Tensor scale, Tensor shift) -> Tensor");
  m.def("cat_shuffle_backward(Tensor grad) -> (Tensor, Tensor)");
  m.def(
      "dw_conv3x3_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, Tensor shift, "
      "int stride=1, bool relu=False) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "split_dw_cat_shuffle_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, "
      "Tensor shift) -> (Tensor, Tensor, Tensor, Tensor)");
}

// Networks ---------------------------------------------------------------------------------

// Fake kernels see no plan, so the caller says what its results are.
inline void check_results(const std::vector<PlanResult>& results,
                          const std::vector<int64_t>& channels,
                          const std::vector<int64_t>& halvings) {
  STD_TORCH_CHECK(channels.size() == results.size() && halvings.size() == results.size(),
                  "channels and halvings must have an element for each of the plan's results, ",
                  results.size(), ", got ", channels.size(), " and ", halvings.size());
  for (size_t i = 0; i < results.size(); ++i) {
    STD_TORCH_CHECK(channels[i] == results[i].channels, "channels[", i, "] must be ",
                    results[i].channels, ", as in plan, got ", channels[i]);
    STD_TORCH_CHECK(halvings[i] == results[i].halvings, "halvings[", i, "] must be ",
                    results[i].halvings, ", as in plan, got ", halvings[i]);
  }
}

// The same for the ops that give one result.
inline void check_result(const std::vector<PlanResult>& results, int64_t out_channels,
                         int64_t halvings) {
  STD_TORCH_CHECK(results.size() == 1, "plan must have one result, has ", results.size());
  STD_TORCH_CHECK(out_channels == results[0].channels, "out_channels must be ", results[0].channels,
                  ", as in plan, got ", out_channels);
  STD_TORCH_CHECK(halvings == results[0].halvings, "halvings must be ", results[0].halvings,
                  ", as in plan, got ", halvings);
}

inline void check_classify(int64_t planned, bool classify) {
  STD_TORCH_CHECK((planned != 0) == classify, "classify must be ", planned != 0,
                  ", as in plan, got ", classify);
}

// Memory for the results of a plan for x, of which the last may be [N, classes].
inline std::vector<Tensor> empty_results(const Tensor& x, const std::vector<PlanResult>& planned,
                                         bool classify, Layout layout) {
  std::vector<Tensor> results;
  for (const PlanResult& result : planned) {
    if (classify && &result == &planned.back()) {
      results.push_back(new_tensor("the result", {x.size(0), result.channels}, x.scalar_type(), x));
      continue;
    }
    const int64_t height = halved(x.size(2), result.halvings);
    const int64_t width = halved(x.size(3), result.halvings);
    results.push_back(empty_map(x, result.channels, height, width, layout));
  }
  return results;
}

// Networks of the GPU backends; gpu_ops.h has the bodies.
template <class Library>
void define_gpu_ops(Library& m) {
  m.def(
      "gpu_network(Tensor x, Tensor weights, Tensor parameters, Tensor tables, Tensor plan, "
      "int out_channels, int halvings, bool classify) -> Tensor");
  m.def(
      "gpu_network_results(Tensor x, Tensor weights, Tensor parameters, Tensor tables, Tensor "
      "plan, "
      "int[] channels, int[] halvings, bool classify) -> Tensor[]");
  m.def(
      "gpu_network_out(Tensor x, Tensor weights, Tensor parameters, Tensor tables, Tensor plan, "
      "Tensor(a!) workspace, Tensor(b!)[] results, float[] scale, float[] shift) -> ()");
}

template <class Backend, class Library>
void implement_ops(Library& m) {
  m.impl("cat_shuffle", TORCH_BOX(&cat_shuffle<Backend>));
  m.impl("dw_conv3x3", TORCH_BOX(&dw_conv3x3<Backend>));
  m.impl("split_dw_cat_shuffle", TORCH_BOX(&split_dw_cat_shuffle<Backend>));
  m.impl("cat_shuffle_backward", TORCH_BOX(&cat_shuffle_backward<Backend>));
  m.impl("dw_conv3x3_backward", TORCH_BOX(&dw_conv3x3_backward<Backend>));
  m.impl("split_dw_cat_shuffle_backward", TORCH_BOX(&split_dw_cat_shuffle_backward<Backend>));
}

}  // namespace snv2::binding
