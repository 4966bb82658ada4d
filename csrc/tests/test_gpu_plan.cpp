// Plans for GPUs that are right, and the same plans with one thing wrong.
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "snv2/gpu_plan.h"

namespace {

using snv2::Activation;
using snv2::DType;
using snv2::GpuActivation;
using snv2::GpuPlan;
using snv2::GpuPlanHeader;
using snv2::GpuStep;
using snv2::GpuStepKind;
using snv2::GpuWindow;

struct Packer {
  GpuPlanHeader header = {};
  std::vector<GpuStep> steps;
  std::vector<int64_t> tables;

  explicit Packer(int64_t in_channels, DType dtype) {
    header.magic = snv2::kGpuPlanMagic;
    header.in_channels = in_channels;
    header.dtype = static_cast<int64_t>(dtype);
  }

  int64_t table(const std::vector<int64_t>& entries) {
    tables.insert(tables.end(), entries.begin(), entries.end());
    return static_cast<int64_t>(tables.size() - entries.size());
  }
  int64_t matrix(int64_t rows, int64_t depth) {
    const int64_t offset = header.weight_count;
    header.weight_count += snv2::packed_elements(rows, depth, static_cast<DType>(header.dtype));
    return offset;
  }
  int64_t floats(int64_t count) {
    const int64_t offset = header.parameter_count;
    header.parameter_count += snv2::ceil_div(count, 16) * 16;
    return offset;
  }
  int64_t bias(int64_t rows) { return floats(snv2::padded_rows(rows)); }
  GpuActivation prelu(int64_t rows) { return {Activation::kPrelu, bias(rows)}; }

  GpuStep& add(GpuStepKind kind, int64_t in, int64_t out, int64_t planes) {
    GpuStep step = {};
    step.kind = kind;
    step.stride = 1;
    step.in_buffer = in;
    step.out_buffer = out;
    step.out_planes = planes;
    step.result = snv2::kNoResult;
    steps.push_back(step);
    return steps.back();
  }

  void stem(int64_t channels) {
    GpuStep& step = add(GpuStepKind::kStem, snv2::kCallersMap, 0, channels);
    step.in_channels = header.in_channels;
    step.in_table = table(range(0, header.in_channels));
    step.out_channels = channels;
    step.out_table = table(range(0, channels));
    step.pw1_weights = matrix(channels, header.in_channels * 9);
    step.pw1_bias = bias(channels);
    step.pw1_activation = prelu(channels);
    header.halvings += 2;
  }

  // The main branch reads `main`, all channels at stride 2.
  GpuStep& unit(int64_t stride, int64_t in, int64_t out, const std::vector<int64_t>& main,
                const std::vector<int64_t>& fresh, int64_t planes, int64_t width) {
    GpuStep& step = add(GpuStepKind::kUnit, in, out, planes);
    step.stride = stride;
    step.in_channels = static_cast<int64_t>(main.size());
    step.in_table = table(main);
    step.mid_channels = width + 1;
    step.out_channels = width;
    step.out_table = table(fresh);
    step.pw1_weights = matrix(width + 1, step.in_channels);
    step.pw1_bias = bias(width + 1);
    step.dw = floats((width + 1) * snv2::depthwise_floats(5));
    step.dw_window = {5, 2};
    step.pw1_activation = {Activation::kHardswish};
    step.dw_activation = prelu(width + 1);
    step.pw2_activation = {Activation::kRelu6};
    step.pw2_weights = matrix(width, width + 1);
    step.pw2_bias = bias(width);
    if (stride == 2) {
      step.proj_channels = width;
      step.proj_dw = floats(step.in_channels * snv2::kDepthwiseFloats);
      step.proj_dw_window = {3, 1};
      step.proj_dw_activation = prelu(step.in_channels);
      step.proj_activation = {Activation::kSilu};
      step.proj_weights = matrix(width, step.in_channels);
      step.proj_bias = bias(width);
      ++header.halvings;
    }
    return step;
  }

  void result(GpuStep& step, const std::vector<int64_t>& rows) {
    step.result = header.result_count++;
    step.result_channels = static_cast<int64_t>(rows.size());
    step.result_table = table(rows);
    header.out_channels = step.result_channels;
  }

  void head(int64_t in, const std::vector<int64_t>& planes, int64_t features, int64_t classes) {
    GpuStep& step = add(GpuStepKind::kHead, in, snv2::kNoBuffer, 0);
    step.in_channels = static_cast<int64_t>(planes.size());
    step.in_table = table(planes);
    step.mid_channels = features;
    step.out_channels = header.out_channels = classes;
    step.pw1_weights = matrix(features, step.in_channels);
    step.pw1_bias = bias(features);
    step.pw1_activation = {Activation::kRelu};
    step.pw2_weights = matrix(classes, features);
    step.pw2_bias = bias(classes);
    step.result = header.result_count++;
    header.classify = 1;
  }

