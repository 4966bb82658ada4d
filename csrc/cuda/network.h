// What run_network (network.cu) asks of the kernels of each kind of step.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "snv2/cuda.h"

namespace snv2::SNV2_GPU {

// A map in memory with any strides, in elements: the caller's tensor, or planes (channel =
// planes_pitch, image = height rows, row = row_pitch, pixel = 1).
struct MapView {
  void* data = nullptr;
  int64_t channels = 0;  // planes, for planes
  int64_t channel = 0;
  int64_t image = 0;
  int64_t row = 0;
  int64_t pixel = 0;
};

// Planes of maps of height x width.
inline MapView planes_view(void* data, int64_t planes, int64_t batch, int64_t height, int64_t width,
                           DType dtype) {
  const int64_t row = row_pitch(width);
  return {data, planes, planes_pitch(batch, height, width, dtype), height * row, row, 1};
}

// The arrays of a plan and the memory around one step, for `batch` images.
struct StepCall {
  const GpuPlan* plan;
  const GpuStep* step;
  PlanArrays arrays;
  int64_t batch;
  int64_t height, width;  // of the map that the step reads
  MapView in;             // kStem: not used
  const Image* image;     // kStem: the caller's, cut to this batch
  MapView out;            // planes; data is null where the step keeps none
  MapView result;         // the caller's; data is null where the step writes none
  void* features;         // kHead: [batch][features] of the plan's dtype
  Device device;
  Stream stream;
  int64_t steps = 1;  // that the launch takes: stages take some
  // With the launch before: not the first one of a call, since constants() may have been written by
  // what ran before that.
  bool overlaps = false;
};

// Each step is planned, described or launched through one function: with `info` it is described
// and nothing is launched.
void run_copy(const StepCall& call, LaunchInfo* info);  // kCopy and kExport
void run_stem(const StepCall& call, LaunchInfo* info);
void run_unit(const StepCall& call, LaunchInfo* info);
void run_gate(const StepCall& call, LaunchInfo* info);
void run_pool(const StepCall& call, LaunchInfo* info);
// Units of some stages in one launch, where that can be done and is faster. How many steps it takes
// from call.step on, 0 if it takes none; and the launch, of which call.out is the last map.
int64_t steps_of_stages(const StepCall& call);
void run_stages(const StepCall& call, LaunchInfo* info);
// Features of the images: mean over pixels of relu(1x1); and the linear layer on all of them.
void run_features(const StepCall& call, LaunchInfo* info);
void run_linear(const StepCall& call, LaunchInfo* info);

}  // namespace snv2::SNV2_GPU
