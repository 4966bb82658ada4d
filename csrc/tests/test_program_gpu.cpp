// Programs with plans for GPUs, on the emulator.
#include "program_testing.h"
#include "snv2/gpu_network.h"

namespace {

using namespace snv2::emulated;
using snv2::Program;

constexpr DType kDtype = DType::kFloat32;

std::string file() {
  std::vector<Section> sections = small_sections();
  for (const Section& section : gpu_sections(kDtype)) sections.push_back(section);
  return file_of(sections);
}

// Scores by the plan and its arrays.
std::vector<float> by_the_plan(const Program& program, const Image& x) {
  const snv2::GpuProgram& part = *program.gpu(kDtype);
  const int64_t* const tables = part.plan.table(0);
  const std::vector<int32_t> narrow(tables, tables + part.plan.table_count());
  const Device device = current_device();
  const int64_t bytes = workspace_bytes(part.plan, x.map.batch, x.map.height, x.map.width, device);
  const InMemory workspace(std::string(static_cast<size_t>(bytes + 256), '\0'));
  void* aligned = workspace.data.get();
  size_t space = workspace.size;
  std::align(256, static_cast<size_t>(bytes), aligned, space);
  std::vector<float> scores(static_cast<size_t>(5 * x.map.batch), kNan);
  const FeatureMap result{scores.data(), kDtype, Layout::kContiguous, x.map.batch, 5, 1, 1};
  run_network(part.plan, {part.weights, part.parameters, narrow.data()}, x, &result, 1, aligned,
              bytes, device, nullptr);
  return scores;
}

TEST(runs_as_the_plan_does) {
  const InMemory memory(file());
  const auto program = Program::view(memory.data.get(), memory.size);
  GpuNetwork network(program, kDtype);
  for (const int64_t batch : {1, 3, 2}) {
    Map x(batch, 3, 19, 13 + 2 * batch, batch == 3 ? Layout::kChannelsLast : Layout::kContiguous);
    x.randomize();
    std::vector<float> scores(static_cast<size_t>(5 * batch), kNan);
    const FeatureMap result{scores.data(), kDtype, Layout::kContiguous, batch, 5, 1, 1};
    network.run(x.map, &result, 1, nullptr);
    CHECK(scores == by_the_plan(*program, {x.map, false, {}, {}}));
  }
}

TEST(takes_bytes) {
  const InMemory memory(file());
  const auto program = Program::view(memory.data.get(), memory.size);
  GpuNetwork network(program, kDtype);
  std::vector<uint8_t> bytes(2 * 9 * 16 * 3);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
  std::vector<float> scores(10, kNan);
  const FeatureMap result{scores.data(), kDtype, Layout::kContiguous, 2, 5, 1, 1};
  network.run(snv2::Images{bytes.data(), 2, 9, 16}, &result, 1, nullptr);
  Image image{{bytes.data(), kDtype, Layout::kContiguous, 2, 3, 9, 16}, true, {}, {}};
  for (size_t c = 0; c < 3; ++c) {
    image.scale[c] = static_cast<float>(1 / (255 * program->std()[c]));
    image.shift[c] = static_cast<float>(-program->mean()[c] / program->std()[c]);
  }
  CHECK(scores == by_the_plan(*program, image));
}

TEST(a_dtype_that_it_has_no_plan_for) {
  const InMemory memory(file());
  const auto program = Program::view(memory.data.get(), memory.size);
  CHECK_THROWS(GpuNetwork(program, DType::kFloat16));
}

}  // namespace

int main() { return run_all_tests(); }
