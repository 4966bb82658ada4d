// The one way to launch a kernel.
#pragma once

#include <array>
#include <cstdint>

#include "snv2/cuda.h"

namespace snv2::SNV2_GPU {

struct Launch {
  uint32_t grid_x = 1, grid_y = 1;
  uint32_t threads = 1;
  uint32_t cluster = 1;      // CTAs, along x
  int64_t shared_bytes = 0;  // dynamic
  bool cooperative = false;
  Stream stream = nullptr;
};

// Memory that a kernel may touch. The GPU never sees it; the emulator refuses all else, and adds
// it up to the least that the kernel must move.
struct Buffer {
  const void* address;
  int64_t bytes;
  bool written;
};
inline Buffer reads(const void* address, int64_t bytes) { return {address, bytes, false}; }
inline Buffer reads(const FeatureMap& map) {
  return {map.data, map.numel() * size_of(map.dtype), false};
}
inline Buffer writes(void* address, int64_t bytes) { return {address, bytes, true}; }
inline Buffer writes(const FeatureMap& map) {
  return {map.data, map.numel() * size_of(map.dtype), true};
}

}  // namespace snv2::SNV2_GPU

#ifdef SNV2_EMULATED
#include "emulator/launch.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace snv2::SNV2_GPU {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
  }
}

// Enqueues kernel(params). Throws std::runtime_error if CUDA refuses.
template <size_t N, class Params>
void launch(const Launch& config, const std::array<Buffer, N>&, void (*kernel)(Params),
            const Params& params) {
  if (config.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(config.shared_bytes)),
          "shared memory");
  }
  cudaLaunchAttribute attributes[2];
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
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(config.grid_x, config.grid_y);
  launch.blockDim = dim3(config.threads);
  launch.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  launch.stream = static_cast<cudaStream_t>(config.stream);
  launch.attrs = attributes;
  launch.numAttrs = count;
  check(cudaLaunchKernelEx(&launch, kernel, params), "launch");
}

}  // namespace snv2::SNV2_GPU
#endif
