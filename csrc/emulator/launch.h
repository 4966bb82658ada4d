// launch() of csrc/cuda/launch.h on the emulator.
#pragma once

#include "emulator/machine.h"

namespace snv2::SNV2_GPU {

template <size_t N, class Params>
void launch(const Launch& config, const std::array<Buffer, N>& buffers, void (*kernel)(Params),
            const Params& params) {
  emulator::Region regions[N + 1];
  for (size_t i = 0; i < N; ++i) {
    regions[i] = {static_cast<unsigned char*>(const_cast<void*>(buffers[i].address)),
                  buffers[i].bytes, buffers[i].written};
  }
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  } call{kernel, params};
  emulator::run(
      {{config.grid_x, config.grid_y, 1},
       config.threads,
       config.cluster,
       config.shared_bytes,
       config.cooperative},
      regions, static_cast<int>(N),
      [](const void* arg) {
        const Call& call = *static_cast<const Call*>(arg);
        call.kernel(call.params);
      },
      &call);
}

}  // namespace snv2::SNV2_GPU
