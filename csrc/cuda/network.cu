// Takes a batch through the steps of a plan.
//
// The batch goes in chunks, so that the planes of a chunk stay in L2 where that leaves each CTA
// enough to do; the linear layer runs once, on the features of all.
#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "cuda/network.h"
#include "snv2/cuda.h"

#ifndef SNV2_EMULATED
#include <cuda_runtime.h>
#endif

namespace snv2::SNV2_GPU {
namespace {

constexpr int64_t kAlign = 256;  // bytes, of each part of the workspace

constexpr int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

Tuning the_tuning = {};

struct Extent {
  int64_t height;
  int64_t width;

  Extent halved() const { return {conv3x3_extent(height, 2), conv3x3_extent(width, 2)}; }
};

Extent extent_after(const GpuStep& step, Extent in) {
  if (step.kind == GpuStepKind::kStem) return in.halved().halved();
  return step.stride == 2 ? in.halved() : in;
}

// Of the maps between steps: each step reads one that was written, and writes one.
class Extents {
 public:
  explicit Extents(Extent callers) : callers_(callers) {}

  Extent of_input(const GpuStep& step) const {
    return step.in_buffer == kCallersMap ? callers_ : buffers_[step.in_buffer];
  }
  // Of what the step writes, which is then in its buffer.
  Extent after(const GpuStep& step) {
    const Extent extent = extent_after(step, of_input(step));
    if (step.out_buffer != kNoBuffer) buffers_[step.out_buffer] = extent;
    return extent;
  }

 private:
  Extent callers_;
  Extent buffers_[2] = {};
};

// Bytes of the workspace's parts: two plane buffers for the images of a chunk, the features of all.
struct Memory {
  int64_t buffers[2] = {0, 0};
  int64_t features = 0;

