// Compiled twice, as the CUDA kernels are: for GPUs, and for the emulator, whose device memory is
// ordinary memory.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "snv2/gpu_network.h"

#ifndef SNV2_EMULATED
#include <cuda_runtime.h>
#endif

namespace snv2::SNV2_GPU {
namespace {

constexpr size_t kAlign = 256;
using DeviceMemory = std::shared_ptr<void>;

#ifdef SNV2_EMULATED
DeviceMemory device_memory(size_t bytes) {
  void* const memory = std::aligned_alloc(kAlign, (bytes / kAlign + 1) * kAlign);
  if (memory == nullptr) throw std::runtime_error("cannot allocate memory for the workspace");
  return {memory, std::free};
}

void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
#else
void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
  }
}

DeviceMemory device_memory(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes + kAlign), "memory of a network");
  return {memory, cudaFree};
}

void copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "weights of a network");
}
#endif

DeviceMemory copied(const void* data, size_t bytes) {
  DeviceMemory memory = device_memory(bytes);
  copy(memory.get(), data, bytes);
  return memory;
}

}  // namespace

struct GpuNetwork::State {
  std::shared_ptr<const Program> program;
  const GpuProgram* part;
  DeviceMemory weights, parameters, tables, workspace;
  int64_t workspace_size = 0;
  Device device;

  void run(const Image& x, const FeatureMap* results, size_t result_count, Stream stream);
};

GpuNetwork::GpuNetwork(std::shared_ptr<const Program> program, DType dtype)
    : state_(std::make_unique<State>()) {
  if (program == nullptr) throw std::invalid_argument("program: expected one, got null");
  const GpuProgram* const part = program->gpu(dtype);
  if (part == nullptr) {
    throw std::invalid_argument("dtype: this program has no such plan for GPUs; export it again");
  }
  const GpuPlanHeader& header = part->plan.header();
  const int64_t* const tables = part->plan.table(0);
  const std::vector<int32_t> narrow(tables, tables + part->plan.table_count());
  state_->program = std::move(program);
  state_->part = part;
  state_->weights =
      copied(part->weights, static_cast<size_t>(header.weight_count * size_of(dtype)));
  state_->parameters =
      copied(part->parameters, static_cast<size_t>(header.parameter_count) * sizeof(float));
  state_->tables = copied(narrow.data(), narrow.size() * sizeof(int32_t));
  state_->device = current_device();
}

GpuNetwork::GpuNetwork(GpuNetwork&&) noexcept = default;
GpuNetwork::~GpuNetwork() = default;

void GpuNetwork::State::run(const Image& x, const FeatureMap* results, size_t result_count,
                            Stream stream) {
  program->check_size(x.map.height, x.map.width);
  const int64_t bytes = workspace_bytes(part->plan, x.map.batch, x.map.height, x.map.width, device);
  if (bytes > workspace_size) {
    workspace.reset();
    workspace_size = 0;
    workspace = device_memory(static_cast<size_t>(bytes));
    workspace_size = bytes;
  }
  const PlanArrays arrays{weights.get(), static_cast<const float*>(parameters.get()),
                          static_cast<const int32_t*>(tables.get())};
  run_network(part->plan, arrays, x, results, static_cast<int64_t>(result_count), workspace.get(),
              bytes, device, stream);
}

void GpuNetwork::run(const FeatureMap& x, const FeatureMap* results, size_t result_count,
                     Stream stream) {
  state_->run({x, false, {}, {}}, results, result_count, stream);
}

void GpuNetwork::run(const Images& x, const FeatureMap* results, size_t result_count,
                     Stream stream) {
  const Program& program = *state_->program;
  if (program.mean().empty()) {
    throw std::invalid_argument("x: this program has no normalization, so it takes no bytes");
  }
  Image image{{const_cast<uint8_t*>(x.data), state_->part->plan.dtype(), Layout::kContiguous,
               x.batch, program.input().shape[1], x.height, x.width},
              true,
              {},
              {}};
  for (size_t c = 0; c < program.mean().size(); ++c) {
    image.scale[c] = static_cast<float>(1 / (255 * program.std()[c]));
    image.shift[c] = static_cast<float>(-program.mean()[c] / program.std()[c]);
  }
  state_->run(image, results, result_count, stream);
}

}  // namespace snv2::SNV2_GPU
