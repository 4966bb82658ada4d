#include <algorithm>
#include <cmath>
#include <mutex>
#include <stdexcept>

#include "program_memory.h"
#include "snv2/cpu.h"
#include "snv2/network.h"
#include "snv2/pool.h"

namespace snv2 {
namespace {

constexpr int64_t kMostThreads = 1024;

int64_t checked_threads(int64_t threads) {
  if (threads < 0 || threads > kMostThreads) {
    throw std::invalid_argument("threads: expected 0 to " + std::to_string(kMostThreads) +
                                ", got " + std::to_string(threads));
  }
  return threads != 0 ? threads : usable_cores();
}

std::string text(const FeatureMap& map) {
  return "[" + std::to_string(map.batch) + ", " + std::to_string(map.channels) + ", " +
         std::to_string(map.height) + ", " + std::to_string(map.width) + "]";
}

// Memory that grows, and keeps nothing of what was in it.
struct Scratch {
  std::shared_ptr<void> data;
  int64_t bytes = 0;

  void* reserve(int64_t wanted) {
    if (wanted > bytes) {
      data.reset();
      bytes = 0;
      data = allocate(static_cast<size_t>(wanted), "the workspace");
      bytes = wanted;
    }
    return data.get();
  }
};

}  // namespace

struct Network::State {
  std::shared_ptr<const Program> program;
  std::mutex in_use;
  ParallelFor parallel_for;
  Scratch workspace, image;
  std::vector<float> levels;  // [C, 256]: what each byte becomes

