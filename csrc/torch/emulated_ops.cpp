// The ops of the backend cuda-emulated: the CUDA kernels on CPU tensors. A namespace of their own,
// since the dispatcher knows one kernel for each op and device.
#define SNV2_GPU emulated
#include "emulator/emulator.h"
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

void set_device(std::vector<int64_t> fields) {
  const gpu::Device device = device_of(fields);
  gpu::set_device(device);
  gpu::set_tuning(device.tuning);
}

// Returns what launches of this thread did, in the order of snv2_kernels.emulator.COUNTERS.
std::vector<int64_t> counters() {
  const snv2::emulator::Counters c = snv2::emulator::counters();
  return {c.launches,
          c.ctas,
          c.global_load_bytes,
          c.global_store_bytes,
          c.global_load_sectors,
          c.global_store_sectors,
          c.minimum_load_bytes,
          c.minimum_store_bytes,
          c.shared_accesses,
          c.shared_wavefronts,
          c.bank_conflicts,
          c.mma,
          c.barriers,
          c.shared_bytes};
}

void reset_counters() { snv2::emulator::reset_counters(); }

// Returns a line for each of the latest launches: threads of a CTA, and parameters in hexadecimal.
std::string latest_parameters() {
  std::string lines;
  for (const auto& launch : snv2::emulator::latest_parameters()) {
    lines += std::to_string(launch.threads) + " ";
    for (const unsigned char byte : launch.bytes) {
      lines += {"0123456789abcdef"[byte / 16], "0123456789abcdef"[byte % 16]};
    }
    lines += "\n";
  }
  return lines;
}

}  // namespace

STABLE_TORCH_LIBRARY(snv2_emulated, m) {
  define_ops(m);
  define_gpu_ops(m);
  define_gpu_tools(m);
  m.def("set_device(int[] device) -> ()");
  m.def("counters() -> int[]");
  m.def("reset_counters() -> ()");
  m.def("latest_parameters() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(snv2_emulated, CPU, m) { implement_gpu_ops<Emulated>(m); }

STABLE_TORCH_LIBRARY_IMPL(snv2_emulated, CompositeExplicitAutograd, m) {
  implement_gpu_tools(m);
  m.impl("set_device", TORCH_BOX(&set_device));
  m.impl("counters", TORCH_BOX(&counters));
  m.impl("reset_counters", TORCH_BOX(&reset_counters));
  m.impl("latest_parameters", TORCH_BOX(&latest_parameters));
}
