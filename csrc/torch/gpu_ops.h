// What the two builds of the CUDA kernels share. The file that includes this defines SNV2_GPU, the
// namespace of its build.
#pragma once

#include <cstdint>

#include "ops.h"
#include "snv2/cuda.h"

namespace snv2::binding::SNV2_GPU {

namespace gpu = snv2::SNV2_GPU;

struct GpuKernels {
  static constexpr auto cat_shuffle = &gpu::cat_shuffle;
  static constexpr auto dw_conv3x3 = &gpu::dw_conv3x3;
  static constexpr auto split_dw_cat_shuffle = &gpu::split_dw_cat_shuffle;
};

inline constexpr const char* kConformanceSchema = "conformance(Tensor words, int index) -> Tensor";

// Case `index` of gpu::conformance_cases() on these 32-bit words.
template <class Backend>
Tensor conformance(const Tensor& words, int64_t index) {
  Backend::check_device(words, "words");
  const gpu::ConformanceCase* const cases = gpu::conformance_cases();
  int64_t count = 0;
  while (cases[count].name != nullptr) ++count;
  STD_TORCH_CHECK(index >= 0 && index < count, "index must be in [0, ", count, "), got ", index);
  STD_TORCH_CHECK(words.scalar_type() == ScalarType::Int && words.is_contiguous() &&
                      words.numel() == cases[index].in_words,
                  "words must be ", cases[index].in_words, " contiguous int32 for case ",
                  cases[index].name);
  const auto address = reinterpret_cast<uintptr_t>(words.const_data_ptr());
  STD_TORCH_CHECK(address % 16 == 0, "words must be aligned to 16 bytes");
  const Backend backend(words);
  Tensor out =
      torch::stable::empty({cases[index].out_words}, ScalarType::Int, std::nullopt, words.device());
  gpu::run_conformance(index, words.const_data_ptr(), out.data_ptr(), backend.where);
  return out;
}

}  // namespace snv2::binding::SNV2_GPU
