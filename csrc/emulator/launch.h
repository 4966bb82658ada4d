// launch() of csrc/cuda/launch.h on the emulator.
#pragma once

#include <vector>

#include "emulator/calls.h"

namespace snv2::SNV2_GPU {

template <class Params>
void launch(const Launch& config, const Buffers& buffers, void (*kernel)(Params),
            const Params& params) {
  std::vector<emulator::Region> regions;
  for (size_t i = 0; i < buffers.size(); ++i) {
    const Buffer& b = buffers[i];
    regions.push_back({static_cast<unsigned char*>(const_cast<void*>(b.address)), b.bytes,
                       b.read_bytes, b.written_bytes,
                       b.use == Buffer::Use::kWrites || b.use == Buffer::Use::kUpdates,
                       b.use == Buffer::Use::kWrites, b.use == Buffer::Use::kConstants});
  }
  struct Call {
    void (*kernel)(Params);
    const Params& params;
  } call{kernel, params};
  emulator::remember_parameters(config.threads, &params, sizeof params);
  emulator::run(
      {{config.grid_x, config.grid_y, 1},
       config.threads,
       config.cluster,
       config.shared_bytes,
       config.cooperative,
       config.overlaps},
      regions.data(), static_cast<int>(regions.size()),
      [](const void* arg) {
        const Call& call = *static_cast<const Call*>(arg);
        call.kernel(call.params);
      },
      &call);
}

}  // namespace snv2::SNV2_GPU
