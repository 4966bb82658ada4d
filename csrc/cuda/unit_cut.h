// How a unit is cut: where its weights are, how many pixels a step has, how many rows a CTA. All
// from shapes and a description of the GPU.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/unit_load.h"
#include "snv2/cuda.h"

namespace snv2::SNV2_GPU {

constexpr int64_t kMaxColumns = 128;  // of a step with weights in shared memory
// A CTA that keeps weights alone on an SM must use each of them this often.
constexpr int64_t kLongMarch = 8;
// Columns of a step with weights in shared memory: at least, and from which on a cluster is not
// made larger for wider ones.
constexpr int64_t kNarrowStep = 32, kWideStep = 48;

// Where a unit's weights are.
enum class Weights : int64_t { kResident = 1, kDirect = 2, kClustered = 3 };

struct Shape {
  int64_t in, mid, proj, out;
  int64_t batch, height, width, out_height, out_width;
  int64_t row, out_row;    // with their padding
  bool in_planes, result;  // the map is read from planes; the caller's tensor is written
  int64_t size;
  int64_t dw_floats[2];  // of a channel, in the parameters of either branch
  int64_t reach;         // of the larger window
  bool any;              // activations and windows
  bool expand, project;  // the main branch's products, one of which may be missing

  int64_t rows() const { return batch * out_height; }
  int64_t branches() const { return proj > 0 ? 2 : 1; }
  bool caller() const { return !in_planes || result; }
  // That registers allow.
  int64_t ctas_per_sm(Weights weights) const {
    return caller() || (any && weights == Weights::kDirect) ? 1 : 2;
  }
};

// How a unit is cut.
struct Cut {
  Weights weights = Weights::kDirect;
  int64_t cluster = 1;
  bool prefetch = false;
  int64_t columns = 0, ring = 0, step_rows = 0, rows_per_cta = 0;
  int64_t ctas = 0;  // of each branch, or clusters
  int64_t threads = kUnitThreads;
  int64_t ctas_per_sm = 0;
  int64_t shared_bytes = 0;
  bool split = false;  // results of a step are more than the columns that read a weight once
  bool last = false;   // for want of a better one: narrow steps, rows convolved one by one
  Places places[2] = {};
};

constexpr int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

// Rows of a matrix that a CTA of a cluster has at most.
inline int64_t share_rows(int64_t rows, int64_t cluster) {
  return std::min(rows, ceil_div(ceil_div(rows, kTileRows), cluster) * kTileRows);
}

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
  places.mid = take(bare ? 0 : mid * mid_pitch * s.size);
  places.result = take(s.result ? out * dw_pitch * s.size : 0);
  places.pw1_bias = take(bare ? 0 : padded_rows(mid) * 4);
  places.dw_weights = take(mid * s.dw_floats[projection] * 4, 4);
  places.in_table = take(s.in * 4, 4);
  places.out_table = take(out * 4);
  places.pw2_bias = take(padded_rows(out) * 4);
  const bool shared = c.weights != Weights::kDirect;
  places.pw1 = take(shared && !bare ? packed_elements(mid, s.in, dtype_of<T>()) * s.size : 0);
  places.pw2 = take(shared && project ? packed_elements(out, depth, dtype_of<T>()) * s.size : 0);
  return at;
}

// Rows of a step, or of the steps that a row takes.
inline int64_t stretch_rows(const Shape& s, int64_t columns) {
  return std::max<int64_t>(columns / s.row, 1);
}

// Output rows that the steps of a march complete at most, starting at the top of an image.
template <int kStride>
int64_t rows_of_step(const Shape& s, int64_t columns, int64_t rows_per_cta) {
  int64_t most = 1, before = 0;
  for (int64_t step = 1; before < rows_per_cta && step <= 64; ++step) {
    const int64_t complete = std::min<int64_t>(
        rows_per_cta,
        rows_complete<kStride>(static_cast<int>(step * stretch_rows(s, columns)),
                               static_cast<int>(s.height), static_cast<int>(s.out_height),
                               static_cast<int>(s.reach)));
    most = std::max(most, complete - before);
    before = complete;
  }
  return std::min(most, rows_per_cta);
}

// CTAs (or clusters) of one branch that run at once. An eighth of the SMs may be left over where a
// large cluster has to find its SMs in one part of the GPU.
inline int64_t slots_of(const Shape& s, const Device& device, const Cut& c, int64_t ctas_per_sm) {
  const int64_t sms = c.cluster > 2 ? device.sms * 7 / 8 : device.sms;
  return std::max<int64_t>(sms * ctas_per_sm / (c.cluster * s.branches()), 1);
}

