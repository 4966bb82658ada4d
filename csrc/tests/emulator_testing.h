// Small kernels on words, and what is expected of them.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "check.h"
#include "cuda/isa.h"
#include "cuda/launch.h"
#include "emulator/emulator.h"
#include "race_reports.h"
#include "snv2/cuda.h"

namespace snv2::SNV2_GPU {

constexpr int kWords = 4096;
alignas(128) inline uint32_t input[kWords];
alignas(128) inline uint32_t output[kWords];

struct Params {
  Global<const uint32_t> in;
  Global<uint32_t> out;
};

inline int thread() { return static_cast<int>(threadIdx.x); }
inline int cta() { return static_cast<int>(blockIdx.x); }
inline Shared<uint32_t> shared_words() { return shared_memory().as<uint32_t>(); }
// What a kernel was given to write, or may only read, seen as the other.
inline Global<const uint32_t> readable(Global<uint32_t> p) { return {p.address}; }
inline Global<uint32_t> writable(Global<const uint32_t> p) {
  return {const_cast<uint32_t*>(p.address)};
}

struct Shape {
  uint32_t threads = 64;
  int64_t shared_bytes = 256;
  uint32_t ctas = 1;
  uint32_t cluster = 1;
  bool cooperative = false;
};

using Kernel = void (*)(Params);

// The kernel may read and write `words` words.
inline void run(Kernel kernel, const Shape& shape = {}, int words = 64) {
  for (int i = 0; i < kWords; ++i) {
    input[i] = static_cast<uint32_t>(i);
  }
  Launch config;
  config.grid_x = shape.ctas;
  config.threads = shape.threads;
  config.cluster = shape.cluster;
  config.shared_bytes = shape.shared_bytes;
  config.cooperative = shape.cooperative;
  launch(config, std::array{reads(input, 4 * words), writes(output, 4 * words)}, kernel,
         Params{{input}, {output}});
}

template <class F>
std::string fault_of(F&& f) {
  try {
    f();
  } catch (const emulator::Fault& fault) {
    return fault.what();
  } catch (const std::exception& error) {
    return std::string("no Fault: ") + error.what();
  }
  return "";
}

template <class F, class... Words>
void expect_fault(F&& f, Words... words) {
  const std::string message = fault_of(f);
  CHECK(!message.empty(), "nothing thrown");
  CHECK(message.rfind("no Fault: ", 0) != 0, "%s", message.c_str());
  for (const char* word : {words...}) {
    CHECK(message.find(word) != std::string::npos, "no \"%s\" in \"%s\"", word, message.c_str());
  }
}

template <class F>
void expect_none(F&& f) {
  const std::string message = fault_of(f);
  CHECK(message.empty(), "%s", message.c_str());
}

// The emulator reports the race of the one kernel, and none of its twin. So does ThreadSanitizer,
// in a build for it, without the emulator's help.
template <class... Words>
void expect_race(const char* name, Kernel faulty, Kernel twin, const Shape& shape, int words,
                 Words... more) {
  expect_fault([&] { run(faulty, shape, words); }, "race", more...);
  expect_none([&] { run(twin, shape, words); });
  if (!kTsan) return;
  CHECK(take_tsan_reports().empty());
  emulator::check_races(false);
  expect_none([&] { run(faulty, shape, words); });
  const std::string found = take_tsan_reports();
  CHECK(found.find("data-race") != std::string::npos, "ThreadSanitizer reports nothing");
  CHECK(found.find(name) != std::string::npos, "no %s in %s", name, found.c_str());
  expect_none([&] { run(twin, shape, words); });
  const std::string wrong = take_tsan_reports();
  CHECK(wrong.empty(), "%s", wrong.c_str());
  emulator::check_races(true);
}

}  // namespace snv2::SNV2_GPU
