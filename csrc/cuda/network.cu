// Placeholder until the kernels of networks are here.
#include <stdexcept>

#include "snv2/cuda.h"

namespace snv2::SNV2_GPU {
namespace {

[[noreturn]] void missing() { throw std::runtime_error("networks are not implemented yet"); }

#ifdef SNV2_EMULATED
Device the_device = {132, 227 * 1024, 227 * 1024, 50 * 1024 * 1024};
#endif

}  // namespace

#ifdef SNV2_EMULATED
Device device(int) { return the_device; }
void set_device(const Device& device) { the_device = device; }
#else
Device device(int) { missing(); }
void set_device(const Device&) { missing(); }
#endif

int64_t images_at_once(const GpuPlan&, int64_t, int64_t, int64_t, const Device&) { missing(); }

int64_t workspace_bytes(const GpuPlan&, int64_t, int64_t, int64_t, const Device&) { return 256; }

void run_network(const GpuPlan&, const PlanArrays&, const Image&, const FeatureMap*, int64_t, void*,
                 int64_t, const Device&, Stream) {
  missing();
}

void describe_network(const GpuPlan&, int64_t, int64_t, int64_t, const Device&, LaunchInfo*,
                      int64_t, int64_t& count) {
  count = 0;
}

}  // namespace snv2::SNV2_GPU
