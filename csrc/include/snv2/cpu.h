// The CPU backend. All functions are safe to call from several threads at once, allocate at
// most scratch of a few rows (run_network: nothing), and throw std::invalid_argument for
// arguments that do not fit together. Sums are in float32. So is all else in the stand-alone ops
// and in plans for float32, whose results are rounded once; plans for bfloat16 multiply in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "snv2/plan.h"
#include "snv2/types.h"

namespace snv2::cpu {

// Name of the instruction set in use: "amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni",
// "avx2", "neon_bf16", "neon_dot", "neon" or "portable". The best one the machine has, or the one
// named by the environment variable SNV2_CPU_ISA.
SNV2_API const char* isa();

// Whether the instruction set in use runs plans for bfloat16. All run those for float32 and of
// integers.
SNV2_API bool has_bfloat16();

// Switches this process to another instruction set; false if the machine lacks it or the
// name is unknown. For tests: calls already running keep theirs.
SNV2_API bool set_isa(const char* name);

// Null-terminated list of what this build and machine can run, best first.
SNV2_API const char* const* available_isas();

// out[:, 2i] = a[:, i]; out[:, 2i + 1] = b[:, i]
SNV2_API void cat_shuffle(const FeatureMap& a, const FeatureMap& b, const FeatureMap& out,
                          const ParallelFor& parallel_for);

// dw_conv3x3 of x with padding 1, then scale, shift and ReLU as `dw` says.
SNV2_API void dw_conv3x3(const FeatureMap& x, const Depthwise3x3& dw, const FeatureMap& out,
                         const ParallelFor& parallel_for);

// out[:, 2i] = x[:, i]; out[:, 2i + 1] = relu(dw3x3(x[:, C/2 + i]))
SNV2_API void split_dw_cat_shuffle(const FeatureMap& x, const Depthwise3x3& dw,
                                   const FeatureMap& out, const ParallelFor& parallel_for);

// Gradients. The maps are dense and of one layout and dtype; the parameters' gradients are summed
// in an order that depends on shapes alone. A NaN or an infinity in grad or x reaches what the
// formula multiplies it with, as in PyTorch, but ReLU passes no gradient where its input is not
// above zero.

// grad_a[:, i] = grad[:, 2i]; grad_b[:, i] = grad[:, 2i + 1]
SNV2_API void cat_shuffle_backward(const FeatureMap& grad, const FeatureMap& grad_a,
                                   const FeatureMap& grad_b, const ParallelFor& parallel_for);

// Floats of workspace that the two functions below need for a convolution of `channels` on x.
SNV2_API int64_t depthwise_backward_workspace(const FeatureMap& x, int64_t channels);

// Of dw_conv3x3(x, dw), from the gradient of its result.
SNV2_API void dw_conv3x3_backward(const FeatureMap& grad, const FeatureMap& x,
                                  const Depthwise3x3& dw, const FeatureMap& grad_x,
                                  const Depthwise3x3Gradients& grads, float* workspace,
                                  const ParallelFor& parallel_for);

// Of split_dw_cat_shuffle(x, dw), from the gradient of its result.
SNV2_API void split_dw_cat_shuffle_backward(const FeatureMap& grad, const FeatureMap& x,
                                            const Depthwise3x3& dw, const FeatureMap& grad_x,
                                            const Depthwise3x3Gradients& grads, float* workspace,
                                            const ParallelFor& parallel_for);

// Bytes run_network needs for this input with this many threads.
SNV2_API int64_t workspace_bytes(const Plan& plan, int64_t batch, int64_t height, int64_t width,
                                 int64_t threads);

// Runs all steps. `results` are as many as plan.result_count(), in the order of the steps that
// write them: feature maps, and the last one may be [N, classes] (height = width = 1); all of x's
// dtype, or of one of floats for bytes, which a plan of integers takes. `weights` is the float
// buffer the plan was made with; `workspace` is 64-byte aligned. Throws std::runtime_error for a
// plan whose element the instruction set in use does not run. `parallel_for` is called once, for as
// many bodies as it has threads: those that run at the same time share the work, and if they run
// one after the other the first does all of it.
SNV2_API void run_network(const Plan& plan, const float* weights, const FeatureMap& x,
                          const FeatureMap* results, int64_t result_count, void* workspace,
                          int64_t workspace_size, const ParallelFor& parallel_for);

// The same for a plan with one result.
inline void run_network(const Plan& plan, const float* weights, const FeatureMap& x,
                        const FeatureMap& out, void* workspace, int64_t workspace_size,
                        const ParallelFor& parallel_for) {
  run_network(plan, weights, x, &out, 1, workspace, workspace_size, parallel_for);
}

// For benchmarks: does at least `count` multiply-adds of float32, bfloat16 or bytes in registers,
// as fast as one core can with the instruction set in use, and returns how many.
SNV2_API int64_t run_multiply_adds(int64_t count, DType element = DType::kFloat32);

// For benchmarks: time that all threads together spent in kernels with these weights.
struct KernelTime {
  const float* weights = nullptr;
  int64_t calls = 0;
  int64_t nanoseconds = 0;
};

// Count the time of every kernel that run_network calls, from zero, until stopped.
SNV2_API void start_kernel_times();
SNV2_API std::vector<KernelTime> stop_kernel_times();

}  // namespace snv2::cpu
