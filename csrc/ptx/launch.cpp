#include "ptx/launch.h"

#include <algorithm>
#include <map>
#include <utility>

#include "ptx/scheduler.h"

namespace snv2::ptx {
namespace {

constexpr uint32_t kMostResident = 3;  // clusters at once

}  // namespace

void Launcher::run(Kernel& kernel, const LaunchShape& shape, const std::vector<uint8_t>& parameters,
                   std::vector<Buffer> buffers) {
  if (!kernel.decoded()) decode(kernel);
  Launch launch{kernel, shape, parameters, std::move(buffers), Random(seed_, launches_++)};
  const auto own = reinterpret_cast<uint64_t>(launch.grid_barrier.data());
  launch.buffers.push_back({own, own + sizeof launch.grid_barrier, true, true});

  const uint64_t clusters = uint64_t{shape.grid_x} * shape.grid_y / shape.cluster;
  const uint32_t apart = shape.cooperative ? 1 : apart_;
  std::vector<uint32_t> order((clusters + apart - 1) / apart);
  std::generate(order.begin(), order.end(),
                [apart, next = 0u]() mutable { return std::exchange(next, next + apart); });
  uint32_t resident = shape.cooperative ? static_cast<uint32_t>(order.size()) : 1;
  if (seed_ != 0) {
    for (size_t k = order.size(); k > 1; --k) {
      std::swap(order[k - 1], order[launch.random.next() % k]);
    }
    if (!shape.cooperative) resident = 1 + launch.random.next() % kMostResident;
  }
  Scheduler scheduler(launch);
  for (size_t first = 0; first < order.size(); first += resident) {
    const size_t end = std::min(order.size(), first + resident);
    scheduler.run({order.begin() + static_cast<std::ptrdiff_t>(first),
                   order.begin() + static_cast<std::ptrdiff_t>(end)});
  }
  if (shape.overlaps && !launch.any_waited) {
    throw Fault("a launch that overlaps with the one before it never waits for it: " + kernel.name);
  }
  counts_.push_back(
      {kernel.name, "", static_cast<int64_t>(launch.instructions * clusters / order.size())});
}

void add_line_counts(const Kernel& kernel, std::vector<Count>& counts) {
  std::map<std::string, int64_t> lines;
  for (size_t i = 0; i < kernel.executed.size(); ++i) {
    if (kernel.executed[i] == 0) continue;
    lines[name_of(kernel, kernel.code[i].location)] += static_cast<int64_t>(kernel.executed[i]);
  }
  for (const auto& [place, instructions] : lines) {
    counts.push_back({kernel.name, place, instructions});
  }
}

}  // namespace snv2::ptx
