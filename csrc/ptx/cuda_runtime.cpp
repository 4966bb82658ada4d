// The part of the CUDA runtime that the kernels' host code calls, on the interpreter. The device is
// an H200, or of the size that set_device_size() was given.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "ptx/buffers.h"
#include "ptx/launch.h"

namespace snv2::ptx {
namespace {

constexpr int kArchitecture = 90;
constexpr int kReservedPerCta = 1024;
constexpr int kL2Bytes = 50 * 1024 * 1024;
constexpr uint32_t kThreadsPerSm = 2048;
constexpr uint32_t kCtasPerSm = 32;
constexpr uint32_t kMostThreads = 1024;
constexpr uint32_t kMostCluster = 8;
constexpr int kSharedWithoutAsking = 48 * 1024;

// Devices that there have been, and the current one.
std::vector<DeviceSize> devices(1);
int current = 0;

std::atomic<int64_t> asked{0};

// A kernel's settings for a device.
struct Settings {
  int most_shared = kSharedWithoutAsking;
  int carveout = cudaSharedmemCarveoutDefault;
};

// What the compiled code of one source registers.
struct Binary {
  const unsigned char* data;
  std::unique_ptr<Module> module;  // once a kernel of it is needed
};

struct Function {
  Binary* binary;
  std::string name;
  std::map<int, Settings> settings;  // by device
};

struct Replacement {
  std::string kernel, from, to;

  // In the bodies of the kernels that are meant.
  int64_t apply(std::string& text) const {
    int64_t count = 0;
    for (size_t entry = text.find(".entry "); entry != std::string::npos;
         entry = text.find(".entry ", entry + 1)) {
      if (text.substr(entry, text.find('(', entry) - entry).find(kernel) == std::string::npos) {
        continue;
      }
      for (size_t at = text.find(from, entry); at < text.find("\n}\n", entry);
           at = text.find(from, at + to.size())) {
        text.replace(at, from.size(), to);
        ++count;
      }
    }
    return count;
  }
};

class Runtime {
 public:
  // The only one; never destroyed, since code is unregistered after the end of main().
  static Runtime& get() {
    static Runtime* const runtime = new Runtime;
    return *runtime;
  }

  std::mutex mutex;
  Launcher launcher;
  std::optional<int> carveout;  // of the launch before

  Binary* add(const unsigned char* data) {
    binaries_.push_back(std::make_unique<Binary>(Binary{data, nullptr}));
    return binaries_.back().get();
  }
  void add(const void* host, Binary* binary, const char* name) {
    functions_[host] = {binary, name};
  }

  Function& function(const void* host) {
    const auto found = functions_.find(host);
    if (found == functions_.end()) throw Fault("a kernel that nobody registered");
    return found->second;
  }
  Kernel& kernel(Function& function) {
    Module& module = module_of(*function.binary);
    const auto found = module.kernels.find(function.name);
    if (found == module.kernels.end()) throw Fault("there is no PTX of " + function.name);
    return found->second;
  }

  int64_t read_all() {
    int64_t count = 0;
    for (const auto& binary : binaries_) {
      for (auto& [name, kernel] : module_of(*binary).kernels) {
        if (!kernel.decoded()) decode(kernel);
        ++count;
      }
    }
    return count;
  }

  int64_t replace(const Replacement& replacement) {
    if (replacement.kernel.empty()) {
      replacements_.clear();
    } else {
      replacements_.push_back(replacement);
    }
    int64_t count = 0;
    for (const auto& binary : binaries_) {
      binary->module = nullptr;
      std::string text = ptx_of(binary->data);
      if (!replacement.kernel.empty()) count += replacement.apply(text);
    }
    return count;
  }

  template <class F>
  void for_kernels(const F& f) {
    for (const auto& binary : binaries_) {
      if (binary->module == nullptr) continue;
      for (auto& [name, kernel] : binary->module->kernels) f(kernel);
    }
  }

 private:
  Module& module_of(Binary& binary) {
    if (binary.module == nullptr) {
      std::string text = ptx_of(binary.data);
      for (const Replacement& replacement : replacements_) replacement.apply(text);
      binary.module = parse_module(std::move(text));
    }
    return *binary.module;
  }

  // A header of 16 bytes that tells its own size and that of all entries, each of which has one
  // too: its kind (1 is PTX), its sizes, and whether it is compressed.
  static std::string ptx_of(const unsigned char* data) {
    const auto read = [&](size_t at, auto value) {
      std::memcpy(&value, data + at, sizeof value);
      return value;
    };
    const size_t header = read(6, uint16_t{});
    const size_t end = header + read(8, uint64_t{});
    for (size_t at = header; at < end;) {
      const size_t head = read(at + 4, uint32_t{}), bytes = read(at + 8, uint64_t{});
      if (read(at, uint16_t{}) == 1) {
        if (read(at + 16, uint32_t{}) != 0) throw Fault("the PTX is compressed");
        return std::string(reinterpret_cast<const char*>(data + at + head),
                           strnlen(reinterpret_cast<const char*>(data + at + head), bytes));
      }
      at += head + bytes;
    }
    throw Fault("a binary without PTX");
  }

