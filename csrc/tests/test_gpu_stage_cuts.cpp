// How stages in one launch share a cluster's memory: no two things lie in one place at one time.
#include "cuda/stages_cut.h"
#include "gpu_stage_shapes.h"

namespace snv2::SNV2_GPU {
namespace {

struct Region {
  std::string name;
  int64_t at, bytes;
  int from, to;
};

// Returns which two overlap, or nothing.
std::string overlapping(const std::vector<Region>& regions) {
  for (size_t i = 0; i < regions.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      const Region &a = regions[i], &b = regions[j];
      const bool times = a.from <= b.to && b.from <= a.to;
      if (times && a.at < b.at + b.bytes && b.at < a.at + a.bytes) return b.name + " and " + a.name;
    }
  }
  return "";
}

// Random regions, by SharedRegions.
struct Placed {
  std::vector<Region> regions;
  std::vector<int> at;

  explicit Placed(uint32_t seed) {
    std::mt19937 numbers(seed);
    const auto below = [&](uint32_t most) { return static_cast<int>(numbers() % most); };
    const int count = 1 + below(24);
    for (int i = 0; i < count; ++i) {
      const int from = below(12);
      regions.push_back(
          {std::to_string(i), 0, 1 + below(below(2) ? 4000 : 100), from, from + below(5)});
    }
    at.resize(regions.size());
  }
  int64_t place(int64_t begin, int64_t most) {
    SharedRegions shared(begin);
    for (size_t i = 0; i < regions.size(); ++i) {
      shared.ask(at[i], regions[i].bytes, regions[i].from, regions[i].to);
    }
    const int64_t end = shared.place(most);
    for (size_t i = 0; i < regions.size(); ++i) regions[i].at = at[i];
    return end;
  }
};

// Where everything lies, and from when to when it is needed: three phases for each unit. A
// neighbour that is a unit ahead stores to a CTA that has begun the unit before.
template <class T>
std::vector<Region> regions_of(const StagesParams<T>& p) {
  constexpr int64_t kSize = sizeof(T);
  std::vector<Region> all;
  const auto phase = [](int unit, int at) { return std::max(unit * 3 + at, 0); };
  const int end = phase(p.units, 0);
  all.push_back({"rings, barriers and tokens", 0, p.tokens_at + 2 * kTokenBytes, 0, end});
  for (int i = 0; i < p.units; ++i) {
    const StagedUnit& u = p.unit[i];
    const std::string of = " of unit " + std::to_string(i);
    const auto add = [&](const char* name, int64_t at, int64_t bytes, int from, int to) {
      if (bytes > 0) all.push_back({name + of, at, bytes, from, to});
    };
    if (u.stride == 2) {
      const StagedMap& out = p.maps[u.out];
      int next = i + 1;
      while (next < p.units && p.unit[next].stride == 1) ++next;
      const int early = next < p.units ? phase(next - 1, 0) : phase(i, 2);
      add("the map", out.at, (out.planes + 1) * out.pitch * kSize, std::min(phase(i, 2), early),
          next < p.units ? phase(next, 1) : end);
    }
    const StagedMap& in = p.maps[u.in];
    CHECK(u.mid_pitch >= (in.rows + (u.stride == 1 ? 2 : 1)) * in.row, "MID%s", of.c_str());
    CHECK(u.dw_pitch >= p.maps[u.out].columns(), "DW%s", of.c_str());
    CHECK(in.pitch >= in.top + in.columns(), "the map read%s", of.c_str());
    add("MID", u.mid_at, padded_rows(u.mid) * u.mid_pitch * kSize, phase(i - 1, 0), phase(i, 1));
    add("DW", u.dw.out_at, padded_rows(u.mid) * u.dw_pitch * kSize, phase(i, 1), phase(i, 2));
    const auto parameters = [&](const char* name, const StagedArray& array, int64_t count) {
      add(name, array.at, count * 4, phase(i - 1, 1), phase(i, 2));
    };
    parameters("the bias of pw1", u.pw1_bias, padded_rows(u.mid));
    parameters("the bias of pw2", u.pw2_bias, padded_rows(u.main));
    parameters("the convolution", u.dw.weights, u.mid * kDepthwiseFloats);
    parameters("the planes read", u.in_table, padded_rows(u.in_channels));
    parameters("the planes written", u.out_table, padded_rows(u.main));
    if (u.stride == 1) continue;
    add("DW of the projection", u.proj_dw.out_at, padded_rows(u.in_channels) * u.dw_pitch * kSize,
        phase(i, 1), phase(i, 2));
    parameters("the bias of the projection", u.proj_bias, padded_rows(u.proj));
    parameters("its convolution", u.proj_dw.weights, u.in_channels * kDepthwiseFloats);
    parameters("its planes", u.proj_table, padded_rows(u.proj));
  }
  const StagedMap &first = p.maps[0], &last = p.maps[p.unit[p.units - 1].out];
  all.push_back({"the map that is read", first.at, (first.planes + 1) * first.pitch * kSize, 0, 1});
  all.push_back({"the result", p.result_at,
                 int64_t{p.result_share} * last.height * last.row * kSize, end, end});
  return all;
}

template <class T>
StagesCut check_cut(const StagesShape& s, int64_t shared_per_cta) {
  const Case c = s.with(dtype_of<T>(), 2);
  Stage stage(c);
  write(stage, s, random_map(stage, s.batch, s.in, s.height, s.width));
  const GpuPlan plan = stage.plan();
  Device device = Stage::device(c);
  device.shared_per_cta = shared_per_cta;
  StagesParams<T> params{};
  const GpuStep* const first = plan.begin() + 1;
  const StagesCut cut =
      cut_stages(params, plan, first, plan.end() - 1 - first, s.in, s.height, s.width, device);
  if (cut.steps == 0) return cut;
  CHECK(cut.cluster == s.cluster && cut.shared_bytes <= shared_per_cta, "%s: %d CTAs, %d bytes",
        s.name().c_str(), static_cast<int>(cut.cluster), static_cast<int>(cut.shared_bytes));
  const std::vector<Region> regions = regions_of(params);
  const std::string wrong = overlapping(regions);
  CHECK(wrong.empty(), "%s: %s overlap", s.name().c_str(), wrong.c_str());
  for (const Region& region : regions) {
    CHECK(region.at % 16 == 0 && region.at >= 0 && region.at + region.bytes <= cut.shared_bytes,
          "%s: %s", s.name().c_str(), region.name.c_str());
  }
  return cut;
}

}  // namespace

