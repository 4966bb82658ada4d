// The stem and the head of a network on the emulator, against loops in double; then their traffic.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/network.h"
#include "emulator/emulator.h"
#include "gpu_ends.h"

namespace snv2::SNV2_GPU {
namespace {

// Stem ----------------------------------------------------------------------------------------

enum class Source { kContiguous, kChannelsLast, kBytes };
constexpr Source kSources[] = {Source::kContiguous, Source::kChannelsLast, Source::kBytes};

struct StemCase {
  DType dtype;
  Source source;
  int64_t batch, channels, height, width;
  int64_t out = 24;
  int64_t offset = 0;  // of the image, in elements
  int64_t sms = 132;
  bool special = false;  // with NaN and infinity

  std::string name() const {
    return "stem dtype " + std::to_string(static_cast<int>(dtype)) + " source " +
           std::to_string(static_cast<int>(source)) + " " + std::to_string(batch) + "x" +
           std::to_string(channels) + "x" + std::to_string(height) + "x" + std::to_string(width) +
           " out " + std::to_string(out) + " offset " + std::to_string(offset);
  }
};

constexpr float kScale[4] = {0.017f, 0.018f, 0.0172f, 0.02f};
constexpr float kShift[4] = {-2.1f, -2.0f, -1.8f, 0.3f};

// Runs the stem, checks its result, and returns what it counted.
emulator::Counters run_stem_case(const StemCase& c) {
  Ends net(c.dtype, c.channels, c.out);
  const GpuPlan plan = net.plan();
  const int64_t plane = c.height * c.width, count = c.batch * c.channels * plane;
  const bool bytes = c.source == Source::kBytes;

  // The image, and its values [n][c][pixel].
  std::vector<float> given = random(count);
  if (c.special) {
    given[0] = kNan;
    given[static_cast<size_t>(count / 2)] = kNan;
    for (int64_t i = count / 3; i < count; i += 31) given[static_cast<size_t>(i)] = kInf;
  }
  Elements image(c.dtype, given, c.offset);
  Elements one(c.dtype, 1);
  std::vector<unsigned char> byte_image(static_cast<size_t>(count + c.offset) + 64);
  unsigned char* const first_byte =
      byte_image.data() + (64 - reinterpret_cast<uintptr_t>(byte_image.data()) % 64) % 64;
  for (int64_t i = 0; i < count; ++i) {
    first_byte[c.offset + i] = static_cast<unsigned char>(generator() & 255);
  }
  std::vector<double> values(static_cast<size_t>(count));
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t ch = 0; ch < c.channels; ++ch) {
      for (int64_t p = 0; p < plane; ++p) {
        const int64_t at = c.source == Source::kContiguous ? (n * c.channels + ch) * plane + p
                                                           : (n * plane + p) * c.channels + ch;
        float value = image[at];
        if (bytes) {
          one.set(0, static_cast<float>(first_byte[c.offset + at]) * kScale[ch] + kShift[ch]);
          value = one[0];
        }
        values[static_cast<size_t>((n * c.channels + ch) * plane + p)] = value;
      }
    }
  }

  Image in{};
  in.map = {bytes ? static_cast<void*>(first_byte + c.offset) : image.data(),
            c.dtype,
            c.source == Source::kContiguous ? Layout::kContiguous : Layout::kChannelsLast,
            c.batch,
            c.channels,
            c.height,
            c.width};
  in.bytes = bytes;
  std::copy_n(kScale, 4, in.scale);
  std::copy_n(kShift, 4, in.shift);
  const int64_t ch = conv3x3_extent(c.height, 2), cw = conv3x3_extent(c.width, 2);
  const int64_t oh = conv3x3_extent(ch, 2), ow = conv3x3_extent(cw, 2);
  const int64_t pitch = planes_pitch(c.batch, oh, ow, c.dtype), row = row_pitch(ow);
  Elements out(c.dtype, net.planes() * pitch);
  StepCall call{};
  call.plan = &plan;
  call.step = &net.stem();
  call.arrays = net.arrays();
  call.batch = c.batch;
  call.height = c.height, call.width = c.width;
  call.image = &in;
  call.out = planes_view(out.data(), net.planes(), c.batch, oh, ow, c.dtype);
  call.device = device_of(c.sms);
  emulator::reset_counters();
  without_fault(c.name(), [&] { run_stem(call, nullptr); });
  const emulator::Counters counted = emulator::counters();
  LaunchInfo info{};
  run_stem(call, &info);
  CHECK(counted.ctas == info.ctas && counted.shared_bytes == info.shared_bytes, "%s",
        c.name().c_str());
  if (c.dtype != DType::kFloat32) {
    CHECK(counted.mma * 16 * 8 * 16 == info.multiply_adds, "%s: %g of %g", c.name().c_str(),
          2048.0 * counted.mma, 1.0 * info.multiply_adds);
  }