  static std::vector<int64_t> range(int64_t begin, int64_t end) {
    std::vector<int64_t> entries;
    for (int64_t i = begin; i < end; ++i) entries.push_back(i);
    return entries;
  }

  std::vector<int64_t> words() {
    header.step_count = static_cast<int64_t>(steps.size());
    std::vector<int64_t> all(snv2::kGpuHeaderWords + steps.size() * snv2::kGpuStepWords);
    std::memcpy(all.data(), &header, sizeof header);
    std::memcpy(all.data() + snv2::kGpuHeaderWords, steps.data(), steps.size() * sizeof(GpuStep));
    all.insert(all.end(), tables.begin(), tables.end());
    return all;
  }

  void check() {
    const auto all = words();
    const GpuPlan plan(all.data(), static_cast<int64_t>(all.size()));
  }
};

// Stem, a unit of each stride, the latter tapped, and a head.
Packer network(DType dtype) {
  Packer p(3, dtype);
  p.stem(5);
  p.unit(2, 0, 1, Packer::range(0, 5), Packer::range(0, 8), 12, 4);
  GpuStep& tapped = p.unit(1, 1, 1, Packer::range(4, 8), Packer::range(8, 12), 12, 4);
  p.result(tapped, {-1, 0, -2, 1, -3, 2, -4, 3});
  p.head(1, {0, 8, 1, 9, 2, 10, 3, 11}, 20, 7);
  return p;
}

// One unit of stride 1, from the caller's map to the caller's.
Packer single_unit() {
  Packer p(8, DType::kFloat32);
  GpuStep& step = p.unit(1, snv2::kCallersMap, snv2::kNoBuffer, Packer::range(4, 8), {}, 0, 4);
  p.result(step, {-1, 0, -2, 1, -3, 2, -4, 3});
  return p;
}

// A copy, a unit in place, one that goes over to the other buffer.
Packer stage() {
  Packer p(4, DType::kFloat16);
  GpuStep& copy = p.add(GpuStepKind::kCopy, snv2::kCallersMap, 0, 6);
  copy.in_channels = copy.out_channels = 4;
  copy.in_table = p.table(Packer::range(0, 4));
  copy.out_table = p.table(Packer::range(0, 4));
  p.unit(1, 0, 0, {2, 3}, {4, 5}, 6, 2);
  GpuStep& last = p.unit(2, 0, snv2::kNoBuffer, {0, 1, 4, 5}, {}, 0, 3);
  p.result(last, {0, 3, 1, 4, 2, 5});
  return p;
}

TEST(plans_that_are_right) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    auto words = network(dtype).words();
    const GpuPlan plan(words.data(), static_cast<int64_t>(words.size()));
    CHECK(plan.end() - plan.begin() == 4);
    CHECK(plan.dtype() == dtype);
    CHECK(plan.header().halvings == 3 && plan.header().result_count == 2);
    CHECK(plan.table_count() == static_cast<int64_t>(network(dtype).tables.size()));
    const GpuStep& unit = plan.begin()[2];
    CHECK(plan.table(unit.result_table)[2] == -2);
  }
  single_unit().check();
  stage().check();
}

TEST(words_that_are_cut_short) {
  CHECK_THROWS(GpuPlan(nullptr, 0));
  for (Packer p : {network(DType::kFloat32), single_unit(), stage()}) {
    const auto words = p.words();
    for (int64_t size = 0; size < static_cast<int64_t>(words.size()); ++size) {
      CHECK_THROWS(GpuPlan(words.data(), size));
    }
  }
}

// Under a sanitizer, that no word makes the checks themselves read or allocate beyond measure.
TEST(any_word_may_be_anything) {
  int accepted = 0, all = 0;
  for (Packer p : {network(DType::kFloat16), single_unit(), stage()}) {
    const auto words = p.words();
    for (size_t i = 0; i < words.size(); ++i) {
      for (const int64_t value :
           {int64_t{-1}, int64_t{-2}, int64_t{1} << 24, int64_t{1} << 40,
            std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::min()}) {
        auto broken = words;
        broken[i] = value;
        ++all;
        try {
          const GpuPlan plan(broken.data(), static_cast<int64_t>(broken.size()));
          ++accepted;
        } catch (const std::invalid_argument&) {
        }
      }
    }
  }
  CHECK(accepted < all / 3, "%d of %d", accepted, all);
}

// Refused with the name of what is wrong.
void refused(Packer p, const char* what) {
  std::string message;
  try {
    p.check();
  } catch (const std::invalid_argument& error) {
    message = error.what();
  }
  CHECK(message.find(what) != std::string::npos, "'%s' instead of '%s'", message.c_str(), what);
}