  int64_t total() const { return buffers[0] + buffers[1] + features; }
};

// After check_extents, which leaves the planes of a buffer as the only product that may overflow.
Memory plan_memory(const GpuPlan& plan, int64_t batch, int64_t chunk, Extent callers) {
  constexpr int64_t kMost = int64_t{1} << 60;
  Memory memory;
  Extents extents(callers);
  const int64_t size = size_of(plan.dtype());
  for (const GpuStep& step : plan) {
    const Extent extent = extents.after(step);
    if (step.out_buffer != kNoBuffer) {
      const int64_t pitch = planes_pitch(chunk, extent.height, extent.width, plan.dtype());
      require(pitch <= kMost / size / step.out_planes, "x: its planes are more than 2^60 bytes");
      int64_t& bytes = memory.buffers[step.out_buffer];
      bytes = std::max(bytes, aligned(step.out_planes * pitch * size));
    }
    if (step.kind == GpuStepKind::kHead)
      memory.features = aligned(batch * step.mid_channels * size);
  }
  return memory;
}

void check_extents(int64_t batch, int64_t height, int64_t width) {
  // Keeps all products of extents below 2^63, and pixels of one image, padded, below 2^31.
  constexpr int64_t kMost = int64_t{1} << 31;
  require(batch >= 0 && batch < kMost && height >= 1 && width >= 1 && height < kMost &&
              width < kMost && row_pitch(width) < kMost / height,
          "x: its extents are out of range");
}

// What the cuts are chosen by is far from overflow.
void check_field(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return;
  throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(least) + " to " +
                              std::to_string(most) + ", got " + std::to_string(value));
}

constexpr int64_t kMostOfAny = int64_t{1} << 31;

void check_tuning(const Tuning& tuning) {
  check_field("columns", tuning.columns, 0, 512);
  check_field("rows_per_cta", tuning.rows_per_cta, 0, kMostOfAny);
  check_field("weights", tuning.weights, 0, 3);
  check_field("images", tuning.images, 0, kMostOfAny);
  check_field("stages", tuning.stages, 0, 2);
}

void check_device(const Device& device) {
  check_field("sms", device.sms, 1, kMostOfAny);
  check_field("shared_per_sm", device.shared_per_sm, 0, kMostOfAny);
  check_field("shared_per_cta", device.shared_per_cta, 0, device.shared_per_sm);
  check_field("reserved_per_cta", device.reserved_per_cta, 0, kMostOfAny);
  check_field("l2_bytes", device.l2_bytes, 0, int64_t{1} << 50);
  check_field("cluster", device.cluster, 1, kMostOfAny);
  const auto& at_once = device.clusters_at_once;
  check_field("clusters_4x1", at_once[0][0], 0, kMostOfAny);
  check_field("clusters_4x2", at_once[0][1], 0, kMostOfAny);
  check_field("clusters_8x1", at_once[1][0], 0, kMostOfAny);
  check_field("clusters_8x2", at_once[1][1], 0, kMostOfAny);
  check_tuning(device.tuning);
}

MapView view_of(const FeatureMap& map, int64_t first_image) {
  MapView view;
  const int64_t image = map.channels * map.plane();
  view.data = static_cast<unsigned char*>(map.data) + first_image * image * size_of(map.dtype);
  view.channels = map.channels;
  view.channel = map.channel_stride();
  view.image = image;
  view.row = map.width * map.pixel_stride();
  view.pixel = map.pixel_stride();
  return view;
}

void run_step(const StepCall& call, LaunchInfo* info) {
  if (call.steps > 1) return run_stages(call, info);
  switch (call.step->kind) {
    case GpuStepKind::kCopy:
    case GpuStepKind::kExport:
      return run_copy(call, info);
    case GpuStepKind::kStem:
      return run_stem(call, info);
    case GpuStepKind::kUnit:
      return run_unit(call, info);
    case GpuStepKind::kHead:
      return run_features(call, info);
    case GpuStepKind::kGate:
      return run_gate(call, info);
    case GpuStepKind::kPool:
      return run_pool(call, info);
  }
}

// Calls f(call) for each launch: the steps of each chunk, then the linear layer.
template <class F>
void for_each_launch(const GpuPlan& plan, const PlanArrays& arrays, const Image& x,
                     const FeatureMap* results, unsigned char* workspace, const Device& device,
                     Stream stream, const F& f) {
  const int64_t batch = x.map.batch;
  const int64_t chunk = images_at_once(plan, batch, x.map.height, x.map.width, device);
  const Memory memory = plan_memory(plan, batch, chunk, {x.map.height, x.map.width});
  unsigned char* const buffers[2] = {workspace, workspace + memory.buffers[0]};
  unsigned char* const features = buffers[1] + memory.buffers[1];
  const int64_t size = size_of(plan.dtype());

  StepCall call{};
  call.plan = &plan;
  call.arrays = arrays;
  call.device = device;
  call.stream = stream;
  for (int64_t first = 0; first < batch; first += chunk) {
    call.batch = std::min(chunk, batch - first);
    Image image = x;
    image.map.batch = call.batch;
    const int64_t image_elements = x.map.channels * x.map.plane();
    image.map.data =
        static_cast<unsigned char*>(x.map.data) + first * image_elements * (x.bytes ? 1 : size);
    call.image = &image;
    const MapView callers = view_of(image.map, 0);
    MapView maps[2];
    Extents extents({x.map.height, x.map.width});
    for (const GpuStep* next = plan.begin(); next != plan.end(); next += call.steps) {
      call.step = next;
      call.height = extents.of_input(*next).height;
      call.width = extents.of_input(*next).width;
      call.in = next->in_buffer == kCallersMap ? callers : maps[next->in_buffer];
      call.steps = std::max<int64_t>(steps_of_stages(call), 1);
      const GpuStep& step = next[call.steps - 1];
      Extent extent = extents.after(*next);
      for (const GpuStep* passed = next; passed != &step;) extent = extents.after(*++passed);
      call.out = {};
      if (step.out_buffer != kNoBuffer) {
        call.out = planes_view(buffers[step.out_buffer], step.out_planes, call.batch, extent.height,
                               extent.width, plan.dtype());
        maps[step.out_buffer] = call.out;
      }
      call.result = {};
      if (step.result != kNoResult && step.kind != GpuStepKind::kHead) {
        call.result = view_of(results[step.result], first);
      }
      const bool head = step.kind == GpuStepKind::kHead;
      call.features = features + (head ? first * step.mid_channels * size : 0);
      f(call);
      call.overlaps = true;
    }
  }
  const GpuStep& tail = plan.end()[-1];
  if (tail.kind == GpuStepKind::kHead && batch > 0) {
    call.step = &tail;
    call.steps = 1;
    call.batch = batch;
    call.features = features;
    call.result = view_of(results[tail.result], 0);
    f(call);
  }
}

}  // namespace