  int64_t wrong = 0;
  std::vector<double> conv(static_cast<size_t>(ch * cw)), sums(conv.size());
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t o = 0; o < c.out; ++o) {
      for (int64_t y = 0; y < ch; ++y) {
        for (int64_t x = 0; x < cw; ++x) {
          double sum = net.bias_of(net.stem().pw1_bias)[o], scale = std::abs(sum);
          for (int64_t k = 0; k < c.channels * 9; ++k) {
            const int64_t iy = 2 * y + k % 9 / 3 - 1, ix = 2 * x + k % 3 - 1;
            if (iy < 0 || ix < 0 || iy >= c.height || ix >= c.width) continue;
            const double term =
                values[static_cast<size_t>((n * c.channels + k / 9) * plane + iy * c.width + ix)] *
                net.stem_weights[static_cast<size_t>(o * c.channels * 9 + k)];
            sum += term;
            scale += std::abs(term);
          }
          conv[static_cast<size_t>(y * cw + x)] = sum < 0 ? 0 : sum;
          sums[static_cast<size_t>(y * cw + x)] = scale;
        }
      }
      for (int64_t p = 0; p < oh * ow; ++p) {
        double most = -kInf, scale = 0;
        for (int64_t k = 0; k < 9; ++k) {
          const int64_t y = 2 * (p / ow) + k / 3 - 1, x = 2 * (p % ow) + k % 3 - 1;
          if (y < 0 || x < 0 || y >= ch || x >= cw) continue;
          const double value = conv[static_cast<size_t>(y * cw + x)];
          if (value > most || std::isnan(value)) most = value;
          scale = std::max(scale, sums[static_cast<size_t>(y * cw + x)]);
          if (std::isnan(most)) break;
        }
        const float actual = out[(c.out - o) * pitch + (n * oh + p / ow) * row + p % ow];
        if (close(c.dtype, actual, most, scale)) continue;
        if (++wrong < 4) {
          CHECK(false, "%s: image %d channel %d pixel %d is %g, not %g", c.name().c_str(),
                static_cast<int>(n), static_cast<int>(o), static_cast<int>(p), actual, most);
        }
      }
    }
  }
  for (int64_t p = 0; p < pitch; ++p) CHECK(std::isnan(out[p]), "%s: plane 0", c.name().c_str());
  return counted;
}

TEST(stem_of_three_channels_matches_loops) {
  const int64_t sizes[][3] = {{1, 1, 1}, {3, 7, 13}, {1, 33, 57}, {2, 20, 32}, {2, 2, 30}};
  for (const DType dtype : kDTypes) {
    for (const Source source : kSources) {
      for (const auto& size : sizes) {
        run_stem_case({dtype, source, size[0], 3, size[1], size[2]});
        run_stem_case({dtype, source, size[0], 3, size[1], size[2], 24, 0, 1, true});
      }
    }
  }
}

TEST(stem_of_other_channels_matches_loops) {
  for (const DType dtype : kDTypes) {
    for (const Source source : kSources) {
      for (const int64_t channels : {1, 2, 4}) {
        run_stem_case({dtype, source, 2, channels, 9, 14, 24, 0, 1, true});
      }
      for (const int64_t out : {1, 16, 29, 50}) run_stem_case({dtype, source, 1, 3, 10, 12, out});
    }
  }
}

TEST(stem_of_images_anywhere_matches_loops) {
  for (const DType dtype : kDTypes) {
    for (const Source source : kSources) {
      for (const int64_t offset : {1, 2, 4}) {
        run_stem_case({dtype, source, 2, 3, 12, 16, 24, offset, 1});
      }
      run_stem_case({dtype, source, 1, 3, 9, 500, 24, 0, 1, true});  // three panes
    }
  }
}

// Sectors against bytes, and conflicts against accesses.
void check_traffic(const std::string& name, const emulator::Counters& n, double loads,
                   double stores) {
  CHECK(32.0 * n.global_load_sectors <= loads, "%s: %g bytes loaded, not %g", name.c_str(),
        32.0 * n.global_load_sectors, loads);
  CHECK(32.0 * n.global_store_sectors <= stores, "%s: %g bytes stored, not %g", name.c_str(),
        32.0 * n.global_store_sectors, stores);
  CHECK(n.bank_conflicts <= 0.02 * n.shared_accesses, "%s: %g of %g accesses conflict",
        name.c_str(), 1.0 * n.bank_conflicts, 1.0 * n.shared_accesses);
}

