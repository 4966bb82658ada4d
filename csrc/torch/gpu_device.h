// A Device as numbers with names. The file that includes this defines SNV2_GPU.
#pragma once

#include <cstdint>
#include <vector>

#include "snv2/cuda.h"

namespace snv2::binding::SNV2_GPU {

namespace gpu = snv2::SNV2_GPU;

inline constexpr const char* kDeviceFields[] = {
    "sms",     "shared_per_sm", "shared_per_cta", "reserved_per_cta", "l2_bytes",
    "cluster", "columns",       "rows_per_cta",   "weights",          "images"};

inline std::vector<int64_t> values_of(const gpu::Device& d) {
  return {d.sms,     d.shared_per_sm,  d.shared_per_cta,      d.reserved_per_cta, d.l2_bytes,
          d.cluster, d.tuning.columns, d.tuning.rows_per_cta, d.tuning.weights,   d.tuning.images};
}

// v has one value for each of kDeviceFields.
inline gpu::Device device_from(const std::vector<int64_t>& v) {
  return {v[0], v[1], v[2], v[3], v[4], v[5], {v[6], v[7], v[8], v[9]}};
}

}  // namespace snv2::binding::SNV2_GPU
