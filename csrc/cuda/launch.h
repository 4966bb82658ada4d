// The one way to launch a kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>

#include "snv2/cuda.h"

namespace snv2::SNV2_GPU {

struct Launch {
  uint32_t grid_x = 1, grid_y = 1;
  uint32_t threads = 1;
  uint32_t cluster = 1;      // CTAs, along x
  int64_t shared_bytes = 0;  // dynamic
  bool cooperative = false;
  // May begin while the kernel before it in the stream still runs, where the GPU can. All threads
  // then call grid_dependency_wait() before they touch what is not constants().
  bool overlaps = false;
  Stream stream = nullptr;
};

// Memory that a kernel may touch. The GPU never sees it; the emulator refuses all else, and adds
// it up to the least that the kernel must move.
struct Buffer {
  enum class Use { kReads, kConstants, kWrites, kUpdates };

  const void* address;
  int64_t bytes;
  Use use;
  int64_t read_bytes, written_bytes;  // at least
};
inline Buffer reads(const void* address, int64_t bytes) {
  return {address, bytes, Buffer::Use::kReads, bytes, 0};
}
inline Buffer reads(const FeatureMap& map) {
  return reads(map.data, map.numel() * size_of(map.dtype));
}
// What no kernel writes, as weights.
inline Buffer constants(const void* address, int64_t bytes) {
  return {address, bytes, Buffer::Use::kConstants, bytes, 0};
}
// What holds nothing before, and is written all over.
inline Buffer writes(void* address, int64_t bytes) {
  return {address, bytes, Buffer::Use::kWrites, 0, bytes};
}
inline Buffer writes(const FeatureMap& map) {
  return writes(map.data, map.numel() * size_of(map.dtype));
}
// What holds something before, and of which some parts are read and some written, as the planes
// of a workspace.
inline Buffer updates(void* address, int64_t bytes, int64_t read_bytes, int64_t written_bytes) {
  return {address, bytes, Buffer::Use::kUpdates, read_bytes, written_bytes};
}

// A view of any array or vector of them. Only what is read may overlap with others.
class Buffers {
 public:
  template <class Range>
  Buffers(const Range& range) : data_(std::data(range)), size_(std::size(range)) {}

  size_t size() const { return size_; }
  const Buffer& operator[](size_t i) const { return data_[i]; }

 private:
  const Buffer* data_;
  size_t size_;
};

}  // namespace snv2::SNV2_GPU

#ifdef SNV2_EMULATED
#include "emulator/launch.h"
#else

#include <cuda_runtime.h>
#ifdef SNV2_PTX
#include "ptx/buffers.h"
#endif

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace snv2::SNV2_GPU {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
  }
}

// Whether the code that this GPU runs for `kernel` has grid_dependency_wait() in it. The first time
// on a device its limit of shared memory is raised to the most there is: a limit for each launch
// would be shared by threads that launch with different ones.
inline bool prepare(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, bool> prepared;
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(device, kernel);
  if (const auto found = prepared.find(key); found != prepared.end()) return found->second;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "attributes of a kernel");
  int most = 0;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared memory of a device");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             most - static_cast<int>(attributes.sharedSizeBytes)),
        "shared memory of a kernel");
  // An SM has to drain before it divides its memory in another way, so all kernels want the same:
  // else launches would not overlap.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        "shared memory of a kernel");
  return prepared[key] = attributes.ptxVersion >= 90;
}

// Enqueues kernel(params). Throws std::runtime_error if CUDA refuses.
template <class Params>
void launch(const Launch& config, [[maybe_unused]] const Buffers& buffers, void (*kernel)(Params),
            const Params& params) {
  const bool can_overlap = prepare(reinterpret_cast<const void*>(kernel));
  cudaLaunchAttribute attributes[3];
  unsigned count = 0;
  if (config.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = config.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (config.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count].val.cooperative = 1;
    ++count;
  }
  if (config.overlaps && can_overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(config.grid_x, config.grid_y);
  launch.blockDim = dim3(config.threads);
  launch.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  launch.stream = static_cast<cudaStream_t>(config.stream);
  launch.attrs = attributes;
  launch.numAttrs = count;
#ifdef SNV2_PTX
  for (size_t i = 0; i < buffers.size(); ++i) {
    const Buffer& b = buffers[i];
    const bool undefined = b.use == Buffer::Use::kWrites;
    ptx::declare_buffer(b.address, b.bytes, undefined || b.use == Buffer::Use::kUpdates,
                        b.use == Buffer::Use::kConstants, undefined);
  }
#endif
  check(cudaLaunchKernelEx(&launch, kernel, params), "launch");
}

}  // namespace snv2::SNV2_GPU
#endif