#ifdef SNV2_EMULATED
namespace {
Device the_device = {132, 228 * 1024, 227 * 1024, 1024, 50 * 1024 * 1024, 8, {}, {}};
}  // namespace

Device current_device() {
  Device device = the_device;
  device.tuning = the_tuning;
  return device;
}
void set_device(const Device& device) {
  check_device(device);
  the_device = device;
}
#else
namespace {
__global__ void __launch_bounds__(32) code_of_this_build() {}

// Clusters that run at once, of which an SM has `ctas` CTAs at most; 0 where the driver knows none.
int64_t clusters_at_once(const Device& device, unsigned cluster, int64_t ctas) {
  cudaLaunchAttribute size = {};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = cluster;
  size.val.clusterDim.y = size.val.clusterDim.z = 1;
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(cluster);
  launch.blockDim = dim3(32);
  launch.dynamicSmemBytes = static_cast<size_t>(
      std::min(device.shared_per_cta, device.shared_per_sm / ctas - device.reserved_per_cta));
  launch.attrs = &size;
  launch.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, code_of_this_build, &launch) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

Device ask(int index) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, index), "attribute of a device");
    return int64_t{value};
  };
  Device device{};
  device.sms = attribute(cudaDevAttrMultiProcessorCount);
  device.shared_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  device.shared_per_cta = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.reserved_per_cta = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  device.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  constexpr int64_t kPortableCluster = 8;
  // A newer GPU may run the code of an older one, which has no clusters, or no tensor cores as
  // these kernels use them; then nothing fits.
  const auto* const kernel = reinterpret_cast<const void*>(code_of_this_build);
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, kernel), "attributes of a kernel");
  const bool clusters = code.ptxVersion >= 90 && attribute(cudaDevAttrClusterLaunch) != 0;
  device.cluster = clusters ? kPortableCluster : 1;
  if (clusters) {
    prepare(kernel);
    for (const int64_t ctas : {1, 2}) {
      device.clusters_at_once[0][ctas - 1] = clusters_at_once(device, 4, ctas);
      device.clusters_at_once[1][ctas - 1] = clusters_at_once(device, 8, ctas);
    }
  }
  if (code.ptxVersion < 80) device.shared_per_cta = device.shared_per_sm = 0;
  return device;
}
}  // namespace

Device current_device() {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int index = 0;
  check(cudaGetDevice(&index), "current device");
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(index);
  if (found == known.end()) found = known.emplace(index, ask(index)).first;
  Device device = found->second;
  device.tuning = the_tuning;
  return device;
}
void set_device(const Device&) { throw std::logic_error("set_device: a GPU is what it is"); }
#endif

void set_tuning(const Tuning& tuning) {
  check_tuning(tuning);
  the_tuning = tuning;
}

int64_t images_at_once(const GpuPlan& plan, int64_t batch, int64_t height, int64_t width,
                       const Device& device) {
  check_extents(batch, height, width);
  check_device(device);
  if (batch == 0) return 1;
  // An image for each of two CTAs of an SM; more while they stay in half of L2.
  const int64_t each = std::max<int64_t>(plan_memory(plan, 0, 1, {height, width}).total(), 1);
  int64_t most = std::max(2 * device.sms, device.l2_bytes / 2 / each);
  if (device.tuning.images > 0) most = device.tuning.images;
  return ceil_div(batch, ceil_div(batch, most));
}