TEST(stem_of_a_large_image_reads_it_once) {
  if (kSanitized) return;  // counts, which are those of any build
  for (const Source source : kSources) {
    const StemCase c{DType::kFloat16, source, 1, 3, 224, 224, 24, 0, 1};
    const emulator::Counters n = run_stem_case(c);
    // 7 tiles share 3 lines with the next, and each reads 2 KB of weights and 2 KB of the rest.
    const double image = 3.0 * 224 * 224 * (source == Source::kBytes ? 1 : 2);
    check_traffic(c.name(), n, 1.081 * image + 7 * 4096, 24.0 * 56 * 56 * 2);
    CHECK(n.ctas == 7 && 2 * (n.shared_bytes + 1024) <= 228 * 1024, "%s", c.name().c_str());
  }
  const StemCase c{DType::kFloat32, Source::kContiguous, 1, 3, 112, 112, 24, 0, 1};
  check_traffic(c.name(), run_stem_case(c), 1.42 * 3 * 112 * 112 * 4, 24 * 28 * 32.0 * 4);
}

// Head ----------------------------------------------------------------------------------------

struct HeadCase {
  DType dtype;
  int64_t batch, channels, height, width, features, classes;
  int64_t sms = 132;
  bool special = false;  // with NaN and infinity

  std::string name() const {
    return "head dtype " + std::to_string(static_cast<int>(dtype)) + " " + std::to_string(batch) +
           "x" + std::to_string(channels) + "x" + std::to_string(height) + "x" +
           std::to_string(width) + " -> " + std::to_string(features) + " -> " +
           std::to_string(classes) + " on " + std::to_string(sms);
  }
};

struct HeadCounters {
  emulator::Counters features, linear;
  LaunchInfo features_info, linear_info;
};

HeadCounters run_head_case(const HeadCase& c) {
  Ends net(c.dtype, 3, c.channels, c.features, c.classes);
  const GpuPlan plan = net.plan();
  const int64_t plane = c.height * c.width, row = row_pitch(c.width);
  const int64_t pitch = planes_pitch(c.batch, c.height, c.width, c.dtype);
  Elements in(c.dtype, net.planes() * pitch);  // NaN beyond the images, and in the padding of rows
  for (int64_t ch = 0; ch < c.channels; ++ch) {
    const std::vector<float> values = random(c.batch * plane);
    for (int64_t i = 0; i < c.batch * plane; ++i) {
      in.set((c.channels - ch) * pitch + i / c.width * row + i % c.width,
             values[static_cast<size_t>(i)]);
    }
  }
  if (c.special) in.set(c.channels * pitch + c.height * row, kNan);  // the second image
  Elements features(c.dtype, c.batch * c.features), scores(c.dtype, c.batch * c.classes);
  StepCall call{};
  call.plan = &plan;
  call.step = &net.head();
  call.arrays = net.arrays();
  call.batch = c.batch;
  call.height = c.height, call.width = c.width;
  call.in = planes_view(in.data(), net.planes(), c.batch, c.height, c.width, c.dtype);
  call.result = {scores.data(), c.classes, 1, c.classes, c.classes};
  call.features = features.data();
  call.device = device_of(c.sms);
  HeadCounters counted;
  emulator::reset_counters();
  without_fault(c.name() + " features", [&] { run_features(call, nullptr); });
  counted.features = emulator::counters();
  emulator::reset_counters();
  without_fault(c.name() + " linear", [&] { run_linear(call, nullptr); });
  counted.linear = emulator::counters();
  run_features(call, &counted.features_info);
  run_linear(call, &counted.linear_info);

  int64_t wrong = 0;
  const auto expect = [&](const char* what, int64_t n, int64_t row, float actual, double expected,
                          double scale) {
    if (close(c.dtype, actual, expected, scale) || ++wrong > 4) return;
    CHECK(false, "%s: %s %d of image %d is %g, not %g", c.name().c_str(), what,
          static_cast<int>(row), static_cast<int>(n), actual, expected);
  };
  for (int64_t n = 0; n < c.batch; ++n) {
    for (int64_t f = 0; f < c.features; ++f) {
      double mean = 0, scale = 0;
      for (int64_t p = 0; p < plane; ++p) {
        double sum = net.bias_of(net.head().pw1_bias)[f];
        for (int64_t k = 0; k < c.channels; ++k) {
          const double term =
              double{net.pw_weights[static_cast<size_t>(f * c.channels + k)]} *
              in[(c.channels - k) * pitch + (n * c.height + p / c.width) * row + p % c.width];
          sum += term;
          scale += std::abs(term) / static_cast<double>(plane);
        }
        mean += (sum < 0 ? 0 : sum) / static_cast<double>(plane);
      }
      expect("feature", n, f, features[n * c.features + f], mean, scale);
    }
    for (int64_t k = 0; k < c.classes; ++k) {
      double sum = net.bias_of(net.head().pw2_bias)[k], scale = std::abs(sum);
      for (int64_t f = 0; f < c.features; ++f) {
        const double term = double{net.fc_weights[static_cast<size_t>(k * c.features + f)]} *
                            features[n * c.features + f];
        sum += term;
        scale += std::abs(term);
      }
      expect("class", n, k, scores[n * c.classes + k], sum, scale);
    }
  }
  return counted;
}

