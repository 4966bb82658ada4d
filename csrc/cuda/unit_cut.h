// How a unit is cut: where its weights are, how many pixels a step has, how many rows a CTA. All
// from shapes and a description of the GPU.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/unit_cost.h"
#include "cuda/unit_load.h"
#include "cuda/unit_shape.h"

namespace snv2::SNV2_GPU {

// Columns of a step with weights in shared memory: at most, in a cluster and where there is none,
// and at least. What a step begins with is worth many rows.
constexpr int64_t kMaxShared = 128, kMaxColumns = 512, kNarrowStep = 32;

// Places one branch in shared memory, and returns the bytes it takes.
template <class T>
int64_t place(const Shape& s, Cut& c, bool projection) {
  const bool bare = projection || !s.expand, project = projection || s.project;
  const auto share = [&](int64_t rows) { return share_rows(rows, c.cluster); };
  const int64_t depth = projection ? s.in : s.mid;
  const int64_t mid = share(depth), out = share(projection ? s.proj : s.out);
  const int64_t dw_pitch = shared_pitch(c.step_rows * s.out_row);
  const int64_t mid_pitch = shared_pitch(c.ring),
                x_pitch = bare ? mid_pitch : shared_pitch(c.columns);
  const int64_t x = (bare ? mid : shared_rows<T>(s.in)) * x_pitch;
  const int64_t dw = shared_rows<T>(depth) * dw_pitch;
  Places& places = c.places[projection ? 1 : 0];
  places.x_pitch = static_cast<int>(x_pitch);
  places.mid_pitch = static_cast<int>(mid_pitch);
  places.dw_pitch = static_cast<int>(dw_pitch);
  int64_t at = 0;
  const auto take = [&](int64_t bytes, int64_t unit = 16) {
    const int64_t here = at;
    at = round_up(at + bytes, unit);
    return static_cast<int>(here);
  };
  if (bare || c.prefetch) {
    take(x * s.size);
    places.dw = take(dw * s.size);
  } else {
    places.dw = take(std::max(x, dw) * s.size);
  }
  places.mid = take(bare ? 0 : padded_rows(mid) * mid_pitch * s.size);
  places.result = take(s.result ? padded_rows(out) * dw_pitch * s.size : 0);
  places.pw1_bias = take(bare ? 0 : padded_rows(mid) * 4);
  places.dw_weights = take(mid * s.dw_floats[projection] * 4, 4);
  places.in_table = take(s.in * 4, 4);
  places.out_table = take(padded_rows(out) * 4);
  places.sources = take(s.result ? (s.proj + s.out + s.passed) * 4 : 0);
  places.pw2_bias = take(padded_rows(out) * 4);
  const bool shared = c.weights != Weights::kDirect;
  places.pw1 = take(shared && !bare ? packed_elements(mid, s.in, dtype_of<T>()) * s.size : 0);
  places.pw2 = take(shared && project ? packed_elements(out, depth, dtype_of<T>()) * s.size : 0);
  return at;
}

// Output rows that the steps of a march complete at most, starting at the top of an image.
template <int kStride>
int64_t rows_of_step(const Shape& s, int64_t columns, int64_t rows_per_cta) {
  const Heights heights(s.height, s.out_height);
  const int64_t stretch = stretch_rows(s, columns);
  int64_t most = 1, before = 0;
  for (int64_t step = 1; before < rows_per_cta && step <= 64; ++step) {
    const int in_rows = static_cast<int>(step * stretch), reach = static_cast<int>(s.reach);
    const int64_t rows = heights.complete<kStride>(in_rows, reach);
    const int64_t complete = std::min(rows_per_cta, rows);
    most = std::max(most, complete - before);
    before = complete;
  }
  return std::min(most, rows_per_cta);
}

// Fills in a cut whose weights, cluster, columns, rows and threads are given; ctas_per_sm stays 0
// if it does not fit.
template <class T, int kStride>
void complete(const Shape& s, const Device& device, Cut& c) {
  const bool direct = c.weights == Weights::kDirect, clustered = c.weights == Weights::kClustered;
  // Beside a step's rows those that their windows reach back to, no more than an image has.
  c.ring = (stretch_rows(s, c.columns) + std::min(2 * s.reach, s.height - 1)) * s.row;
  c.ctas = ceil_div(s.rows(), c.rows_per_cta);
  c.step_rows = c.last ? 1 : rows_of_step<kStride>(s, c.columns, c.rows_per_cta);
  const int64_t most = std::max<int64_t>(kBlock * Direct<T, kStride>::kBlocks / s.out_row, 1);
  c.split = direct && c.step_rows > most;
  if (c.split) c.step_rows = most;
  c.ctas_per_sm = 0;
  const int64_t share = ceil_div(s.in, c.cluster);
  if (clustered && Held<T>::parts(share, c.columns) > Held<T>::kMost * c.threads / kWarp) return;
  const int64_t by_registers = c.threads == kUnitThreads ? s.ctas_per_sm(c.weights) : 1;
  for (const bool prefetch : {true, false}) {
    c.prefetch = prefetch;
    c.shared_bytes = 0;
    for (int64_t b = 0; b < s.branches(); ++b) {
      c.shared_bytes = std::max(c.shared_bytes, place<T>(s, c, b == 1));
    }
    if (c.shared_bytes > device.shared_per_cta) continue;
    const int64_t by_memory = device.shared_per_sm / (c.shared_bytes + device.reserved_per_cta);
    const int64_t ctas = std::min(by_registers, by_memory);
    // To load ahead is worth less than a second CTA, which hides all that one waits for.
    if (ctas > c.ctas_per_sm) {
      c.ctas_per_sm = ctas;
      if (ctas == by_registers) return;
    }
  }
}

// Columns that steps may have, from `most` down to `least`, or the only ones there are: of whole
// rows, then of equal parts of a row.
inline std::vector<int64_t> widths_of_step(const Shape& s, int64_t most, int64_t least) {
  std::vector<int64_t> widths;
  const auto add = [&](int64_t columns) {
    if (columns > most || (columns < least && !widths.empty())) return;
    if (widths.empty() || columns < widths.back()) widths.push_back(columns);
  };
  for (int64_t rows = most / s.row; rows >= 1; --rows) add(rows * s.row);
  for (int64_t parts = 2; parts <= s.row / kBlock; ++parts) {
    add(round_up(ceil_div(s.row, parts), kBlock));
  }
  return widths;
}

// Output rows that a CTA (or cluster) may take: equal parts of an image, some images, or what fills
// the GPU once.
inline std::vector<int64_t> rows_of_ctas(const Shape& s, const Device& device, const Cut& c) {
  // A kernel counts the pixels of its range in 31 bits.
  const int64_t most = std::clamp<int64_t>((int64_t{1} << 29) / s.row, 1, s.rows());
  if (device.tuning.rows_per_cta > 0) return {std::min(device.tuning.rows_per_cta, most)};
  std::vector<int64_t> rows;
  // Some rows of half a sector each are an even number, or neighbours would share one.
  const int64_t whole = s.out_row * s.size % 32 == 0 ? 1 : 2;
  const auto add = [&](int64_t count) {
    if (1 < count && count < s.out_height) count = round_up(count, whole);
    count = std::clamp<int64_t>(count, 1, most);
    if (std::find(rows.begin(), rows.end(), count) == rows.end()) rows.push_back(count);
  };
  for (const int64_t parts : {1, 2, 3, 4, 5, 7, 10, 14, 20, 28, 40, 56, 112}) {
    add(ceil_div(s.out_height, parts));
  }
  for (int64_t ctas = 1; ctas <= s.ctas_per_sm(c.weights); ++ctas) {
    const int64_t full = ceil_div(s.rows(), slots_of(s, device, c, ctas));
    add(full);
    add(round_up(full, s.out_height));
  }
  return rows;
}

// Calls with(cut) for cuts of `c`'s weights and cluster.
template <class T, int kStride, class With>
void for_cuts(const Shape& s, const Device& device, Cut c, const With& with) {
  constexpr int64_t kSector = 32 / static_cast<int64_t>(sizeof(T));  // pixels
  const bool direct = c.weights == Weights::kDirect;
  const int64_t wanted = round_up(device.tuning.columns, kBlock);
  const bool wide = s.ctas_per_sm(c.weights) > 1;  // a CTA that is alone may have more threads
  for (const int64_t rows : rows_of_ctas(s, device, c)) {
    const int64_t images = ceil_div(rows, s.out_height) * s.height;
    const int64_t range = std::min(rows * kStride + 2 * s.reach, images) * s.row;
    const int64_t widest = direct          ? kBlock * Direct<T, kStride>::kBlocks
                           : c.cluster > 1 ? kMaxShared
                                           : kMaxColumns;
    const int64_t most = std::min(widest, range);
    const int64_t least = c.last ? kBlock : std::min(direct ? kSector : kNarrowStep, range);
    for (const int64_t columns :
         wanted > 0 ? widths_of_step(s, wanted, wanted) : widths_of_step(s, most, least)) {
      for (const int64_t threads : {kUnitThreads, kMostUnitThreads}) {
        if (threads != kUnitThreads && !wide) continue;
        c.rows_per_cta = rows;
        c.columns = columns;
        c.threads = threads;
        complete<T, kStride>(s, device, c);
        if (c.ctas_per_sm == 0 || (c.split && columns > 2 * kSector && wanted == 0)) continue;
        // Eight warps do not hide what they wait for; where many SMs are at work, sixteen are
        // wanted. At stride 2 they would share rows, and begin twice as many jobs.
        const bool few = kStride == 1 && wide && threads == kUnitThreads && c.ctas_per_sm == 1;
        if (few && 2 * c.ctas * c.cluster * s.branches() > device.sms) continue;
        with(c);
      }
      if (wanted > 0) break;
    }
  }
}

// Returns the cut that has the least to do among those that are nearly the fastest: the estimate is
// no better than that, and the GPU may have other work.
template <class T, int kStride>
Cut choose(const Shape& s, const Device& device) {
  constexpr double kNearly = 1.15;
  std::vector<std::pair<Cost, Cut>> cuts;
  const auto best = [&]() -> const Cut& {
    double fastest = std::numeric_limits<double>::infinity();
    for (const auto& [cost, cut] : cuts) fastest = std::min(fastest, cost.cycles);
    const auto order = [&](const auto& cut) {
      return std::make_pair(cut.first.cycles > kNearly * fastest, cut.first.work);
    };
    return std::min_element(cuts.begin(), cuts.end(),
                            [&](const auto& a, const auto& b) { return order(a) < order(b); })
        ->second;
  };
  const auto with = [&](Weights weights, int64_t cluster, bool last) {
    Cut c;
    c.weights = weights;
    c.cluster = cluster;
    c.last = last;
    for_cuts<T, kStride>(s, device, c, [&](const Cut& cut) {
      cuts.emplace_back(cost_of<T, kStride>(s, device, cut), cut);
    });
  };
  // What the tuning asks for; where there is no such cut, all others.
  const int64_t asked = device.tuning.weights;
  for (const bool last : {false, true}) {
    for (const bool others : {false, true}) {
      const auto wanted = [&](Weights weights) {
        return others || asked == 0 || asked == static_cast<int64_t>(weights);
      };
      if (wanted(Weights::kResident)) with(Weights::kResident, 1, last);
      for (int64_t cluster = 2;
           s.in_planes && wanted(Weights::kClustered) && cluster <= device.cluster; cluster *= 2) {
        with(Weights::kClustered, cluster, last);
      }
      if (wanted(Weights::kDirect)) with(Weights::kDirect, 1, last);
      if (!cuts.empty()) return best();
    }
  }
  throw std::invalid_argument("x: " + std::to_string(s.width) +
                              " pixels of width are too many for a unit of " +
                              std::to_string(s.mid) + " channels on this device");
}

// choose(), which takes longer than a launch, remembered for each kind of call.
template <class T, int kStride>
const Cut& remembered(const Shape& s, const Device& device) {
  constexpr size_t kMost = 4096;
  const Tuning& t = device.tuning;
  using Key = std::array<int64_t, 29>;
  const Key key{s.in,
                s.mid,
                s.proj,
                s.out,
                s.batch,
                s.height,
                s.width,
                s.in_planes,
                s.result,
                s.vector,
                s.passed,
                s.dw_floats[0],
                s.dw_floats[1],
                s.reach,
                s.any,
                s.expand,
                s.project,
                device.sms,
                device.shared_per_sm,
                device.shared_per_cta,
                device.reserved_per_cta,
                device.cluster,
                device.clusters_at_once[0][0],
                device.clusters_at_once[0][1],
                device.clusters_at_once[1][0],
                device.clusters_at_once[1][1],
                t.columns,
                t.rows_per_cta,
                t.weights};
  thread_local std::map<Key, Cut> cuts;
  if (const auto found = cuts.find(key); found != cuts.end()) return found->second;
  if (cuts.size() >= kMost) cuts.clear();
  return cuts[key] = choose<T, kStride>(s, device);
}

}  // namespace snv2::SNV2_GPU
