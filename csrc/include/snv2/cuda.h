// The CUDA backend. All functions enqueue one kernel on `stream` and return; they allocate
// nothing, and can be captured in a graph. Pointers are device memory. Arguments that do not fit
// together throw std::invalid_argument, a launch that fails throws std::runtime_error with
// CUDA's own words. Results are computed in float32 and rounded once.
//
// The same sources are compiled twice, into two libraries: for the GPU in the namespace
// snv2::cuda, and for the emulator (docs/emulator.md) in snv2::emulated, where pointers are
// ordinary memory, `stream` is ignored, and a kernel has run when the call returns.
#pragma once

#include "snv2/gpu_plan.h"
#include "snv2/types.h"

#ifndef SNV2_GPU
#define SNV2_GPU cuda
#endif

namespace snv2::SNV2_GPU {

using Stream = void*;  // a cudaStream_t

// out[:, 2i] = a[:, i]; out[:, 2i + 1] = b[:, i]
SNV2_API void cat_shuffle(const FeatureMap& a, const FeatureMap& b, const FeatureMap& out,
                          Stream stream);

// dw_conv3x3 of x with padding 1, then scale, shift and ReLU as `dw` says.
SNV2_API void dw_conv3x3(const FeatureMap& x, const Depthwise3x3& dw, const FeatureMap& out,
                         Stream stream);

// out[:, 2i] = x[:, i]; out[:, 2i + 1] = relu(dw3x3(x[:, C/2 + i]))
SNV2_API void split_dw_cat_shuffle(const FeatureMap& x, const Depthwise3x3& dw,
                                   const FeatureMap& out, Stream stream);

// Gradients; csrc/include/snv2/cpu.h says of what. Those with parameters are two kernels.
SNV2_API void cat_shuffle_backward(const FeatureMap& grad, const FeatureMap& grad_a,
                                   const FeatureMap& grad_b, Stream stream);
SNV2_API int64_t depthwise_backward_workspace(const FeatureMap& x, int64_t channels);
SNV2_API void dw_conv3x3_backward(const FeatureMap& grad, const FeatureMap& x,
                                  const Depthwise3x3& dw, const FeatureMap& grad_x,
                                  const Depthwise3x3Gradients& grads, float* workspace,
                                  Stream stream);
SNV2_API void split_dw_cat_shuffle_backward(const FeatureMap& grad, const FeatureMap& x,
                                            const Depthwise3x3& dw, const FeatureMap& grad_x,
                                            const Depthwise3x3Gradients& grads, float* workspace,
                                            Stream stream);

// Networks ---------------------------------------------------------------------------------

// Choices that are made by rule where they are 0 or cannot be had, for tuning.
struct Tuning {
  int64_t columns;       // pixels of a unit's step
  int64_t rows_per_cta;  // output rows that a CTA of a unit takes
  int64_t weights;       // of a unit: 1 in shared memory, 2 from L2, 3 spread over a cluster
  int64_t images;        // taken through the network at once
  // Stages of units in one launch of clusters: 0 no, a launch for each unit; 1 where that is
  // expected to be faster; 2 wherever they fit.
  int64_t stages;
};

// What a network's kernels are cut to, in bytes.
struct Device {
  int64_t sms;
  int64_t shared_per_sm;
  int64_t shared_per_cta;    // the most that one can ask for
  int64_t reserved_per_cta;  // taken by the system from each CTA's share of the SM
  int64_t l2_bytes;
  int64_t cluster;  // the most CTAs of a cluster; 1 where there are none
  // Clusters of 4 and of 8 CTAs that run at once, by CTAs on an SM, 1 or 2. 0 is not known, as of a
  // GPU that is not there.
  int64_t clusters_at_once[2][2];
  Tuning tuning;
};

// The current device, which is asked once, with the tuning of this process. The emulator's is an
// H200, unless set_device() said otherwise, which throws on a GPU.
SNV2_API Device current_device();
SNV2_API void set_device(const Device& device);
SNV2_API void set_tuning(const Tuning& tuning);

// The image that a network is given: a map of its dtype, or bytes.
struct Image {
  FeatureMap map;
  // Pixels of 8 bits: map.data holds [N, H, W, C] bytes, map.dtype is that of the network, and
  // channel c is byte * scale[c] + shift[c] (C <= 4), rounded to it.
  bool bytes;
  float scale[4];
  float shift[4];
};

// The arrays of a plan, in device memory; see snv2/gpu_plan.h.
struct PlanArrays {
  const void* weights;
  const float* parameters;
  const int32_t* tables;
};

// Images that are taken through the network at once: their planes should stay in L2.
SNV2_API int64_t images_at_once(const GpuPlan& plan, int64_t batch, int64_t height, int64_t width,
                                const Device& device);

// Bytes that run_network needs for this input.
SNV2_API int64_t workspace_bytes(const GpuPlan& plan, int64_t batch, int64_t height, int64_t width,
                                 const Device& device);

// Enqueues all steps, one kernel each; a head is two. `results` are the caller's, in the order of
// the plan: dense maps in the layout of x (contiguous for bytes), the last one [N, classes] if the
// plan classifies (height = width = 1). `workspace` is aligned to 256 bytes.
SNV2_API void run_network(const GpuPlan& plan, const PlanArrays& arrays, const Image& x,
                          const FeatureMap* results, int64_t result_count, void* workspace,
                          int64_t workspace_size, const Device& device, Stream stream);

// How one step would be launched, and what it moves.
struct LaunchInfo {
  const char* kernel;
  int64_t step;  // of the plan
  int64_t ctas;
  int64_t threads;
  int64_t shared_bytes;   // of a CTA
  int64_t columns;        // pixels of a tile (units: of a step down the map)
  bool resident;          // weights are read once by each CTA and kept in shared memory
  int64_t cluster;        // CTAs that share the weights
  int64_t launches;       // 1, or more where the batch is taken in chunks
  int64_t read_bytes;     // of maps, by all launches
  int64_t written_bytes;  // of maps
  int64_t weight_bytes;   // of weights and parameters, each time that a CTA reads them
  int64_t multiply_adds;  // with halo and padding
  // Estimates by which units are cut (csrc/cuda/unit_cost.h); 0 for other kernels.
  int64_t instructions;  // of warps, by all launches
  int64_t cycles;  // of the CTAs of an SM, one after another, if they wait for themselves alone
};
// Launches of run_network for this input, in order; `count` gets how many there are, at most
// `capacity` are written.
SNV2_API void describe_network(const GpuPlan& plan, int64_t batch, int64_t height, int64_t width,
                               const Device& device, LaunchInfo* infos, int64_t capacity,
                               int64_t& count);

// Conformance: one small kernel for each instruction of csrc/cuda/isa.h, to be fed the same
// random bits on a GPU and on the emulator.
struct ConformanceCase {
  const char* name;
  int64_t in_words;   // of 32 bits
  int64_t out_words;  // of 32 bits
};

// All cases, ended by one whose name is null.
SNV2_API const ConformanceCase* conformance_cases();

// Runs case `index` from `in` to `out`, both 16-byte aligned. Throws std::out_of_range if there
// is no such case.
SNV2_API void run_conformance(int64_t index, const void* in, void* out, Stream stream);

}  // namespace snv2::SNV2_GPU
