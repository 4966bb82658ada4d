// Plans for GPUs that are right, and the same plans with one thing wrong.
#include <limits>

#include "gpu_plan_packing.h"

namespace snv2 {
namespace {

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
  pieces().check();
}

TEST(words_that_are_cut_short) {
  CHECK_THROWS(GpuPlan(nullptr, 0));
  for (Packer p : {network(DType::kFloat32), single_unit(), stage(), pieces()}) {
    const auto words = p.words();
    for (int64_t size = 0; size < static_cast<int64_t>(words.size()); ++size) {
      CHECK_THROWS(GpuPlan(words.data(), size));
    }
  }
}

// Under a sanitizer, that no word makes the checks themselves read or allocate beyond measure.
TEST(any_word_may_be_anything) {
  int accepted = 0, all = 0;
  for (Packer p : {network(DType::kFloat16), single_unit(), stage(), pieces()}) {
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

TEST(places_of_maps) {
  Packer p = network(DType::kFloat32);
  p.steps[1].out_buffer = 0;
  refused(p, "step 1: out_buffer");  // its CTAs read what others have overwritten
  p = network(DType::kFloat32);
  p.steps[2].out_buffer = 0;
  refused(p, "step 2: out_buffer");
  p = network(DType::kFloat32);
  p.steps[2].in_buffer = 0;
  refused(p, "step 2: out_buffer");
  p = network(DType::kFloat32);
  p.steps[2].in_buffer = kCallersMap;
  refused(p, "step 2: in_buffer");
  p = network(DType::kFloat32);
  p.steps[2].out_buffer = kNoBuffer;
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
  p.steps[2].result = kNoResult;
  p.steps[2].result_channels = p.steps[2].result_table = 0;
  refused(p, "a result that no step writes");
  p = network(DType::kFloat32);
  p.steps[3].result = kNoResult;
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

// Else a kernel might form a pointer from it, or load what it points at.
TEST(words_that_a_step_has_no_use_for) {
  const auto with = [](Packer p, size_t step, int64_t GpuStep::* field, const char* name) {
    p.steps[step].*field = int64_t{1} << 24;
    refused(p, name);
  };
  with(single_unit(), 0, &GpuStep::out_table, "step 0: out_table");
  with(stage(), 1, &GpuStep::result_table, "step 1: result_table");
  with(stage(), 0, &GpuStep::pw1_weights, "step 0: pw1_weights");
  with(stage(), 0, &GpuStep::mid_channels, "step 0: mid_channels");
  with(stage(), 0, &GpuStep::stride, "step 0: stride");
  with(network(DType::kFloat32), 0, &GpuStep::pw2_bias, "step 0: pw2_bias");
  with(network(DType::kFloat32), 2, &GpuStep::proj_bias, "step 2: proj_bias");
  with(network(DType::kFloat32), 2, &GpuStep::proj_dw, "step 2: proj_dw");
  with(network(DType::kFloat32), 3, &GpuStep::result_table, "step 3: result_table");
  with(network(DType::kFloat32), 3, &GpuStep::out_table, "step 3: out_table");
  with(pieces(), 1, &GpuStep::pw2_weights, "step 1: pw2_weights");
  with(pieces(), 3, &GpuStep::pw1_bias, "step 3: pw1_bias");
  with(pieces(), 3, &GpuStep::dw, "step 3: dw");
  with(pieces(), 4, &GpuStep::out_table, "step 4: out_table");
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
  refused(p, "step 1: proj_dw_activation");
  p = network(DType::kFloat32);
  p.steps[1].kind = static_cast<GpuStepKind>(7);
  refused(p, "step 1: unknown kind");
  p.steps[1].kind = GpuStepKind::kPool;
  refused(p, "step 1: parts");
  p.steps[1].parts = kPool;
  refused(p, "step 1: pool");
}

}  // namespace
}  // namespace snv2

int main() { return run_all_tests(); }