TEST(regions_at_one_time_are_apart) {
  for (uint32_t seed = 0; seed < 400; ++seed) {
    Placed placed(seed);
    const int64_t begin = 16 * (seed % 7), end = placed.place(begin, seed % 2 == 0 ? 1 << 20 : 1);
    const std::string wrong = overlapping(placed.regions);
    CHECK(wrong.empty(), "seed %u: %s", seed, wrong.c_str());
    int64_t last = begin;
    for (const Region& region : placed.regions) {
      CHECK(region.at % 16 == 0 && region.at >= begin, "seed %u: %s", seed, region.name.c_str());
      last = std::max(last, region.at + round_up(region.bytes, 16));
    }
    CHECK(last == end, "seed %u", seed);
  }
}
// Where the largest regions first take more than there is, another order may not.
TEST(regions_that_do_not_fit_are_tried_in_other_orders) {
  int better = 0;
  for (uint32_t seed = 0; seed < 400; ++seed) {
    Placed placed(seed);
    const int64_t end = placed.place(0, 1 << 20);
    const int64_t again = placed.place(0, end - 1);
    better += again < end;
    CHECK(overlapping(placed.regions).empty(), "seed %u", seed);
  }
  CHECK(better >= 20, "%d", better);
}
TEST(stages_of_x1_0_fit_and_are_apart) {
  const StagesShape whole{1, 24, 56, 56, 58, {4, 8, 4}, 7, 0, true, true};
  CHECK(check_cut<half_t>(whole, 227 * 1024).steps == 16);
}
TEST(cuts_of_all_shapes_are_apart) {
  const StagesShape shapes[] = {{1, 7, 14, 12, 9, {1}, 7},
                                {1, 5, 57, 12, 8, {1, 1, 1}, 8},
                                {1, 9, 40, 26, 21, {1, 1, 2}, 5, 3},
                                {1, 24, 50, 40, 29, {2, 1, 3}, 7},
                                {1, 130, 7, 14, 129, {2}, 4, 70}};
  for (const StagesShape& s : shapes) {
    CHECK(check_cut<half_t>(s, 227 * 1024).steps > 0, "%s", s.name().c_str());
    CHECK(check_cut<bfloat16_t>(s, 227 * 1024).steps > 0, "%s", s.name().c_str());
  }
}

}  // namespace snv2::SNV2_GPU