TEST(places_of_maps) {
  Packer p = network(DType::kFloat32);
  p.steps[1].out_buffer = 0;
  refused(p, "step 1: out_buffer");  // its CTAs read what others have overwritten
  p = network(DType::kFloat32);
  p.steps[2].out_buffer = 0;
  refused(p, "step 2: out_buffer");
  p = network(DType::kFloat32);
  p.steps[2].in_buffer = 0;
  refused(p, "step 2: in_buffer");
  p = network(DType::kFloat32);
  p.steps[2].in_buffer = snv2::kCallersMap;
  refused(p, "step 2: in_buffer");
  p = network(DType::kFloat32);
  p.steps[2].out_buffer = snv2::kNoBuffer;
  refused(p, "step 2: out_buffer");
  p = network(DType::kFloat32);
  p.steps[0].in_buffer = 0;
  refused(p, "step 0: in_buffer");
  p = network(DType::kFloat32);
  p.steps[3].out_buffer = 1;
  refused(p, "step 3: out_buffer");
  p = stage();
  p.steps[1].out_planes = 5;
  refused(p, "step 1: out_planes");
  p = network(DType::kFloat32);
  p.steps[1].out_planes = 1 << 20;
  refused(p, "step 1: out_planes");
  p = single_unit();
  p.steps[0].out_buffer = 0;
  refused(p, "step 0: out_buffer");
}

TEST(planes) {
  Packer p = network(DType::kFloat32);
  int64_t* const written = &p.tables[p.steps[2].out_table];
  const int64_t fresh = written[0];
  for (const int64_t wrong : {int64_t{12}, int64_t{-1}, fresh + 1, int64_t{4}, int64_t{0}}) {
    written[0] = wrong;  // outside, twice, or a plane that the step reads or copies
    refused(p, "step 2: out_table");
  }
  p = network(DType::kFloat32);
  p.tables[p.steps[2].in_table] = 8;  // nobody wrote it
  refused(p, "step 2: in_table");
  p = network(DType::kFloat32);
  p.tables[p.steps[1].in_table] = 5;
  refused(p, "step 1: in_table");
  p = network(DType::kFloat32);
  p.tables[p.steps[3].in_table] = 12;
  refused(p, "step 3: in_table");
  p = stage();
  p.tables[p.steps[0].in_table] = 4;
  refused(p, "step 0: in_table");
}

TEST(results) {
  Packer p = network(DType::kFloat32);
  p.steps[2].result = 1;
  refused(p, "step 2: result");  // the last step's
  p = network(DType::kFloat32);
  p.steps[2].result = snv2::kNoResult;
  refused(p, "a result that no step writes");
  p = network(DType::kFloat32);
  p.steps[3].result = snv2::kNoResult;
  refused(p, "step 3: result");
  p = network(DType::kFloat32);
  p.steps[1].result = 0;
  p.steps[1].result_channels = 1;
  refused(p, "step 2: result");  // twice
  p = network(DType::kFloat32);
  p.steps[0].result = 0;
  refused(p, "step 0: result");  // a stem writes planes only
  for (const int64_t row : {int64_t{4}, int64_t{-9}, int64_t{-13}}) {
    p = network(DType::kFloat32);
    p.tables[p.steps[2].result_table] = row;
    refused(p, "step 2: result_table");
  }
  p = stage();
  p.tables[p.steps[2].result_table] = -1;  // the passthrough would be of another extent
  refused(p, "step 2: result_table");
  p = single_unit();
  p.tables[p.steps[0].result_table] = -9;
  refused(p, "step 0: result_table");
}

TEST(arrays) {
  for (int64_t GpuStep::* const field :
       {&GpuStep::pw1_weights, &GpuStep::pw2_weights, &GpuStep::proj_weights}) {
    Packer p = network(DType::kFloat16);
    p.steps[1].*field = p.header.weight_count;
    refused(p, "_weights");
    p = network(DType::kFloat16);
    p.steps[1].*field += 8;  // not at a tile
    refused(p, "_weights");
  }
  for (int64_t GpuStep::* const field : {&GpuStep::pw1_bias, &GpuStep::pw2_bias, &GpuStep::dw,
                                         &GpuStep::proj_bias, &GpuStep::proj_dw}) {
    Packer p = network(DType::kFloat16);
    p.steps[1].*field = p.header.parameter_count;
    refused(p, "step 1");
    p = network(DType::kFloat16);
    p.steps[1].*field += 1;  // not at 16 bytes
    refused(p, "step 1");
  }
}

