// The ops of the CUDA backend, in the library of its kernels. ops.cpp defines their schemas.
#define SNV2_GPU cuda
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "gpu_ops.h"

namespace {

using namespace snv2::binding;
using namespace snv2::binding::cuda;

gpu::Stream current_stream(int32_t device) {
  gpu::Stream stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Torch allocates on the current stream of a device and may hand memory on to later work there, so
// kernels run on no other.
struct Cuda : GpuKernels {
  torch::stable::accelerator::DeviceGuard guard;
  gpu::Stream where;

  explicit Cuda(const Tensor& t)
      : guard(t.get_device_index()), where(current_stream(t.get_device_index())) {}

  static void check_device(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cuda(), name, " must be a CUDA tensor");
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(snv2, m) { define_gpu_tools(m); }

STABLE_TORCH_LIBRARY_IMPL(snv2, CUDA, m) { implement_gpu_ops<Cuda>(m); }

STABLE_TORCH_LIBRARY_IMPL(snv2, CompositeExplicitAutograd, m) { implement_gpu_tools(m); }