TEST(head_matches_loops) {
  const int64_t sizes[][2] = {{10, 13}, {7, 7}, {1, 1}, {4, 4}, {1, 3}};
  for (const DType dtype : kDTypes) {
    for (const auto& size : sizes) {
      for (const int64_t batch : {1, 3, 9}) {
        for (const int64_t sms : {1, 132}) {
          run_head_case({dtype, batch, 24, size[0], size[1], 70, 33, sms, batch == 3});
          run_head_case({dtype, batch, 29, size[0], size[1], 16, 10, sms});
        }
      }
    }
    // Many stages, and more of them than one chunk of the linear layer.
    run_head_case({dtype, 3, 301, 7, 7, 40, 20, 1});
    run_head_case({dtype, 2, 150, 16, 16, 40, 20, 1});
    run_head_case({dtype, 3, 50, 15, 17, 40, 20, 1});  // a CTA with one group of two
  }
}

TEST(linear_layer_of_any_size_matches_loops) {
  for (const DType dtype : kDTypes) {
    for (const int64_t features : {1, 37, 130, 1030}) {
      for (const int64_t batch : {1, 5, 17, 70}) {
        run_head_case({dtype, batch, 3, 1, 1, features, batch == 5 ? 100 : 17, 1});
      }
    }
  }
}

// The map's columns begin up to half a sector early; a matrix in float32 is read in halves of
// sectors.
TEST(head_moves_what_it_says) {
  if (kSanitized) return;  // counts, which are those of any build
  for (const DType dtype : {DType::kFloat16, DType::kFloat32}) {
    const bool half = dtype == DType::kFloat16;
    const double more = half ? 1.17 : 2.0;
    for (const int64_t batch : {1, 4}) {
      const HeadCase c{dtype, batch, 464, 7, 7, 512, 320, half == (batch == 1) ? 132 : 1};
      const HeadCounters n = run_head_case(c);
      const auto check = [&](const emulator::Counters& counted, const LaunchInfo& info,
                             double stores) {
        const std::string name = c.name() + " " + info.kernel;
        // Two groups of a CTA read the same matrix, once from L2.
        const int64_t groups = name.back() == 's' && info.threads == 256 ? 2 : 1;
        check_traffic(name, counted,
                      more * static_cast<double>(info.read_bytes + groups * info.weight_bytes),
                      stores * static_cast<double>(info.written_bytes));
        CHECK(counted.ctas == info.ctas && counted.shared_bytes == info.shared_bytes, "%s",
              name.c_str());
        if (half) {
          CHECK(counted.mma * 16 * 8 * 16 == info.multiply_adds, "%s: %g of %g", name.c_str(),
                2048.0 * counted.mma, 1.0 * info.multiply_adds);
        }
      };
      check(n.features, n.features_info, 1.0);
      check(n.linear, n.linear_info, 1.6);  // runs of 32 bytes, from anywhere
    }
  }
}

TEST(head_of_one_image_has_many_ctas) {
  if (kSanitized) return;  // counts, which are those of any build
  const HeadCase c{DType::kFloat16, 1, 464, 7, 7, 1024, 1000};
  const HeadCounters n = run_head_case(c);
  CHECK(n.features.ctas == 64 && n.linear.ctas == 63);
}

}  // namespace
}  // namespace snv2::SNV2_GPU