// Instructions of a warp, in products of 16 x 8 x 16, that a CTA of `rows` rows executes, about.
template <class T, int kStride>
double work_of(const Shape& s, const Cut& c, int64_t rows) {
  constexpr double kProduct = sizeof(T) == 4 ? 64 : 4, kResults = 1 / 2.0, kLoad = 1 / 25.0;
  const double in_rows = static_cast<double>(std::min(rows, s.out_height) * kStride +
                                             std::min(2 * s.reach, s.height - 1));
  const double images = static_cast<double>(std::max<int64_t>(rows / s.out_height, 1));
  const double first = s.expand ? static_cast<double>(s.in * s.mid) : 0;
  const double second = s.project ? static_cast<double>(s.mid * s.out) : 0;
  const double in_pixels = images * in_rows * static_cast<double>(s.row);
  const double out_pixels = static_cast<double>(rows * s.out_row);
  return (kProduct / 2048 * (first * in_pixels + second * out_pixels) +
          kResults * static_cast<double>(s.mid) * out_pixels + kLoad * (first + second)) /
         static_cast<double>(c.cluster);
}

// Rows of each CTA (or cluster), of which an SM has room for `ctas`, for an even load of the GPU;
// whole images where that costs little. CTAs that have an SM to themselves read fewer rows twice,
// and others hide their waits: which is better, the work tells.
template <class T, int kStride>
int64_t rows_for(const Shape& s, const Device& device, const Cut& c, int64_t ctas) {
  constexpr double kAlone = 1.15;
  // A kernel counts the pixels of its range in 31 bits.
  const int64_t most = std::clamp<int64_t>((int64_t{1} << 29) / s.row, 1, s.rows());
  if (device.tuning.rows_per_cta > 0) return std::min(device.tuning.rows_per_cta, most);
  const auto for_slots = [&](int64_t per_sm) {
    const int64_t rows = std::min(ceil_div(s.rows(), slots_of(s, device, c, per_sm)), most);
    const int64_t images = round_up(rows, s.out_height);
    return images <= most && images * 8 <= rows * 9 ? images : rows;
  };
  const int64_t together = for_slots(ctas), alone = for_slots(1);
  const double both = static_cast<double>(ctas) * work_of<T, kStride>(s, c, together);
  return kAlone * work_of<T, kStride>(s, c, alone) < both ? alone : together;
}

