// What a launch is made of, and its CTAs, group by group.
#include <algorithm>
#include <cstring>
#include <deque>
#include <mutex>

#include "emulator/machine.h"

namespace snv2::emulator {
namespace {

constexpr uint32_t kMaxThreads = 1024;
constexpr int64_t kMaxShared = 227 * 1024;
constexpr uint32_t kMaxCluster = 8;
constexpr uint64_t kMaxGroupThreads = 64 * 1024;  // resident at once: a cooperative grid
constexpr int64_t kPage = 4096;
constexpr size_t kRemembered = 64;  // launches

// Of the memory that a CTA's shared memory lies in. A GPU's starts on no larger boundary.
constexpr int64_t shared_room(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

uint64_t group_of(const LaunchShape& shape) {
  return shape.cooperative ? uint64_t{shape.grid.x} * shape.grid.y : shape.cluster;
}

// Launches of all host threads take turns.
std::mutex turn;
Stacks stacks;
Sites sites;
tsan::Order order;

thread_local Counters counters_of_thread;
thread_local std::deque<LaunchParameters> parameters_of_thread;
thread_local bool races_are_checked = true;
thread_local int64_t last_ctas = 0;  // all
thread_local bool launching = false;

void enter_machine() { machine->enter(); }

}  // namespace

Machine::Machine(const LaunchShape& shape, void (*kernel)(const void*), const void* params,
                 Counters& counters, Sites& sites, Stacks& stacks, tsan::Order& order)
    : shape_(shape),
      counters_(counters),
      sites_(sites),
      stacks_(stacks),
      kernel_(kernel),
      params_(params),
      shared_memory_(tsan::Order::kTurns * group_of(shape) *
                     static_cast<size_t>(shared_room(shape.shared_bytes))),
      scheduler_(calling_context()),
      order_(order) {
  for (uint64_t i = 0; i < group_of(shape); ++i) {
    shared_shadows_.push_back(std::make_unique<Shadow>(shape.shared_bytes, false));
  }
}

Machine::~Machine() {
  end_group();
  for (size_t i = 0; i < fibers_.size(); ++i) {
    if (fibers_[i].state != State::kDone) stacks_.abandon(stack_of(i));
  }
  order_.end_launch();
}

void Machine::begin_group(uint64_t first_cta, uint32_t ctas) {
  const uint32_t warps = (shape_.threads + kLanes - 1) / kLanes;
  const uint64_t first_thread = first_cta * shape_.threads + 1;
  ctas_.assign(ctas, {});
  fibers_.resize(size_t{ctas} * shape_.threads);
  warps_.assign(size_t{ctas} * warps, {});
  {
    // A thread of the last group may have made a store from there, and is not ordered with this.
    const tsan::Unobserved unobserved;
    transactions_.clear();
  }
  clock_ = 1;
  order_.begin_group(static_cast<uint32_t>(fibers_.size()));
  const auto serial = [&](uint32_t thread) { return static_cast<uint32_t>(first_thread + thread); };
  for (uint32_t c = 0; c < ctas; ++c) {
    Cta& cta = ctas_[c];
    cta.shared =
        shared_memory_.data() + (order_.turn() * ctas + c) * shared_room(shape_.shared_bytes);
    cta.live = shape_.threads;
    const tsan::Unobserved unobserved;
    std::memset(cta.shared, 0xff, static_cast<size_t>(shape_.shared_bytes));
    shared_shadows_[c]->forget(static_cast<uint32_t>(first_thread - 1));
    for (uint32_t w = 0; w < warps; ++w) {
      Warp& warp = warps_[c * warps + w];
      warp.first = c * shape_.threads + w * kLanes;
      warp.threads = std::min(kLanes, shape_.threads - w * kLanes);
      warp.ready = static_cast<uint32_t>((uint64_t{1} << warp.threads) - 1);
    }
    const uint64_t index = first_cta + c;
    const uint32_t first = c * shape_.threads, cluster = c - c % shape_.cluster;
    for (uint32_t t = 0; t < shape_.threads; ++t) {
      Fiber& f = fibers_[first + t];
      Copies kept = std::move(f.under_way);  // for its memory
      f = Fiber{};
      f.under_way = std::move(kept);
      f.context = stacks_.start(stack_of(first + t), enter_machine);
      order_.begin(f.context);
      f.cta = c;
      f.thread = t;
      f.builtins.thread_index = {t, 0, 0};
      f.builtins.block_index = {static_cast<uint32_t>(index % shape_.grid.x),
                                static_cast<uint32_t>(index / shape_.grid.x), 0};
      f.builtins.block_dim = {shape_.threads, 1, 1};
      f.builtins.grid_dim = shape_.grid;
      const Warp& warp = warps_[c * warps + t / kLanes];
      f.view.thread = serial(first + t);
      f.view.trusting = !races_are_checked;
      f.view.warp = {serial(warp.first), warp.threads, 0};
      f.view.cta = {serial(first), shape_.threads, 0};
      f.view.cluster = {serial(cluster * shape_.threads), shape_.cluster * shape_.threads, 0};
      f.view.cluster_reads = f.view.cluster;
      f.view.grid = {serial(0), ctas * shape_.threads, 0};
    }
  }
}

void Machine::end_group() {
  for (const Fiber& f : fibers_) order_.end(f.context);
}

// A launch that waits for this one might begin before the launches before this one have ended.
void Machine::finish() const {
  if (shape_.overlaps && !any_waited_) {
    throw Fault("a launch that overlaps with the one before it never calls grid_dependency_wait");
  }
}

Counters counters() { return counters_of_thread; }
void reset_counters() { counters_of_thread = {}; }
std::vector<LaunchParameters> latest_parameters() {
  return {parameters_of_thread.begin(), parameters_of_thread.end()};
}
void remember_parameters(uint32_t threads, const void* params, size_t bytes) {
  const auto* begin = static_cast<const unsigned char*>(params);
  if (parameters_of_thread.size() == kRemembered) parameters_of_thread.pop_front();
  parameters_of_thread.push_back({threads, {begin, begin + bytes}});
}
void check_races(bool on) { races_are_checked = on; }
void run_last_ctas(int64_t ctas) { last_ctas = ctas; }

void run(const LaunchShape& shape, const Region* regions, int region_count,
         void (*kernel)(const void*), const void* params) {
  const uint64_t ctas = uint64_t{shape.grid.x} * shape.grid.y;
  const auto require = [](bool ok, const char* message) {
    if (!ok) throw std::invalid_argument(std::string("launch: ") + message);
  };
  require(!launching, "a kernel cannot launch kernels");
  require(shape.threads >= 1 && shape.threads <= kMaxThreads, "threads must be 1 to 1024");
  require(shape.grid.x >= 1 && shape.grid.x <= 0x7fffffffu, "grid_x must be 1 to 2^31 - 1");
  require(shape.grid.y >= 1 && shape.grid.y <= 65535, "grid_y must be 1 to 65535");
  require(shape.shared_bytes >= 0 && shape.shared_bytes <= kMaxShared,
          "shared_bytes must be 0 to 227 KiB");
  require(shape.cluster >= 1 && shape.cluster <= kMaxCluster && shape.grid.x % shape.cluster == 0,
          "cluster must be 1 to 8 and divide grid_x");
  const uint64_t group = group_of(shape);
  require(group * shape.threads <= kMaxGroupThreads, "a cooperative grid must fit the GPU at once");
  require(ctas * shape.threads < kTransfers, "the emulator runs fewer than 15 * 2^28 threads");

  const std::lock_guard lock(turn);
  Counters& c = counters_of_thread;
  ++c.launches;
  c.shared_bytes = std::max(c.shared_bytes, shape.shared_bytes);
  Machine running(shape, kernel, params, c, sites, stacks, order);
  for (int i = 0; i < region_count; ++i) running.add(regions[i], last_ctas == 0);
  const struct Entered {
    explicit Entered(Machine* m) {
      machine = m;
      launching = true;
    }
    ~Entered() {
      machine = nullptr;
      launching = false;
    }
  } entered(&running);
  const uint64_t groups = ctas / group;
  const uint64_t wanted = (static_cast<uint64_t>(last_ctas) + group - 1) / group;
  const uint64_t skipped = wanted == 0 || wanted > groups ? 0 : groups - wanted;
  for (uint64_t first = skipped * group; first < ctas; first += group) {
    running.run_group(first, static_cast<uint32_t>(group));
  }
  running.finish();
}

}  // namespace snv2::emulator
