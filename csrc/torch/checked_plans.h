// Plans that the calling thread has checked. To check one takes as long as some of a small
// network's layers; to compare it with a copy of the last ones, nearly nothing.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "tensors.h"

namespace snv2::binding {

// The plan of some words, which a copy holds until the thread has checked as many others. `sizes`
// are what P's constructor takes besides. Throws what that does.
template <class P, class... Sizes>
const P& checked_plan(const Tensor& words, Sizes... sizes) {
  STD_TORCH_CHECK(
      words.is_cpu() && words.scalar_type() == ScalarType::Long && words.is_contiguous(),
      "plan must be a contiguous int64 CPU tensor");
  struct Known {
    std::vector<int64_t> words;
    std::array<int64_t, sizeof...(Sizes)> sizes;
    std::optional<P> plan;
  };
  constexpr size_t kKept = 4;
  thread_local std::array<Known, kKept> known;
  thread_local size_t oldest = 0;
  const auto* const begin = static_cast<const int64_t*>(words.const_data_ptr());
  const auto* const end = begin + words.numel();
  const std::array<int64_t, sizeof...(Sizes)> wanted{sizes...};
  for (const Known& each : known) {
    const bool same = each.plan.has_value() && each.sizes == wanted &&
                      std::equal(begin, end, each.words.begin(), each.words.end());
    if (same) return *each.plan;
  }
  Known& place = known[oldest];
  place.plan.reset();
  place.words.assign(begin, end);
  place.sizes = wanted;
  place.plan.emplace(place.words.data(), words.numel(), sizes...);
  oldest = (oldest + 1) % kKept;
  return *place.plan;
}

}  // namespace snv2::binding
