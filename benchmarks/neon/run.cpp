// run FILE DTYPE: the second run of a program on one thread, for count.c. DTYPE is that of the
// image and the scores as snv2::DType numbers it.
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "snv2/network.h"

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  snv2::Network network = snv2::Network::load(argv[1], 1);
  const auto dtype = static_cast<snv2::DType>(std::atoi(argv[2]));
  const int64_t* const shape = network.program().input().shape;
  const int64_t classes = network.program().results().back().channels;
  // Bytes of 0x3e are numbers near 0.2 in float32 and bfloat16.
  std::vector<uint8_t> x(static_cast<size_t>(4 * 3 * shape[2] * shape[3]), 0x3e);
  std::vector<float> scores(static_cast<size_t>(classes));
  const auto run = [&] {
    network.run({x.data(), dtype, snv2::Layout::kContiguous, 1, 3, shape[2], shape[3]},
                {scores.data(), dtype, snv2::Layout::kContiguous, 1, classes, 1, 1});
  };
  run();
  asm volatile("hint #0x5a");
  run();
}
