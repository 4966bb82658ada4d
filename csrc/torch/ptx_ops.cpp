// The ops of the tests' backend cuda-ptx: the CUDA kernels as nvcc's PTX, on CPU tensors.
#define SNV2_GPU interpreted
#include "gpu_ops.h"
#include "ptx/ptx.h"

namespace {

using namespace snv2::binding;
using namespace snv2::binding::interpreted;

struct Interpreted : GpuKernels {
  gpu::Stream where = nullptr;

  explicit Interpreted(const Tensor&) {}

  static void check_device(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  }
};

void set_seed(int64_t seed) { snv2::ptx::set_seed(static_cast<uint32_t>(seed)); }

void set_device_size(int64_t sms, int64_t shared_per_sm, int64_t shared_per_cta, bool clusters,
                     int64_t cluster_sms) {
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  snv2::ptx::set_device_size(
      {narrow(sms), narrow(shared_per_sm), narrow(shared_per_cta), clusters, narrow(cluster_sms)});
}

int64_t questions() { return snv2::ptx::questions(); }

void sample(int64_t apart) {
  STD_TORCH_CHECK(apart >= 1, "apart: expected a positive number, got ", apart);
  snv2::ptx::sample(static_cast<uint32_t>(apart));
}

int64_t read_kernels() { return snv2::ptx::read_kernels(); }

int64_t replace_text(std::string kernel, std::string from, std::string to) {
  return snv2::ptx::replace_text(kernel, from, to);
}

// Lines of "kernel place", and the instructions of each.
using Counts = std::tuple<std::string, std::vector<int64_t>>;
Counts of(const std::vector<snv2::ptx::Count>& counts) {
  std::string names;
  std::vector<int64_t> instructions;
  for (const snv2::ptx::Count& c : counts) {
    names += c.kernel + " " + c.place + "\n";
    instructions.push_back(c.instructions);
  }
  return {names, instructions};
}
Counts launch_counts() { return of(snv2::ptx::launch_counts()); }
Counts line_counts() { return of(snv2::ptx::line_counts()); }
void reset_counts() { snv2::ptx::reset_counts(); }

}  // namespace

STABLE_TORCH_LIBRARY(snv2_ptx, m) {
  define_ops(m);
  define_gpu_ops(m);
  define_gpu_tools(m);
  m.def("set_seed(int seed) -> ()");
  m.def(
      "set_device_size(int sms, int shared_per_sm, int shared_per_cta, bool clusters, int "
      "cluster_sms=0) -> ()");
  m.def("questions() -> int");
  m.def("sample(int apart) -> ()");
  m.def("read_kernels() -> int");
  m.def("replace_text(str kernel, str old, str new) -> int");
  m.def("launch_counts() -> (str, int[])");
  m.def("line_counts() -> (str, int[])");
  m.def("reset_counts() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(snv2_ptx, CPU, m) { implement_gpu_ops<Interpreted>(m); }

STABLE_TORCH_LIBRARY_IMPL(snv2_ptx, CompositeExplicitAutograd, m) {
  implement_gpu_tools(m);
  m.impl("set_seed", TORCH_BOX(&set_seed));
  m.impl("set_device_size", TORCH_BOX(&set_device_size));
  m.impl("questions", TORCH_BOX(&questions));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("read_kernels", TORCH_BOX(&read_kernels));
  m.impl("replace_text", TORCH_BOX(&replace_text));
  m.impl("launch_counts", TORCH_BOX(&launch_counts));
  m.impl("line_counts", TORCH_BOX(&line_counts));
  m.impl("reset_counts", TORCH_BOX(&reset_counts));
}