  std::vector<std::unique_ptr<Binary>> binaries_;
  std::unordered_map<const void*, Function> functions_;  // by the host's address
  std::vector<Replacement> replacements_;
};

thread_local std::vector<Buffer> declared;  // of the next launch
thread_local std::string last_error;

cudaError_t fail(cudaError_t error, const std::string& what) {
  last_error = what;
  return error;
}

// Runs f() with the runtime, whose faults become an error.
template <class F>
cudaError_t guarded(cudaError_t error, const F& f) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  try {
    f(runtime);
    return cudaSuccess;
  } catch (const std::exception& e) {
    return fail(error, e.what());
  }
}

void require(bool fine, const Kernel& kernel, const char* what) {
  if (!fine) throw Fault(std::string("launch: ") + what + ": " + kernel.name);
}

uint32_t ctas_per_sm(const LaunchShape& shape) {
  const uint32_t by_shared =
      devices[current].shared_per_sm / (shape.shared_bytes + kReservedPerCta);
  const uint32_t by_threads = kThreadsPerSm / ((shape.threads + kLanes - 1) / kLanes * kLanes);
  return std::min({by_shared, by_threads, kCtasPerSm});
}

void check(const cudaLaunchConfig_t& config, const LaunchShape& shape, const Kernel& kernel,
           const Settings& settings) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  require(grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && grid.z == 1,
          kernel, "a grid that no GPU takes");
  require(block.x >= 1 && block.x <= std::min(kMostThreads, kernel.max_threads) && block.y == 1 &&
              block.z == 1,
          kernel, "more threads than its bounds allow");
  require(static_cast<int>(shape.shared_bytes) <= settings.most_shared, kernel,
          "more shared memory than it asked for");
  require(shape.cluster >= 1 && shape.cluster <= kMostCluster && grid.x % shape.cluster == 0,
          kernel, "a cluster must be 1 to 8 CTAs and divide the grid");
  if (!shape.cooperative) return;
  require(uint64_t{grid.x} * grid.y <= uint64_t{ctas_per_sm(shape)} * devices[current].sms, kernel,
          "a cooperative grid must fit the GPU at once");
}

LaunchShape shape_of(const cudaLaunchConfig_t& config) {
  LaunchShape shape;
  shape.grid_x = config.gridDim.x;
  shape.grid_y = config.gridDim.y;
  shape.threads = config.blockDim.x;
  shape.shared_bytes = static_cast<uint32_t>(config.dynamicSmemBytes);
  for (unsigned a = 0; a < config.numAttrs; ++a) {
    const cudaLaunchAttributeValue& value = config.attrs[a].val;
    switch (config.attrs[a].id) {
      case cudaLaunchAttributeClusterDimension:
        shape.cluster = value.clusterDim.x;
        break;
      case cudaLaunchAttributeCooperative:
        shape.cooperative = value.cooperative != 0;
        break;
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        shape.overlaps = value.programmaticStreamSerializationAllowed != 0;
        break;
      default:
        throw Fault("launch: an attribute that the interpreter does not know");
    }
  }
  return shape;
}

void launch(Runtime& runtime, const cudaLaunchConfig_t& config, const void* host, void** args,
            std::vector<Buffer> buffers) {
  Function& function = runtime.function(host);
  Kernel& kernel = runtime.kernel(function);
  const LaunchShape shape = shape_of(config);
  const Settings& settings = function.settings[current];
  check(config, shape, kernel, settings);
  const std::optional<int> before = std::exchange(runtime.carveout, settings.carveout);
  require(!shape.overlaps || !before || (*before == settings.carveout && settings.carveout >= 0),
          kernel, "SMs drain before it, to divide their memory in another way");
  std::vector<uint8_t> parameters(kernel.parameter_bytes);
  for (size_t p = 0; p < kernel.parameters.size(); ++p) {
    std::memcpy(&parameters[kernel.parameters[p].offset], args[p], kernel.parameters[p].bytes);
  }
  runtime.launcher.run(kernel, shape, parameters, std::move(buffers));
}

}  // namespace

void declare_buffer(const void* address, int64_t bytes, bool written, bool constant,
                    bool holds_nothing) {
  const auto begin = reinterpret_cast<uint64_t>(address);
  declared.push_back({begin, begin + static_cast<uint64_t>(bytes), written, constant});
  if (holds_nothing) std::memset(const_cast<void*>(address), 0xff, static_cast<size_t>(bytes));
}

