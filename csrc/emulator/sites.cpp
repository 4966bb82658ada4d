#include "emulator/sites.h"

#include <cstring>

namespace snv2::emulator {

uint32_t Sites::find(Site site) {
  uint32_t id = 0;
  while (id < sites_.size() && (sites_[id].file != site.file || sites_[id].line != site.line)) ++id;
  if (id == sites_.size()) sites_.push_back(site);
  recent_[slot(site)] = {site, id};
  return id;
}

std::string Sites::name(uint32_t id) const { return name_of(sites_[id]); }

int Sites::compare(uint32_t a, uint32_t b) const {
  const Site &first = sites_[a], &second = sites_[b];
  if (first.file != second.file) {
    if (first.file == nullptr || second.file == nullptr) return first.file == nullptr ? -1 : 1;
    const int files = std::strcmp(first.file, second.file);
    if (files != 0) return files;
  }
  return first.line - second.line;
}

std::string name_of(const Site& site) {
  if (site.file == nullptr) return "an unknown place";
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

}  // namespace snv2::emulator
