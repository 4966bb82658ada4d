// What csrc/cuda/launch.h tells the PTX interpreter beside what it tells CUDA.
#pragma once

#include <cstdint>

namespace snv2::ptx {

// Memory that the next launch of this thread may touch. What holds nothing is filled with NaN.
void declare_buffer(const void* address, int64_t bytes, bool written, bool constant,
                    bool holds_nothing);

}  // namespace snv2::ptx
