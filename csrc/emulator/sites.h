// Places in the source of kernels, as small numbers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator/calls.h"

namespace snv2::emulator {

class Sites {
 public:
  Sites() : sites_{{nullptr, 0}} {}

  // One number for each file and line that it is called with; 0 is an unknown place.
  uint32_t id(Site site) {
    const Entry& entry = recent_[slot(site)];
    return entry.site.file == site.file && entry.site.line == site.line ? entry.id : find(site);
  }
  std::string name(uint32_t id) const;
  // Order in the source; negative if a comes first.
  int compare(uint32_t a, uint32_t b) const;

 private:
  static constexpr size_t kRecent = 1024;
  struct Entry {
    Site site{nullptr, 0};
    uint32_t id = 0;
  };
  static size_t slot(Site site) {
    const uintptr_t mixed = reinterpret_cast<uintptr_t>(site.file) / 16 + size_t{977} * site.line;
    return mixed % kRecent;
  }
  uint32_t find(Site site);

  std::vector<Site> sites_;
  Entry recent_[kRecent];
};

std::string name_of(const Site& site);

}  // namespace snv2::emulator
