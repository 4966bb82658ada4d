// Units of some stages in one launch of clusters, on the emulator: against loops in double, and bit
// for bit against a launch for each unit.
#include <cstring>

#include "gpu_stage_shapes.h"
#include "race_reports.h"

namespace snv2::SNV2_GPU {
namespace {

constexpr DType kShort[] = {DType::kFloat16, DType::kBFloat16};

void check_equal(const std::vector<std::vector<float>>& together,
                 const std::vector<std::vector<float>>& apart, const std::string& name) {
  CHECK(together.size() == apart.size(), "%s", name.c_str());
  for (size_t r = 0; r < together.size(); ++r) {
    int64_t differ = 0;
    for (size_t i = 0; i < together[r].size(); ++i) {
      const float a = together[r][i], b = apart[r][i];
      differ += std::memcmp(&a, &b, sizeof a) != 0 && !(std::isnan(a) && std::isnan(b));
    }
    CHECK(differ == 0, "%s: %d of %zu elements of result %zu are not those of a launch each",
          name.c_str(), static_cast<int>(differ), together[r].size(), r);
  }
}

// With maps in two buffers a launch takes an odd number of stages: it reads one while it writes the
// other.
void run_written(Stage& stage, const StagesShape& s, DType dtype) {
  // ThreadSanitizer has room for so many threads; those of two clusters are there at once.
  constexpr int64_t kMostCtas = 5;
  if (kTsan && s.cluster * std::min<int64_t>(s.batch, 2) > kMostCtas) return;
  Case apart = s.with(dtype, 0), together = s.with(dtype, 2);
  int64_t units = 0;
  for (const int64_t count : s.units) units += count;
  const int64_t others = 1 + (s.head ? 2 : 1), launches = s.units.size() % 2 == 1 ? 1 : 2;
  apart.launches = others + units;
  together.launches = others + launches;

  std::vector<LaunchInfo> infos(static_cast<size_t>(apart.launches));
  int64_t count = 0;
  describe_network(stage.plan(), s.batch, s.height, s.width, Stage::device(together), infos.data(),
                   apart.launches, count);
  CHECK(count == together.launches, "%s: %d launches", s.name().c_str(), static_cast<int>(count));
  const LaunchInfo& last = infos[static_cast<size_t>(launches)];
  CHECK(last.kernel == std::string("stages") && last.cluster == s.cluster &&
            last.ctas == s.cluster * s.batch,
        "%s: %s by clusters of %d", s.name().c_str(), last.kernel, static_cast<int>(last.cluster));
  const auto results = stage.run(together);
  check_equal(results, stage.run(apart), s.name());
}

void run_stages_of(const StagesShape& s, DType dtype) {
  Stage stage(s.with(dtype, 0));
  write(stage, s, random_map(stage, s.batch, s.in, s.height, s.width));
  run_written(stage, s, dtype);
}
void run_stages_of(const std::vector<StagesShape>& shapes) {
  for (const DType dtype : kShort) {
    for (const StagesShape& s : shapes) run_stages_of(s, dtype);
  }
}

}  // namespace

// The last CTA has as many rows as the others, or fewer.
TEST(stage_clusters_of_all_sizes) {
  run_stages_of({{1, 5, 2, 3, 9, {2}, 1},
                 {3, 4, 4, 20, 17, {3}, 2},
                 {1, 10, 18, 12, 20, {3}, 5, 0, true},
                 {1, 3, 13, 15, 8, {2}, 7},
                 {1, 6, 15, 30, 12, {2}, 8},
                 {1, 6, 29, 9, 11, {2}, 8, 0, true}});
}
// Rows of one to four blocks of 8 pixels, and jobs of one, two and four.
TEST(stage_clusters_of_all_widths) {
  for (const int64_t width : {1, 15, 17, 31, 33, 48, 49, 64}) {
    run_stages_of({1, 5, 6, width, 10, {2}, 3}, DType::kFloat16);
  }
  for (const int64_t width : {1, 15, 17, 31, 33, 48, 49, 64}) {
    run_stages_of({1, 5, 11, width, 10, {2}, 6}, DType::kBFloat16);
  }
}
// Matrices of few tiles stay where they are; of many each quad makes place for another one.
TEST(stage_clusters_of_all_depths) {
  run_stages_of({{1, 64, 7, 5, 33, {2}, 4, 4},
                 {1, 66, 7, 9, 64, {2}, 4, 1},
                 {1, 128, 5, 7, 85, {3}, 3, 0, true},
                 {1, 130, 7, 14, 129, {2}, 4, 70}});
  run_stages_of({1, 24, 5, 20, 150, {3}, 3, 11}, DType::kBFloat16);
}
// A unit that begins a stage and ends it writes the map that the next one has halved. Alone it is
// no stage.
TEST(stage_clusters_of_single_units) {
  run_stages_of({{1, 5, 57, 12, 8, {1, 1, 1}, 8}, {3, 9, 40, 26, 21, {1, 1, 2}, 5, 3, true}});
}
TEST(stage_clusters_of_three_stages) {
  run_stages_of({{3, 5, 25, 23, 20, {2, 3, 2}, 4},
                 {1, 24, 50, 40, 29, {2, 1, 3}, 7, 0, true},
                 {1, 3, 64, 17, 6, {3, 2, 1}, 8, 20}});
}
// Units of a stage may ask for more planes than the one before.
TEST(stage_clusters_of_buffers_that_grow) {
  run_stages_of({{1, 5, 14, 9, 17, {3}, 7, 0, false, false, true}});
}
TEST(two_stages_are_two_launches) { run_stages_of({{1, 12, 28, 12, 16, {2, 2}, 7}}); }
// A pixel of the last row of a CTA, and one of the first row of another.
TEST(nan_and_infinity_pass_clusters_as_they_pass_units) {
  for (const DType dtype : kShort) {
    const StagesShape s{3, 7, 26, 19, 18, {2}, 7};
    Stage stage(s.with(dtype, 0));
    Map x = random_map(stage, s.batch, s.in, s.height, s.width);
    x.at(0, 3, 7 * s.width + 10) = static_cast<double>(kNan);
    x.at(1, 4, 16 * s.width + 18) = static_cast<double>(kInf);
    x.at(2, 0, 25 * s.width) = -static_cast<double>(kInf);
    write(stage, s, std::move(x));
    run_written(stage, s, dtype);
  }
}
// A plane that a unit does not read has no part in it, whatever lies there: the first one is all
// infinite, and what a head of one feature makes of that is not NaN.
TEST(infinity_beside_the_planes_that_a_unit_reads) {
  for (const DType dtype : kShort) {
    const StagesShape s{1, 7, 10, 9, 18, {2}, 5, 0, true};
    Stage stage(s.with(dtype, 0));
    stage.copy(random_map(stage, s.batch, s.in, s.height, s.width));
    stage.next_is_infinite();
    stage.unit(2, s.half, false, false);
    stage.unit(1, s.half, false, false);
    stage.head(1, 1);
    run_written(stage, s, dtype);
  }
}

}  // namespace snv2::SNV2_GPU