// Fills in a cut of given weights, cluster and columns; ctas_per_sm stays 0 if it does not fit.
template <class T, int kStride>
void complete(const Shape& s, const Device& device, Cut& c) {
  const bool clustered = c.weights == Weights::kClustered;
  // Beside a step's rows those that their windows reach back to, no more than an image has.
  c.ring = (stretch_rows(s, c.columns) + std::min(2 * s.reach, s.height - 1)) * s.row;
  const int64_t blocks = c.columns / kBlock;
  const auto fits = [&](int64_t ctas) {
    c.rows_per_cta = rows_for<T, kStride>(s, device, c, ctas);
    c.ctas = ceil_div(s.rows(), c.rows_per_cta);
    const bool alone = ctas == 1 || c.ctas <= slots_of(s, device, c, 1);
    c.threads = alone && s.ctas_per_sm(c.weights) > 1 ? kMostUnitThreads : kUnitThreads;
    c.step_rows = c.last ? 1 : rows_of_step<kStride>(s, c.columns, c.rows_per_cta);
    const int64_t most = kBlock * Direct<T, kStride>::kBlocks / s.out_row;
    c.split = c.weights == Weights::kDirect && c.step_rows > std::max<int64_t>(most, 1);
    if (c.split) c.step_rows = std::max<int64_t>(most, 1);
    c.shared_bytes = 0;
    for (int64_t b = 0; b < s.branches(); ++b) {
      c.shared_bytes = std::max(c.shared_bytes, place<T>(s, c, b == 1));
    }
    return c.shared_bytes <= device.shared_per_cta &&
           ctas * (c.shared_bytes + device.reserved_per_cta) <= device.shared_per_sm &&
           s.in * blocks <= kMaxDividend && s.row + c.columns <= kMaxDividend &&
           std::max(s.mid, s.in) * s.out_row <= kMaxDividend * kBlock &&
           c.step_rows * s.out_row <= kMaxDividend &&
           (!clustered || round_up(ceil_div(s.in, c.cluster), kGroupChannels<T>) * blocks * 8 <=
                              kGroupChannels<T> * Held<T>::kMost * c.threads);
  };
  c.ctas_per_sm = 0;
  for (int64_t ctas = s.ctas_per_sm(c.weights); ctas >= 1 && c.ctas_per_sm == 0; --ctas) {
    for (const bool prefetch : {true, false}) {
      c.prefetch = prefetch;
      if (!fits(ctas)) continue;
      c.ctas_per_sm = ctas;
      break;
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

// Tries cuts of `c`'s weights and cluster from wide steps to narrow ones. Weights in shared memory:
// the first that leaves an SM room for most CTAs. From L2, where each step reads them all: a second
// CTA, which hides latency, is worth a third of the width.
template <class T, int kStride>
Cut widest(const Shape& s, const Device& device, const Cut& c) {
  constexpr int64_t kSector = 32 / static_cast<int64_t>(sizeof(T));  // pixels
  const bool direct = c.weights == Weights::kDirect, forced = device.tuning.columns != 0;
  const int64_t rows = rows_for<T, kStride>(s, device, c, s.ctas_per_sm(c.weights));
  const int64_t range = (rows * kStride + 2 * s.reach) * s.row;
  const int64_t most = std::min(direct ? kBlock * Direct<T, kStride>::kBlocks : kMaxColumns, range);
  const int64_t least = c.last ? kBlock : std::min(direct ? kSector : kNarrowStep, range);
  const auto worth = [&](const Cut& cut) {
    return cut.ctas_per_sm == 0 ? 0 : (cut.ctas_per_sm + 1) * (direct ? cut.columns : 1);
  };
  Cut best;
  const int64_t wanted = round_up(device.tuning.columns, kBlock);
  for (const int64_t columns :
       forced ? widths_of_step(s, wanted, wanted) : widths_of_step(s, most, least)) {
    Cut next = c;
    next.columns = columns;
    complete<T, kStride>(s, device, next);
    if (next.split && columns > 2 * kSector && !forced) continue;
    if (worth(next) > worth(best)) best = next;
    if ((best.ctas_per_sm == s.ctas_per_sm(c.weights) && !direct) || forced) break;
  }
  return best;
}

// The rule: weights in shared memory if an SM has room for all the CTAs that its registers allow;
// else spread over a cluster; else in shared memory for a long march; else from L2.
template <class T, int kStride>
Cut choose(const Shape& s, const Device& device) {
  const auto wanted = [&](Weights weights) {
    return device.tuning.weights == 0 || device.tuning.weights == static_cast<int64_t>(weights);
  };
  const auto with = [&](Weights weights, int64_t cluster, bool last = false) {
    Cut c;
    c.last = last;
    c.weights = weights;
    c.cluster = cluster;
    return widest<T, kStride>(s, device, c);
  };
  Cut best, lonely;
  if (wanted(Weights::kResident)) {
    const Cut c = with(Weights::kResident, 1);
    if (c.ctas_per_sm == s.ctas_per_sm(c.weights) || device.tuning.weights != 0) {
      best = c;
    } else if (c.rows_per_cta * s.out_row >= kLongMarch * c.columns) {
      lonely = c;
    }
  }
  if (best.ctas_per_sm == 0 && s.in_planes && wanted(Weights::kClustered)) {
    // The smallest whose steps are wide, or a larger one where SMs would stand idle.
    const auto worth = [](const Cut& c) {
      return c.ctas_per_sm * 1024 + std::min(c.columns, kWideStep);
    };
    for (int64_t cluster = 2; cluster <= device.cluster; cluster *= 2) {
      const Cut c = with(Weights::kClustered, cluster);
      const bool idle =
          best.ctas_per_sm > 0 && c.rows_per_cta == 1 && c.ctas <= slots_of(s, device, c, 1);
      if (c.ctas_per_sm > 0 && (worth(c) > worth(best) || idle)) best = c;
    }
  }
  if (best.ctas_per_sm == 0) best = lonely;
  if (best.ctas_per_sm == 0) best = with(Weights::kDirect, 1);
  for (int64_t cluster = device.cluster;
       s.in_planes && wanted(Weights::kClustered) && best.ctas_per_sm == 0 && cluster >= 2;
       cluster /= 2) {
    best = with(Weights::kClustered, cluster, true);
  }
  if (best.ctas_per_sm == 0 && wanted(Weights::kResident)) best = with(Weights::kResident, 1, true);
  if (best.ctas_per_sm == 0) best = with(Weights::kDirect, 1, true);
  if (best.ctas_per_sm == 0) {
    throw std::invalid_argument("x: " + std::to_string(s.width) +
                                " pixels of width are too many for a unit of " +
                                std::to_string(s.mid) + " channels on this device");
  }
  return best;
}

// choose(), which takes longer than a launch, remembered for each kind of call.
template <class T, int kStride>
const Cut& remembered(const Shape& s, const Device& device) {
  constexpr size_t kMost = 4096;
  const Tuning& t = device.tuning;
  using Key = std::array<int64_t, 23>;
  const Key key{s.in,
                s.mid,
                s.proj,
                s.out,
                s.batch,
                s.height,
                s.width,
                s.in_planes,
                s.result,
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
                t.columns,
                t.rows_per_cta,
                t.weights};
  thread_local std::map<Key, Cut> cuts;
  if (const auto found = cuts.find(key); found != cuts.end()) return found->second;
  if (cuts.size() >= kMost) cuts.clear();
  return cuts[key] = choose<T, kStride>(s, device);
}

}  // namespace snv2::SNV2_GPU