// All but the copy, which has none, may have any of these.
TEST(activations) {
  constexpr Activation kOfLayers[] = {Activation::kRelu, Activation::kIdentity, Activation::kRelu6,
                                      Activation::kSilu, Activation::kHardswish};
  constexpr Activation kNone[] = {Activation::kLeakyRelu, Activation::kSigmoid,
                                  Activation::kHardsigmoid, static_cast<Activation>(9),
                                  static_cast<Activation>(-1)};
  const struct {
    size_t step;
    GpuActivation GpuStep::* field;
    const char* name;
  } layers[] = {{0, &GpuStep::pw1_activation, "step 0: pw1_activation"},
                {1, &GpuStep::pw1_activation, "step 1: pw1_activation"},
                {1, &GpuStep::dw_activation, "step 1: dw_activation"},
                {1, &GpuStep::pw2_activation, "step 1: pw2_activation"},
                {1, &GpuStep::proj_dw_activation, "step 1: proj_dw_activation"},
                {1, &GpuStep::proj_activation, "step 1: proj_activation"},
                {3, &GpuStep::pw1_activation, "step 3: pw1_activation"}};
  for (const auto& layer : layers) {
    Packer p = network(DType::kFloat32);
    GpuActivation& act = p.steps[layer.step].*layer.field;
    for (const Activation kind : kOfLayers) {
      act = {kind};
      p.check();
      act = {kind, 16};  // slopes of what has none
      refused(p, layer.name);
    }
    for (const Activation kind : kNone) {
      act = {kind};
      refused(p, layer.name);
    }
    for (const int64_t slopes : {int64_t{-4}, int64_t{1}, p.header.parameter_count}) {
      act = {Activation::kPrelu, slopes};
      refused(p, layer.name);
    }
  }
  // Of layers that a step lacks.
  Packer p = network(DType::kFloat32);
  p.steps[2].proj_activation = {Activation::kRelu};
  refused(p, "step 2: proj_activation");
  p = network(DType::kFloat32);
  p.steps[3].pw2_activation = {Activation::kRelu};
  refused(p, "step 3: pw2_activation");
  p = stage();
  p.steps[0].pw1_activation = {Activation::kPrelu};
  refused(p, "step 0: pw1_activation");
}

TEST(windows) {
  for (const GpuWindow window : {GpuWindow{1, 1}, GpuWindow{4, 1}, GpuWindow{-3, 1},
                                 GpuWindow{257, 1}, GpuWindow{3, 0}, GpuWindow{3, 256}}) {
    Packer p = network(DType::kFloat32);
    p.steps[2].dw_window = window;
    refused(p, "step 2: dw_window");
    p = network(DType::kFloat32);
    p.steps[1].proj_dw_window = window;
    refused(p, "step 1: proj_dw_window");
  }
  Packer p = single_unit();
  p.steps[0].dw_window = {7, 1};  // more floats than there are
  refused(p, "step 0: dw");
  p = network(DType::kFloat32);
  p.steps[2].proj_dw_window = {3, 1};
  refused(p, "step 2: proj_dw_window");
  p = network(DType::kFloat32);
  p.steps[0].dw_window = {3, 1};
  refused(p, "step 0: dw_window");
}

TEST(headers) {
  for (int64_t GpuPlanHeader::* const field :
       {&GpuPlanHeader::magic, &GpuPlanHeader::out_channels, &GpuPlanHeader::halvings,
        &GpuPlanHeader::classify}) {
    Packer p = network(DType::kFloat32);
    p.header.*field += 1;
    refused(p, "plan: ");
  }
  for (int64_t GpuPlanHeader::* const field :
       {&GpuPlanHeader::in_channels, &GpuPlanHeader::result_count, &GpuPlanHeader::weight_count,
        &GpuPlanHeader::parameter_count, &GpuPlanHeader::dtype}) {
    for (const int64_t value : {int64_t{-1}, int64_t{1} << 41}) {
      Packer p = network(DType::kFloat32);
      p.header.*field = value;
      refused(p, "plan: the header is damaged");
    }
  }
}

TEST(kinds) {
  Packer p = network(DType::kFloat32);
  p.steps[0].kind = GpuStepKind::kHead;
  refused(p, "step 0: head");
  p = network(DType::kFloat32);
  p.steps[1].kind = GpuStepKind::kStem;
  refused(p, "step 1: stem");
  p = network(DType::kFloat32);
  p.steps[1].stride = 3;
  refused(p, "step 1");
  p = network(DType::kFloat32);
  p.steps[2].proj_channels = 4;
  refused(p, "step 2: proj_channels");
  p = network(DType::kFloat32);
  p.steps[1].proj_channels = 0;
  refused(p, "step 1: proj_channels");
  p = network(DType::kFloat32);
  p.steps[1].kind = static_cast<GpuStepKind>(4);
  refused(p, "step 1");
}

}  // namespace

int main() { return run_all_tests(); }
