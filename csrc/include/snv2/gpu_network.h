// A network from a file on a GPU, or on the emulator; see snv2/cuda.h for the two.
#pragma once

#include <cstddef>
#include <memory>

#include "snv2/cuda.h"
#include "snv2/network.h"
#include "snv2/program.h"

namespace snv2::SNV2_GPU {

// One call at a time: they share memory, so calls on several streams must wait for each other.
class SNV2_API GpuNetwork {
 public:
  // Copies the plan for maps of `dtype` to the current device, where all calls are made then.
  // Throws std::invalid_argument where the program has none, std::runtime_error in CUDA's words.
  GpuNetwork(std::shared_ptr<const Program> program, DType dtype);
  GpuNetwork(GpuNetwork&&) noexcept;
  ~GpuNetwork();

  // Enqueues a run of Network's on `stream`: x and results are in device memory, of the network's
  // dtype, and the results in x's layout (contiguous for bytes). A call that is larger than all
  // before it allocates, and waits for the device; others may be captured in a graph.
  void run(const FeatureMap& x, const FeatureMap* results, size_t result_count, Stream stream);
  void run(const Images& x, const FeatureMap* results, size_t result_count, Stream stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace snv2::SNV2_GPU
