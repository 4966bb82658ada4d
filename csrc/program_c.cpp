// The C interface (snv2.h): exceptions end here.
#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "snv2.h"
#include "snv2/network.h"

struct snv2_network {
  snv2::Network network;
};

namespace {

// As many characters as fit, in memory that needs no allocation.
thread_local char last_error[512];

void remember(const char* what) {
  std::string::traits_type::assign(last_error, sizeof last_error, '\0');
  const size_t length = std::string::traits_type::length(what);
  std::string::traits_type::copy(last_error, what, std::min(length, sizeof last_error - 1));
}

template <class F>
snv2_status guarded(const F& f) noexcept {
  try {
    f();
    return SNV2_OK;
  } catch (const std::logic_error& error) {  // invalid_argument, out_of_range
    remember(error.what());
    return SNV2_INVALID_ARGUMENT;
  } catch (const std::exception& error) {
    remember(error.what());
  } catch (...) {
    remember("unknown exception");
  }
  return SNV2_FAILED;
}

template <class T>
T& checked(T* pointer, const char* name) {
  if (pointer == nullptr) throw std::invalid_argument(std::string(name) + ": is NULL");
  return *pointer;
}

snv2::FeatureMap map_of(const snv2_map& map, const char* name) {
  const bool fits = map.dtype >= SNV2_FLOAT32 && map.dtype <= SNV2_BFLOAT16 &&
                    (map.layout == SNV2_CONTIGUOUS || map.layout == SNV2_CHANNELS_LAST);
  if (!fits) throw std::invalid_argument(std::string(name) + ": unknown dtype or layout");
  return {map.data,
          static_cast<snv2::DType>(map.dtype),
          static_cast<snv2::Layout>(map.layout),
          map.batch,
          map.channels,
          map.height,
          map.width};
}

}  // namespace

const char* snv2_version(void) { return SNV2_VERSION; }

const char* snv2_error(void) { return last_error; }

snv2_network* snv2_load(const char* path, int threads) {
  snv2_network* made = nullptr;
  guarded([&] { made = new snv2_network{snv2::Network::load(&checked(path, "path"), threads)}; });
  return made;
}

snv2_network* snv2_view(const void* data, size_t size, int threads) {
  snv2_network* made = nullptr;
  guarded([&] { made = new snv2_network{snv2::Network::view(data, size, threads)}; });
  return made;
}

void snv2_destroy(snv2_network* network) { delete network; }

snv2_status snv2_input_shape(const snv2_network* network, int64_t shape[4]) {
  return guarded([&] {
    const snv2::Program& program = checked(network, "network").network.program();
    checked(shape, "shape");
    for (int i = 0; i < 4; ++i) shape[i] = program.input().shape[i];
  });
}

size_t snv2_result_count(const snv2_network* network) {
  return network == nullptr ? 0 : network->network.program().results().size();
}

snv2_status snv2_result_shape(const snv2_network* network, size_t result, int64_t batch,
                              int64_t height, int64_t width, int64_t shape[4]) {
  return guarded([&] {
    const snv2::Program& program = checked(network, "network").network.program();
    checked(shape, "shape");
    if (result >= program.results().size()) throw std::invalid_argument("result: no such result");
    if (batch < 0 || height < 1 || width < 1) throw std::invalid_argument("height, width: below 1");
    program.check_size(height, width);
    const snv2::FeatureMap map = program.result_shape(result, batch, height, width);
    shape[0] = map.batch, shape[1] = map.channels, shape[2] = map.height, shape[3] = map.width;
  });
}

size_t snv2_class_count(const snv2_network* network) {
  return network == nullptr ? 0 : network->network.program().classes().size();
}

const char* snv2_class_name(const snv2_network* network, size_t index) {
  if (index >= snv2_class_count(network)) return nullptr;
  return network->network.program().classes()[index].c_str();
}

const char* snv2_about(const snv2_network* network) {
  return network == nullptr ? nullptr : network->network.program().about().c_str();
}

snv2_status snv2_run(snv2_network* network, const float* x, int64_t batch, int64_t height,
                     int64_t width, float* result) {
  return guarded([&] {
    snv2::Network& runs = checked(network, "network").network;
    const snv2::FeatureMap map{const_cast<float*>(x),
                               snv2::DType::kFloat32,
                               snv2::Layout::kContiguous,
                               batch,
                               runs.program().input().shape[1],
                               height,
                               width};
    runs.run(map, result);
  });
}

snv2_status snv2_run_images(snv2_network* network, const uint8_t* x, int64_t batch, int64_t height,
                            int64_t width, float* result) {
  return guarded([&] {
    checked(network, "network").network.run(snv2::Images{x, batch, height, width}, result);
  });
}

snv2_status snv2_run_maps(snv2_network* network, const snv2_map* x, const snv2_map* results,
                          size_t result_count) {
  return guarded([&] {
    snv2::Network& runs = checked(network, "network").network;
    const snv2::FeatureMap map = map_of(checked(x, "x"), "x");
    std::vector<snv2::FeatureMap> maps;
    if (result_count > 0) checked(results, "results");
    if (result_count > runs.program().results().size()) {
      throw std::invalid_argument("results: more than the network's");
    }
    for (size_t i = 0; i < result_count; ++i) maps.push_back(map_of(results[i], "results"));
    runs.run(map, maps.data(), result_count);
  });
}
