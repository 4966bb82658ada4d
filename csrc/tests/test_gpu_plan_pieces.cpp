// Plans of units in pieces with one thing wrong.
#include "gpu_plan_packing.h"

namespace snv2 {
namespace {

TEST(places_of_pieces) {
  Packer p = pieces();
  p.steps[1].in_buffer = 1;
  refused(p, "step 1: in_buffer");  // nothing is there
  for (const int64_t buffer : {int64_t{1}, kNoBuffer}) {
    p = pieces();
    p.steps[2].out_buffer = buffer;  // a gate stays where it is
    refused(p, buffer == 1 ? "step 2: gate" : "step 2: out_buffer");
    p = pieces();
    p.steps[7].out_buffer = buffer == 1 ? 0 : buffer;
    refused(p, "step 7: out_buffer");
  }
  p = pieces();
  p.steps[4].out_buffer = 0;
  refused(p, "step 4: out_buffer");
  p = pieces();
  p.steps[5].out_buffer = 0;
  refused(p, "step 5: out_buffer");
  p = pieces();
  p.steps[6].out_planes = 6;  // less than the projection's buffer had
  refused(p, "step 6: out_planes");
  p = pieces();
  p.tables[p.steps[7].in_table] = 6;  // nobody wrote it
  refused(p, "step 7: in_table");
  p = pieces();
  p.tables[p.steps[9].in_table] = 4;  // what lay there was of a larger extent
  refused(p, "step 9: in_table");
  p = pieces();
  p.steps[9].in_buffer = 1;
  p.header.halvings = 1;
  p.check();  // the map before is still there
  p.header.halvings = 2;
  refused(p, "header does not match");
  p = pieces();
  p.tables[p.steps[3].out_table] = 5;  // which it reads
  refused(p, "step 3: out_table");
}

TEST(parts_of_units) {
  for (const int64_t parts : {int64_t{0}, kExpand, kExpand | kProject, int64_t{8}, int64_t{15}}) {
    Packer p = pieces();
    p.steps[6].parts = parts;
    refused(p, "step 6: parts");
  }
  Packer p = pieces();
  p.steps[3].stride = 2;  // nothing would halve the map
  refused(p, "step 3");
  p = pieces();
  p.steps[3].dw_window = {3, 1};
  refused(p, "step 3: dw_window");
  p = pieces();
  p.steps[3].dw_activation = {Activation::kRelu};
  refused(p, "step 3: dw_activation");
  p = pieces();
  p.steps[1].pw2_activation = {Activation::kRelu};
  refused(p, "step 1: pw2_activation");
  p = pieces();
  p.steps[3].pw1_activation = {Activation::kRelu};
  refused(p, "step 3: pw1_activation");
  p = pieces();
  p.steps[5].mid_channels = 3;
  refused(p, "step 5: mid_channels");
  p = pieces();
  p.steps[7].out_channels = 1;
  refused(p, "step 7: out_channels");
  p = pieces();
  p.steps[6].pw2_weights = p.header.weight_count;
  refused(p, "step 6: pw2_weights");
  p = pieces();
  p.steps[3].proj_channels = 1;
  refused(p, "step 3: proj_channels");
  p = pieces();
  p.steps[1].proj_channels = 1;
  refused(p, "step 1: proj_channels");
  // The caller's maps are for whole branches.
  for (const int64_t parts : {kExpand | kDepthwise, kDepthwise | kProject, kDepthwise, kProject}) {
    p = single_unit();
    p.steps[0].parts = parts;
    refused(p, "step 0: parts");
  }
  p = pieces();
  p.steps[3].result = 0;
  refused(p, "step 3: parts");
  p = network(DType::kFloat32);
  p.steps[0].parts = kProject;
  refused(p, "step 0: parts");
  // A unit of stride 2 needs no projection.
  p = Packer(4, DType::kFloat32);
  GpuStep& step =
      p.piece(kWholeBranch, 2, kCallersMap, kNoBuffer, Packer::range(0, 4), Packer::range(0, 3), 0);
  p.result(step, {0, 1, 2});
  p.header.halvings = 1;
  p.check();
}

TEST(gates) {
  Packer p = pieces();
  p.tables[p.steps[2].in_table] = 5;  // twice
  refused(p, "step 2: out_table");
  p = pieces();
  p.steps[2].out_table = p.table({4, 6, 5});
  refused(p, "step 2: out_table");
  p = pieces();
  p.steps[2].out_channels = 2;
  refused(p, "step 2: gate");
  p = pieces();
  p.steps[2].pw1_weights = p.header.weight_count;
  refused(p, "step 2: pw1_weights");
  p = pieces();
  p.steps[2].pw2_bias = p.header.parameter_count;
  refused(p, "step 2: pw2_bias");
  p = pieces();
  p.steps[2].dw_window = {3, 1};
  refused(p, "step 2: dw_window");
  p = pieces();
  p.steps[2].mid_channels = 0;
  refused(p, "step 2: mid_channels");
  for (GpuActivation GpuStep::* const field :
       {&GpuStep::pw1_activation, &GpuStep::pw2_activation}) {
    for (const Activation kind : {Activation::kRelu, Activation::kIdentity, Activation::kHardswish,
                                  Activation::kSigmoid, Activation::kHardsigmoid}) {
      p = pieces();
      p.steps[2].*field = {kind};
      p.check();
    }
    p = pieces();
    p.steps[2].*field = {Activation::kLeakyRelu};
    refused(p, "step 2: pw");
  }
  p = pieces();
  p.steps[2].result = 0;
  refused(p, "step 2: result");
}

TEST(shortcuts) {
  // The gate adds planes of the copy.
  const auto shortcut = [](const std::vector<int64_t>& added) {
    Packer p = pieces();
    p.steps[2].in_channels += static_cast<int64_t>(added.size());
    std::vector<int64_t> read{4, 5, 6};
    read.insert(read.end(), added.begin(), added.end());
    p.steps[2].in_table = p.table(read);
    return p;
  };
  const auto without_layers = [](Packer p) {
    GpuStep& gate = p.steps[2];
    gate.mid_channels = gate.pw1_weights = gate.pw2_weights = gate.pw1_bias = gate.pw2_bias = 0;
    gate.pw1_activation = gate.pw2_activation = {};
    return p;
  };
  shortcut({3, 0, 1}).check();
  refused(shortcut({3, 0}), "step 2: gate");
  refused(shortcut({3, 0, 1, 2}), "step 2: gate");
  refused(shortcut({3, 0, 5}), "step 2: out_table");  // which it writes
  refused(shortcut({3, 0, 7}), "step 2: in_table");
  Packer p = shortcut({3, 0, 7});
  for (GpuStep& step : p.steps) step.out_planes += step.out_planes == 7;
  refused(p, "step 2: in_table");  // nobody wrote it
  p = shortcut({3, 0, 1});
  p.tables[p.steps[2].in_table] = 3;
  refused(p, "step 2: out_table");  // the first ones are not those that it writes

  p = without_layers(shortcut({3, 0, 1}));
  p.check();
  p.steps[2].mid_channels = -1;
  refused(p, "step 2: mid_channels");
  for (GpuActivation GpuStep::* const field :
       {&GpuStep::pw1_activation, &GpuStep::pw2_activation}) {
    p = without_layers(shortcut({3, 0, 1}));
    p.steps[2].*field = {Activation::kRelu};
    refused(p, "step 2: pw");
  }
  for (Packer q : {pieces(), shortcut({3, 0, 1}), without_layers(shortcut({3, 0, 1})),
                   without_layers(pieces())}) {
    q.steps[2].dw_activation = {Activation::kHardswish};
    q.check();
    q.steps[2].dw_activation = q.prelu(3);
    q.check();
    q.steps[2].dw_activation.slopes = q.header.parameter_count;
    refused(q, "step 2: dw_activation");
    for (const Activation kind :
         {Activation::kSigmoid, Activation::kHardsigmoid, Activation::kLeakyRelu}) {
      q.steps[2].dw_activation = {kind};
      refused(q, "step 2: dw_activation");
    }
  }
  refused(without_layers(pieces()), "step 2: mid_channels");  // nothing would happen
}

TEST(exports) {
  Packer p = pieces();
  p.steps[4].result = kNoResult;
  refused(p, "step 4: result");
  p = pieces();
  p.steps[4].result_channels = 3;
  refused(p, "step 4: result_channels");
  p = pieces();
  p.steps[4].out_channels = 3;
  refused(p, "step 4: export");
  p = pieces();
  p.steps[4].result = 1;
  refused(p, "step 4: result");
  p = Packer(4, DType::kFloat32);
  p.exported(kCallersMap, {0, 1, 2, 3});
  refused(p, "step 0: export");
}

}  // namespace
}  // namespace snv2