  void run(const FeatureMap& x, const FeatureMap* results, size_t result_count);
  std::unique_lock<std::mutex> enter();
};

std::unique_lock<std::mutex> Network::State::enter() {
  std::unique_lock<std::mutex> lock(in_use, std::try_to_lock);
  if (!lock) throw std::runtime_error("this network is in use; make one for each thread");
  return lock;
}

void Network::State::run(const FeatureMap& x, const FeatureMap* results, size_t result_count) {
  const ProgramInput& input = program->input();
  if (x.channels != input.shape[1] || x.batch < 0 || x.height < 1 || x.width < 1) {
    throw std::invalid_argument("x: expected [N, " + std::to_string(input.shape[1]) +
                                ", H, W] of at least one pixel, got " + text(x));
  }
  program->check_size(x.height, x.width);
  if (result_count != program->results().size()) {
    throw std::invalid_argument("results: expected " + std::to_string(program->results().size()) +
                                ", got " + std::to_string(result_count));
  }
  for (size_t i = 0; i < result_count; ++i) {
    FeatureMap expected = program->result_shape(i, x.batch, x.height, x.width);
    const FeatureMap& given = results[i];
    if (given.batch != expected.batch || given.channels != expected.channels ||
        given.height != expected.height || given.width != expected.width) {
      throw std::invalid_argument("results[" + std::to_string(i) + "]: expected " + text(expected) +
                                  ", got " + text(given));
    }
    if (given.dtype != x.dtype) {
      throw std::invalid_argument("results[" + std::to_string(i) + "]: expected x's dtype");
    }
  }
  if (x.batch == 0) return;
  if (x.data == nullptr) throw std::invalid_argument("x: its data is null");
  for (size_t i = 0; i < result_count; ++i) {
    if (results[i].data == nullptr) throw std::invalid_argument("results: data of one is null");
  }
  const CpuProgram& part = program->cpu(x.dtype);
  const int64_t bytes =
      cpu::workspace_bytes(part.plan, x.batch, x.height, x.width, parallel_for.threads);
  cpu::run_network(part.plan, part.weights, x, results, static_cast<int64_t>(result_count),
                   workspace.reserve(bytes), bytes, parallel_for);
}

Network::Network(std::shared_ptr<const Program> program, int64_t threads)
    : state_(std::make_unique<State>()) {
  if (program == nullptr) throw std::invalid_argument("program: expected one, got null");
  state_->program = std::move(program);
  set_threads(threads);
}

Network::Network(Network&&) noexcept = default;
Network& Network::operator=(Network&&) noexcept = default;
Network::~Network() = default;

Network Network::load(const std::string& path, int64_t threads) {
  return Network(Program::load(path), threads);
}

Network Network::view(const void* data, size_t size, int64_t threads) {
  return Network(Program::view(data, size), threads);
}

const Program& Network::program() const { return *state_->program; }
int64_t Network::threads() const { return state_->parallel_for.threads; }

void Network::set_threads(int64_t threads) {
  const auto lock = state_->enter();
  state_->parallel_for = shared_pool(checked_threads(threads));
}

void Network::set_threads(const ParallelFor& parallel_for) {
  const auto lock = state_->enter();
  if (parallel_for.threads < 1 || parallel_for.threads > kMostThreads) {
    throw std::invalid_argument("parallel_for: threads are " +
                                std::to_string(parallel_for.threads));
  }
  state_->parallel_for = parallel_for;
}

int64_t Network::workspace_bytes(DType dtype, int64_t batch, int64_t height, int64_t width) const {
  return cpu::workspace_bytes(program().cpu(dtype).plan, batch, height, width, threads());
}

void Network::run(const FeatureMap& x, const FeatureMap* results, size_t result_count) {
  const auto lock = state_->enter();
  state_->run(x, results, result_count);
}

void Network::run(const Images& x, const FeatureMap* results, size_t result_count) {
  const auto lock = state_->enter();
  const Program& program = *state_->program;
  const size_t channels = program.mean().size();
  if (channels == 0) {
    throw std::invalid_argument("x: this program has no normalization, so it takes no bytes");
  }
  if (x.batch < 0 || x.height < 1 || x.width < 1 || x.height > INT32_MAX / x.width ||
      x.batch > INT64_MAX / 64 / (x.height * x.width)) {
    throw std::invalid_argument("x: its extents are out of range");
  }
  if (x.data == nullptr && x.batch > 0) throw std::invalid_argument("x: its data is null");
  std::vector<float>& levels = state_->levels;
  if (levels.empty()) {
    levels.resize(channels * 256);
    for (size_t c = 0; c < channels; ++c) {
      // In float64, rounded, and then in two steps of float32: as Engine's of Python.
      const auto scale = static_cast<float>(1 / (255 * program.std()[c]));
      const auto shift = static_cast<float>(-program.mean()[c] / program.std()[c]);
      for (size_t level = 0; level < 256; ++level) {
        const float product = static_cast<float>(level) * scale;
        levels[c * 256 + level] = product + shift;
      }
    }
  }
  FeatureMap map{
      nullptr,  DType::kFloat32, Layout::kContiguous, x.batch, static_cast<int64_t>(channels),
      x.height, x.width};
  // Planning refuses what is too large before it is allocated.
  state_->program->check_size(x.height, x.width);
  if (x.batch > 0) workspace_bytes(map.dtype, x.batch, x.height, x.width);
  map.data = state_->image.reserve(map.numel() * size_of(map.dtype));
  auto* out = static_cast<float*>(map.data);
  const size_t pixels = static_cast<size_t>(map.plane());
  for (int64_t n = 0; n < x.batch; ++n)
    for (size_t c = 0; c < channels; ++c, out += pixels) {
      const uint8_t* const bytes = x.data + static_cast<size_t>(n) * pixels * channels + c;
      const float* const level = levels.data() + c * 256;
      for (size_t p = 0; p < pixels; ++p) out[p] = level[bytes[p * channels]];
    }
  state_->run(map, results, result_count);
}

namespace {

FeatureMap only_result(const Program& program, float* data, int64_t batch, int64_t height,
                       int64_t width) {
  if (program.results().size() != 1) {
    throw std::invalid_argument("result: this program has " +
                                std::to_string(program.results().size()));
  }
  FeatureMap map = program.result_shape(0, batch, height, width);
  map.data = data;
  return map;
}

}  // namespace

void Network::run(const FeatureMap& x, float* result) {
  run(x, only_result(program(), result, x.batch, x.height, x.width));
}

void Network::run(const Images& x, float* result) {
  run(x, only_result(program(), result, x.batch, x.height, x.width));
}

}  // namespace snv2
