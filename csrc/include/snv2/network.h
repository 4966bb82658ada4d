// A network from a file, ready to run on the CPU:
//
//   snv2::Network network = snv2::Network::load("net.snv2");
//   network.run({x, snv2::DType::kFloat32, snv2::Layout::kContiguous, 1, 3, 224, 224}, scores);
//
// Any batch and image size: memory is planned for each shape, and kept while it is large enough.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "snv2/program.h"
#include "snv2/types.h"

namespace snv2 {

// Images of bytes, [N, H, W, C], as decoders give them. They become (x / 255 - mean) / std.
struct Images {
  const uint8_t* data;
  int64_t batch;
  int64_t height;
  int64_t width;
};

// One call at a time; several networks may share a program, whose weights are then in memory once.
class SNV2_API Network {
 public:
  // `threads` 0: as many as usable_cores(). All throw as Program does.
  static Network load(const std::string& path, int64_t threads = 0);
  static Network view(const void* data, size_t size, int64_t threads = 0);
  explicit Network(std::shared_ptr<const Program> program, int64_t threads = 0);
  Network(Network&&) noexcept;
  Network& operator=(Network&&) noexcept;
  ~Network();

  const Program& program() const;
  int64_t threads() const;
  // The calling thread and others of shared_pool() (snv2/pool.h), which sleep between calls.
  void set_threads(int64_t threads);
  // Runs in the caller's threads from now on.
  void set_threads(const ParallelFor& parallel_for);

  // Bytes of memory that a run of this shape and dtype works in.
  int64_t workspace_bytes(DType dtype, int64_t batch, int64_t height, int64_t width) const;

  // `results` are as many as program().results(): dense maps of x's dtype and of the shapes that
  // Program::result_shape tells, the last one [N, classes] where the program classifies. Any of the
  // three dtypes and either layout. Throws std::invalid_argument naming what does not fit, and
  // std::runtime_error where there is no memory or another thread is inside.
  void run(const FeatureMap& x, const FeatureMap* results, size_t result_count);
  void run(const FeatureMap& x, const FeatureMap& result) { run(x, &result, 1); }
  // Runs bytes, which takes a program with a normalization; results are float32, contiguous.
  void run(const Images& x, const FeatureMap* results, size_t result_count);
  void run(const Images& x, const FeatureMap& result) { run(x, &result, 1); }
  // The same into memory of float32 for the last result alone, of a program that has one.
  void run(const FeatureMap& x, float* result);
  void run(const Images& x, float* result);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace snv2