int64_t workspace_bytes(const GpuPlan& plan, int64_t batch, int64_t height, int64_t width,
                        const Device& device) {
  const int64_t chunk = images_at_once(plan, batch, height, width, device);
  return std::max(plan_memory(plan, batch, chunk, {height, width}).total(), kAlign);
}

void run_network(const GpuPlan& plan, const PlanArrays& arrays, const Image& x,
                 const FeatureMap* results, int64_t result_count, void* workspace,
                 int64_t workspace_size, const Device& device, Stream stream) {
  require(x.map.channels == plan.header().in_channels && x.map.dtype == plan.dtype(),
          "x does not fit the plan");
  require(!x.bytes || plan.begin()->kind == GpuStepKind::kStem,
          "x: only a network that begins with its stem takes bytes");
  require(result_count == plan.header().result_count, "results do not fit the plan");
  require(workspace_size >= workspace_bytes(plan, x.map.batch, x.map.height, x.map.width, device),
          "workspace is smaller than workspace_bytes()");
  Extents extents({x.map.height, x.map.width});
  for (const GpuStep& step : plan) {
    const Extent extent = extents.after(step);
    if (step.result == kNoResult) continue;
    const FeatureMap& result = results[step.result];
    const bool scores = step.kind == GpuStepKind::kHead;
    require(result.dtype == plan.dtype() && result.batch == x.map.batch &&
                result.channels == (scores ? step.out_channels : step.result_channels) &&
                result.height == (scores ? 1 : extent.height) &&
                result.width == (scores ? 1 : extent.width),
            "results do not fit the plan and x");
  }
  for_each_launch(plan, arrays, x, results, static_cast<unsigned char*>(workspace), device, stream,
                  [](const StepCall& call) {
                    const bool last =
                        call.step->kind == GpuStepKind::kHead && call.result.data != nullptr;
                    last ? run_linear(call, nullptr) : run_step(call, nullptr);
                  });
}

void describe_network(const GpuPlan& plan, int64_t batch, int64_t height, int64_t width,
                      const Device& device, LaunchInfo* infos, int64_t capacity, int64_t& count) {
  check_extents(batch, height, width);
  // Nothing is read or written: all that counts of the maps is that they are there.
  unsigned char nothing = 0;
  Image x{};
  x.map = {&nothing, plan.dtype(), Layout::kContiguous, batch, plan.header().in_channels,
           height,   width};
  std::vector<FeatureMap> results;
  for (int64_t i = 0; i < plan.header().result_count; ++i) {
    results.push_back({&nothing, plan.dtype(), Layout::kContiguous, batch, 1, 1, 1});
  }
  std::vector<LaunchInfo> all;
  for_each_launch(
      plan, {}, x, results.data(), &nothing, device, nullptr, [&](const StepCall& call) {
        LaunchInfo info{};
        const bool last = call.step->kind == GpuStepKind::kHead && call.result.data != nullptr;
        last ? run_linear(call, &info) : run_step(call, &info);
        info.step = call.step - plan.begin();
        const auto same = std::find_if(all.begin(), all.end(), [&](const auto& i) {
          return i.step == info.step && std::string(i.kernel) == info.kernel;
        });
        if (same == all.end()) {
          all.push_back(info);
          return;
        }
        same->launches += info.launches;
        same->read_bytes += info.read_bytes;
        same->written_bytes += info.written_bytes;
        same->weight_bytes += info.weight_bytes;
        same->multiply_adds += info.multiply_adds;
        same->instructions += info.instructions;
        same->cycles += info.cycles;
      });
  count = static_cast<int64_t>(all.size());
  std::copy_n(all.begin(), std::min(count, capacity), infos);
}

}  // namespace snv2::SNV2_GPU
