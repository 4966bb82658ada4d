// Runs the PTX that nvcc makes of the CUDA kernels on a CPU, and counts the instructions that are
// executed. docs/ptx.md tells what for.
//
// It stands in place of the CUDA runtime, for host code as nvcc compiles it, and knows nothing of
// csrc/emulator: each is a witness of what the other says.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "snv2/types.h"

namespace snv2::ptx {

// What the hardware leaves open: the order of warps and CTAs, the contents of registers and shared
// memory that nobody wrote, which lane's store is the last. With 0 all is in order.
SNV2_API void set_seed(uint32_t seed);

// The GPU that launches are cut to, by default an H200. To host code each size is a device of its
// own. Not while anything runs.
struct DeviceSize {
  int sms = 132;
  int shared_per_sm = 228 * 1024, shared_per_cta = 227 * 1024;
  bool clusters = true;
  int cluster_sms = 0;  // that clusters of more than two CTAs find; 0 is seven eighths

  bool operator==(const DeviceSize& other) const {
    const auto fields = [](const DeviceSize& d) {
      return std::tie(d.sms, d.shared_per_sm, d.shared_per_cta, d.clusters, d.cluster_sms);
    };
    return fields(*this) == fields(other);
  }
};
SNV2_API void set_device_size(const DeviceSize& size);

// Returns how often host code has asked the runtime what a device or a kernel is, or has set what
// a kernel may have.
SNV2_API int64_t questions();

// Has launches run one cluster (or CTA) in `apart`, and count the others as that one: for what
// large launches execute. Their results are wrong. Cooperative ones are run whole.
SNV2_API void sample(uint32_t apart);

// Reads all kernels, which is else done when they are launched, and returns how many they are.
// Throws std::runtime_error at an instruction that is not known.
SNV2_API int64_t read_kernels();

// Has kernels that contain `kernel` in their names run with each `from` in their PTX replaced, to
// see that a fault is found. Returns how often it is there; an empty `kernel` takes all back.
SNV2_API int64_t replace_text(const std::string& kernel, const std::string& from,
                              const std::string& to);

// Instructions that warps executed since the counts were reset, by all host threads.
struct Count {
  std::string kernel;  // its mangled name
  std::string place;   // "file:line", and " in file:line" of each call that it is inlined by
  int64_t instructions;
};
SNV2_API std::vector<Count> launch_counts();  // of each launch in order; no places
SNV2_API std::vector<Count> line_counts();
SNV2_API void reset_counts();

}  // namespace snv2::ptx
