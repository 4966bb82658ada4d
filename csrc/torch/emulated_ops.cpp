// The ops of the backend cuda-emulated: the CUDA kernels on CPU tensors. A namespace of their own,
// since the dispatcher knows one kernel for each op and device.
#define SNV2_GPU emulated
#include "gpu_ops.h"

namespace {

using namespace snv2::binding;
using namespace snv2::binding::emulated;

struct Emulated : GpuKernels {
  gpu::Stream where = nullptr;

  explicit Emulated(const Tensor&) {}

  static void check_device(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  }
};

}  // namespace

STABLE_TORCH_LIBRARY(snv2_emulated, m) {
  define_ops(m);
  define_gpu_ops(m);
  define_gpu_tools(m);
}

STABLE_TORCH_LIBRARY_IMPL(snv2_emulated, CPU, m) { implement_gpu_ops<Emulated>(m); }

STABLE_TORCH_LIBRARY_IMPL(snv2_emulated, CompositeExplicitAutograd, m) { implement_gpu_tools(m); }
