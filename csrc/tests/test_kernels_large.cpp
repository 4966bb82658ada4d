// Maps of more than 2^31 elements. Only their ends are touched: the emulator runs the last CTAs of
// a launch, and the rest of the memory is never there.
#include <sys/mman.h>

#include <new>

#include "check.h"
#include "emulator/convert.h"
#include "emulator/emulator.h"
#include "kernel_testing.h"
#include "race_reports.h"

namespace snv2::emulated {
namespace {

constexpr int64_t kLeast = int64_t{1} << 31;
constexpr int64_t kCompared = 256;  // elements at the end, which the last CTA writes

// Zeros, in float16.
class SparseMap {
 public:
  SparseMap(Layout layout, int64_t batch, int64_t channels, int64_t height, int64_t width)
      : map_{nullptr, DType::kFloat16, layout, batch, channels, height, width} {
    map_.data = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map_.data == MAP_FAILED) throw std::bad_alloc();
  }
  SparseMap(const SparseMap&) = delete;
  SparseMap& operator=(const SparseMap&) = delete;
  ~SparseMap() { munmap(map_.data, bytes()); }

  const FeatureMap& map() const { return map_; }
  void fill_end(int64_t count, Random& random) {
    for (int64_t i = map_.numel() - count; i < map_.numel(); ++i) {
      data()[i] = emulator::float_to_half(random.next());
    }
  }
  double at(int64_t i) const { return emulator::half_to_float(data()[i]); }

 private:
  size_t bytes() const { return static_cast<size_t>(map_.numel() * size_of(map_.dtype)); }
  uint16_t* data() const { return static_cast<uint16_t*>(map_.data); }

  FeatureMap map_;
};

struct LastCtas {
  LastCtas() { emulator::run_last_ctas(2); }
  ~LastCtas() { emulator::run_last_ctas(0); }
};

struct Position {
  int64_t n, c, y, x;
};

Position position_of(const FeatureMap& m, int64_t i) {
  const int64_t image = m.channels * m.plane(), rest = i % image;
  const bool last = m.layout == Layout::kChannelsLast;
  const int64_t c = last ? rest % m.channels : rest / m.plane();
  const int64_t pixel = last ? rest / m.channels : rest % m.plane();
  return {i / image, c, pixel / m.width, pixel % m.width};
}

int64_t index_of(const FeatureMap& m, const Position& p) {
  return p.n * m.channels * m.plane() + p.c * m.channel_stride() +
         (p.y * m.width + p.x) * m.pixel_stride();
}

// The end of `out` is as wanted(position) says, and none of it is zero by chance.
template <class F>
std::string compare_end(const SparseMap& out, const F& wanted) {
  if (out.map().numel() <= kLeast) return "the map is too small to tell anything";
  for (int64_t i = out.map().numel() - kCompared; i < out.map().numel(); ++i) {
    const double got = out.at(i), right = wanted(position_of(out.map(), i));
    if (got - right > 2e-3 || right - got > 2e-3) {
      return "wrong result: element " + std::to_string(i) + " is " + std::to_string(got) +
             " instead of " + std::to_string(right);
    }
  }
  return "";
}

std::string run_cat(Layout layout, int64_t channels, int64_t height, int64_t width) {
  const int64_t batch = kLeast / (2 * channels * height * width) + 2;
  Random random(4);
  SparseMap a(layout, batch, channels, height, width), b(layout, batch, channels, height, width);
  const SparseMap out(layout, batch, 2 * channels, height, width);
  a.fill_end(channels * height * width, random);
  b.fill_end(channels * height * width, random);
  const LastCtas last;
  cat_shuffle(a.map(), b.map(), out.map(), nullptr);
  return compare_end(out, [&](Position p) {
    const SparseMap& from = p.c % 2 == 0 ? a : b;
    p.c /= 2;
    return from.at(index_of(from.map(), p));
  });
}

std::string run_split(Layout layout, int64_t channels, int64_t height, int64_t width) {
  const int64_t batch = kLeast / (2 * channels * height * width) + 2;
  Random random(5);
  SparseMap x(layout, batch, 2 * channels, height, width);
  const SparseMap out(layout, batch, 2 * channels, height, width);
  x.fill_end(2 * channels * height * width, random);
  const std::vector<float> weight = random.values(9 * channels), scale = random.values(channels),
                           shift = random.values(channels);
  const LastCtas last;
  split_dw_cat_shuffle(x.map(), {weight.data(), scale.data(), shift.data(), 1, true}, out.map(),
                       nullptr);
  return compare_end(out, [&](Position p) {
    const int64_t c = p.c / 2;
    if (p.c % 2 == 0) return x.at(index_of(x.map(), {p.n, c, p.y, p.x}));
    double sum = 0.0;
    for (int64_t tap = 0; tap < 9; ++tap) {
      const Position q{p.n, channels + c, p.y + tap / 3 - 1, p.x + tap % 3 - 1};
      if (q.y < 0 || q.y >= height || q.x < 0 || q.x >= width) continue;
      sum += static_cast<double>(weight[static_cast<size_t>(9 * c + tap)]) *
             x.at(index_of(x.map(), q));
    }
    const auto i = static_cast<size_t>(c);
    const double y = sum * scale[i] + shift[i];
    return y < 0.0 ? 0.0 : y;
  });
}

bool add_tests() {
  if (kTsan) return true;  // it has no room for its notes on so much memory
  using Run = std::string (*)(Layout, int64_t channels, int64_t height, int64_t width);
  constexpr auto kContiguous = Layout::kContiguous, kChannelsLast = Layout::kChannelsLast;
  const struct {
    const char* name;
    Run run;
    Layout layout;
    int64_t channels, height, width;
  } cases[] = {
      {"cat_shuffle/contiguous/large", run_cat, kContiguous, 58, 28, 28},
      {"cat_shuffle/contiguous/large_strips", run_cat, kContiguous, 2, 96, 500},
      {"cat_shuffle/channels_last/large", run_cat, kChannelsLast, 58, 28, 28},
      {"split_dw_cat_shuffle/contiguous/large", run_split, kContiguous, 58, 28, 28},
      {"split_dw_cat_shuffle/contiguous/large_strips", run_split, kContiguous, 2, 96, 500},
      {"split_dw_cat_shuffle/contiguous/large_direct", run_split, kContiguous, 1, 3, 40000},
      {"split_dw_cat_shuffle/channels_last/large_strips", run_split, kChannelsLast, 58, 28, 28},
      {"split_dw_cat_shuffle/channels_last/large_images", run_split, kChannelsLast, 58, 7, 7},
      {"split_dw_cat_shuffle/channels_last/large_direct", run_split, kChannelsLast, 1, 3, 40000},
  };
  for (const auto& c : cases) {
    all_tests().push_back({c.name, [c] {
                             const std::string wrong =
                                 c.run(c.layout, c.channels, c.height, c.width);
                             CHECK(wrong.empty(), "%s", wrong.c_str());
                           }});
  }
  return true;
}

const bool tests_added = add_tests();

}  // namespace
}  // namespace snv2::emulated