void set_seed(uint32_t seed) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  runtime.launcher.set_seed(seed);
}

void sample(uint32_t apart) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  runtime.launcher.sample(apart);
}

void set_device_size(const DeviceSize& size) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  const auto found = std::find(devices.begin(), devices.end(), size);
  current = static_cast<int>(found - devices.begin());
  if (found == devices.end()) devices.push_back(size);
  runtime.carveout.reset();
}

int64_t questions() { return asked; }

int64_t read_kernels() {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  return runtime.read_all();
}

int64_t replace_text(const std::string& kernel, const std::string& from, const std::string& to) {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  return runtime.replace({kernel, from, to});
}

std::vector<Count> launch_counts() {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  return runtime.launcher.counts();
}

std::vector<Count> line_counts() {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  std::vector<Count> counts;
  runtime.for_kernels([&](const Kernel& kernel) { add_line_counts(kernel, counts); });
  return counts;
}

void reset_counts() {
  Runtime& runtime = Runtime::get();
  const std::lock_guard<std::mutex> lock(runtime.mutex);
  runtime.launcher.reset_counts();
  runtime.for_kernels(
      [](Kernel& kernel) { std::fill(kernel.executed.begin(), kernel.executed.end(), 0); });
}

}  // namespace snv2::ptx

// What host code calls -----------------------------------------------------------------------

extern "C" {

using snv2::ptx::Runtime;

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const unsigned char* data;
  };
  return reinterpret_cast<void**>(Runtime::get().add(static_cast<const Wrapper*>(wrapper)->data));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** binary, const char* host, char*, const char* name, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  Runtime::get().add(host, reinterpret_cast<snv2::ptx::Binary*>(binary), name);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** args) {
  std::vector<snv2::ptx::Buffer> buffers;
  buffers.swap(snv2::ptx::declared);
  return snv2::ptx::guarded(cudaErrorLaunchFailure, [&](Runtime& runtime) {
    snv2::ptx::launch(runtime, *config, host, args, std::move(buffers));
  });
}

// Of kernel<<<>>>(), which is not how kernels are launched here.
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return snv2::ptx::fail(cudaErrorNotSupported, "a launch by <<<>>>");
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return snv2::ptx::fail(cudaErrorNotSupported, "a launch by <<<>>>");
}

cudaError_t cudaGetDevice(int* device) {
  *device = snv2::ptx::current;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  using namespace snv2::ptx;
  ++asked;
  const DeviceSize& size = devices[device];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = size.sms;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = size.shared_per_sm;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = size.shared_per_cta;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = kReservedPerCta;
      break;
    case cudaDevAttrL2CacheSize:
      *value = kL2Bytes;
      break;
    case cudaDevAttrClusterLaunch:
      *value = size.clusters;
      break;
    default:
      return fail(cudaErrorInvalidValue, "an attribute that the interpreter does not know");
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host) {
  ++snv2::ptx::asked;
  return snv2::ptx::guarded(cudaErrorInvalidDeviceFunction, [&](Runtime& runtime) {
    *attributes = {};
    attributes->ptxVersion = runtime.kernel(runtime.function(host)).module->architecture;
    attributes->binaryVersion = snv2::ptx::kArchitecture;
  });
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  using namespace snv2::ptx;
  ++asked;
  return guarded(cudaErrorInvalidValue, [&](Runtime& runtime) {
    Settings& settings = runtime.function(host).settings[current];
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize &&
        value <= devices[current].shared_per_cta) {
      settings.most_shared = value;
    } else if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout &&
               value >= cudaSharedmemCarveoutDefault && value <= cudaSharedmemCarveoutMaxShared) {
      settings.carveout = value;
    } else {
      throw Fault("an attribute of a kernel that no GPU takes");
    }
  });
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* host,
                                           const cudaLaunchConfig_t* config) {
  using namespace snv2::ptx;
  ++asked;
  return guarded(cudaErrorInvalidClusterSize, [&](Runtime& runtime) {
    const LaunchShape shape = shape_of(*config);
    const DeviceSize& size = devices[current];
    Function& function = runtime.function(host);
    check(*config, shape, runtime.kernel(function), function.settings[current]);
    if (!size.clusters) throw Fault("this GPU has no clusters");
    const int most = size.cluster_sms > 0 ? size.cluster_sms : size.sms * 7 / 8;
    const int sms = shape.cluster > 2 ? most : size.sms;
    *clusters = sms * static_cast<int>(ctas_per_sm(shape)) / static_cast<int>(shape.cluster);
  });
}

// Faults are told where they happen, and none is left behind.
cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : snv2::ptx::last_error.c_str();
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

}  // extern "C"
