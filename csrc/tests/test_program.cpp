// Programs: read, run from C++ and C, and refused.
#include <algorithm>
#include <cstdio>
#include <iterator>
#include <thread>

#include "program_testing.h"
#include "snv2.h"
#include "snv2/network.h"

extern "C" int run_from_c(const void* data, size_t size, const float* x, float* scores);

namespace {

using snv2::Network;
using snv2::Program;

constexpr int64_t kClasses = 5;

// The reader's complaint about a file, empty if it has none.
std::string complaint(const std::string& file) {
  const InMemory memory(file);
  try {
    Program::view(memory.data.get(), memory.size);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Scores by the plan itself.
std::vector<float> by_the_plan(const snv2::CpuProgram& part, const FeatureMap& x) {
  std::vector<float> scores(static_cast<size_t>(x.batch * kClasses), kNan);
  const int64_t bytes = snv2::cpu::workspace_bytes(part.plan, x.batch, x.height, x.width, 1);
  std::vector<float> workspace(static_cast<size_t>(bytes / 4 + 16));
  void* aligned = workspace.data();
  size_t space = workspace.size() * 4;
  std::align(64, static_cast<size_t>(bytes), aligned, space);
  snv2::cpu::run_network(part.plan, part.weights, x,
                         {scores.data(), x.dtype, Layout::kContiguous, x.batch, kClasses, 1, 1},
                         aligned, bytes, {});
  return scores;
}

TEST(crc32_is_zlibs) {
  CHECK(snv2::crc32("123456789", 9) == 0xcbf43926u);
  CHECK(snv2::crc32("", 0) == 0);
}

TEST(what_a_file_says) {
  const std::string path = "test_program.snv2";
  write_file(path, file_of(small_sections()));
  const auto program = Program::load(path);
  std::remove(path.c_str());
  CHECK(program->about() == "{\"model\": \"small\"}");
  CHECK(program->library() == std::string("0.1.0"));
  const int64_t shape[] = {1, 3, 19, 23};
  CHECK(std::equal(shape, shape + 4, program->input().shape));
  CHECK((program->classes() == std::vector<std::string>{"cat", "dog", "b\xc3\xa4r", "", "fifth"}));
  CHECK(program->mean().size() == 3 && program->std()[2] == 0.225);
  CHECK(program->classifies() && program->results().size() == 1);
  CHECK(program->results()[0].channels == kClasses);
  CHECK(program->gpu(DType::kFloat16) == nullptr);
}

// Batches and sizes in turn, so that memory grows and is used again.
TEST(runs_as_the_plan_does) {
  const InMemory memory(file_of(small_sections()));
  const auto program = Program::view(memory.data.get(), memory.size);
  Network one(program, 1), three(program, 3), callers(program);
  callers.set_threads(late_threads(2));
  CHECK(one.threads() == 1 && three.threads() == 3 && callers.threads() == 2);
  struct {
    int64_t n, h, w;
    Layout layout;
  } const cases[] = {{1, 19, 23, Layout::kContiguous}, {4, 64, 50, Layout::kChannelsLast},
                     {2, 1, 1, Layout::kContiguous},   {1, 64, 50, Layout::kContiguous},
                     {0, 9, 9, Layout::kContiguous},   {3, 19, 23, Layout::kChannelsLast}};
  for (const auto& c : cases) {
    Map x(c.n, 3, c.h, c.w, c.layout);
    x.randomize();
    const std::vector<float> expected = by_the_plan(program->cpu(DType::kFloat32), x.map);
    for (Network* const network : {&one, &three, &callers}) {
      std::vector<float> scores(expected.size() + 1, kNan);
      network->run(x.map, scores.data());
      CHECK(std::equal(expected.begin(), expected.end(), scores.begin()), "%d x %d x %d", int(c.n),
            int(c.h), int(c.w));
    }
  }
}

TEST(bytes_become_normalized_floats) {
  const InMemory memory(file_of(small_sections()));
  Network network = Network::view(memory.data.get(), memory.size, 2);
  Map x(2, 3, 16, 24, Layout::kContiguous);
  std::vector<uint8_t> bytes;
  const double mean[] = {0.485, 0.456, 0.406}, std[] = {0.229, 0.224, 0.225};
  for (int64_t n = 0; n < 2; ++n)
    for (int64_t p = 0; p < 16 * 24; ++p)
      for (int64_t c = 0; c < 3; ++c) {
        bytes.push_back(static_cast<uint8_t>(generator() % 256));
        x.at(n, c, p / 24, p % 24) = static_cast<float>((bytes.back() / 255.0 - mean[c]) / std[c]);
      }
  std::vector<float> expected(10), scores(10, kNan);
  network.run(x.map, expected.data());
  network.run(snv2::Images{bytes.data(), 2, 16, 24}, scores.data());
  for (size_t i = 0; i < 10; ++i) CHECK(close(scores[i], expected[i], 10));
}

TEST(bfloat16_runs_in_float32_where_it_must) {
  const InMemory memory(file_of(small_sections()));
  const auto program = Program::view(memory.data.get(), memory.size);
  on_each_isa([&](const char* isa) {
    const bool narrow = snv2::cpu::has_bfloat16();
    CHECK((program->cpu(DType::kBFloat16).plan.element() == DType::kBFloat16) == narrow, "%s", isa);
    CHECK(program->cpu(DType::kFloat16).plan.element() == DType::kFloat32);
    std::vector<uint16_t> x(3 * 9 * 9, 0x3f80), scores(kClasses, 0x7fc0);
    Network network(program, 1);
    network.run({x.data(), DType::kBFloat16, Layout::kContiguous, 1, 3, 9, 9},
                {scores.data(), DType::kBFloat16, Layout::kContiguous, 1, kClasses, 1, 1});
    for (const uint16_t score : scores) CHECK((score & 0x7fff) < 0x7f80, "%s", isa);
  });
}

TEST(each_damage_has_its_message) {
  const std::string whole = file_of(small_sections());
  CHECK(complaint(whole).empty(), "%s", complaint(whole).c_str());
  const auto with = [&](size_t offset, auto value) {
    std::string file = whole;
    put(file, offset, value);
    seal(file);
    return complaint(file);
  };
  CHECK(complaint("") == "program: not a program of snv2_kernels");
  CHECK(complaint(std::string(500, 'x')) == "program: not a program of snv2_kernels");
  CHECK(contains(complaint(whole.substr(0, 40)), "truncated"));
  const std::string cut = complaint(whole.substr(0, whole.size() - 1));
  CHECK(cut == "program: truncated: " + std::to_string(whole.size() - 1) + " bytes of " +
                   std::to_string(whole.size()),
        "%s", cut.c_str());
  CHECK(contains(complaint(whole + "x"), "1 bytes behind its end"));
  CHECK(with(12, uint32_t{7}) == "program: of format 7; this library reads format 1: update it");
  CHECK(contains(with(8, uint32_t{0x04030201}), "of the other byte order"));
  std::string flipped = whole;
  flipped[whole.size() - 1] ^= 1;
  CHECK(contains(complaint(flipped), "checksum of the section of kind 17"));
  flipped = whole;
  flipped[16 + 16] ^= 1;
  CHECK(contains(complaint(flipped), "checksum of its header"));
  const size_t plan = section_at(whole, 4).offset;
  const std::string format = with(plan, snv2::kPlanMagic + 3);
  CHECK(contains(format, "plans for the CPU have format") && contains(format, "export it again"),
        "%s", format.c_str());
  CHECK(with(plan, int64_t{5}) == "plan: not a plan of this version");
}

TEST(sections_that_do_not_fit) {
  const std::vector<Section> all = small_sections();
  const auto without = [&](size_t index) {
    std::vector<Section> left = all;
    left.erase(left.begin() + static_cast<std::ptrdiff_t>(index));
    return complaint(file_of(left));
  };
  const auto instead = [&](size_t index, const std::string& bytes) {
    std::vector<Section> changed = all;
    changed[index].bytes = bytes;
    return complaint(file_of(changed));
  };
  CHECK(contains(without(1), "no section of its input"));
  CHECK(contains(without(4), "weights without a plan"));
  CHECK(contains(without(6), "a plan without weights"));
  CHECK(contains(instead(0, "\xff"), "about itself is no text"));
  CHECK(contains(instead(3, "a\nb"), "not as many as its classes"));
  CHECK(contains(instead(1, bytes_of(std::vector<int64_t>{1, 4, 9, 9, 0, 0})), "shape of its"));
  CHECK(contains(instead(1, bytes_of(std::vector<int64_t>{1, 3, 19, 23, 7, 7})), "last map"));
  CHECK(contains(instead(2, bytes_of(std::vector<double>{0, 0, 0, 1, 0, 1})), "std > 0"));
  CHECK(contains(instead(2, bytes_of(std::vector<double>{0, 0, 0, 1, 1e-310, 1})), "std > 0"));
  // A network that is right for maps of one size alone.
  const InMemory fixed(file_of([&] {
    std::vector<Section> changed = all;
    changed[1].bytes = bytes_of(std::vector<int64_t>{1, 3, 19, 23, 3, 3});
    return changed;
  }()));
  Network network = Network::view(fixed.data.get(), fixed.size, 1);
  Map x(1, 3, 33, 19, Layout::kContiguous);
  float scores[kClasses];
  CHECK_THROWS(network.run(x.map, scores));
}

TEST(arguments_are_named) {
  const InMemory memory(file_of(small_sections()));
  Network network = Network::view(memory.data.get(), memory.size, 1);
  const auto wrong = [](const auto& call) {
    try {
      call();
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  Map x(1, 4, 9, 9, Layout::kContiguous), right(1, 3, 9, 9, Layout::kContiguous);
  float scores[kClasses];
  CHECK(wrong([&] { network.run(x.map, scores); }) ==
        "x: expected [N, 3, H, W] of at least one pixel, got [1, 4, 9, 9]");
  const FeatureMap short_one{scores, DType::kFloat32, Layout::kContiguous, 1, 4, 1, 1};
  CHECK(wrong([&] { network.run(right.map, short_one); }) ==
        "results[0]: expected [1, 5, 1, 1], got [1, 4, 1, 1]");
  const FeatureMap half{scores, DType::kFloat16, Layout::kContiguous, 1, 5, 1, 1};
  CHECK(contains(wrong([&] { network.run(right.map, half); }), "expected x's dtype"));
  CHECK(contains(wrong([&] { network.run(right.map, nullptr, 0); }), "results: expected 1, got 0"));
  CHECK(contains(wrong([&] { network.run(right.map, static_cast<float*>(nullptr)); }), "null"));
  CHECK(contains(wrong([&] { network.set_threads(-1); }), "threads: expected 0 to"));
  CHECK_THROWS(Network::load("no such file.snv2"));
  CHECK_THROWS(Network::load("."));
  CHECK_THROWS(Network::load("/dev/zero"));
}

TEST(from_c) {
  const InMemory memory(file_of(small_sections()));
  Map x(1, 3, 19, 23, Layout::kContiguous);
  x.randomize();
  float expected[kClasses], scores[kClasses] = {};
  Network network = Network::view(memory.data.get(), memory.size, 1);
  network.run(x.map, expected);
  CHECK(run_from_c(memory.data.get(), memory.size, x.values.data(), scores) == 0);
  CHECK(std::memcmp(scores, expected, sizeof scores) == 0);
  // Errors are those of the thread that made them.
  CHECK(snv2_load("no such file", 1) == nullptr && contains(snv2_error(), "no such file"));
  std::thread([] { CHECK(std::string(snv2_error()).empty()); }).join();
  CHECK(snv2_load(nullptr, 1) == nullptr && contains(snv2_error(), "path: is NULL"));
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// One that tools/write_program.py made, perhaps on another kind of machine, with the scores of its
// picture there.
TEST(a_file_of_pythons) {
  const char* const folder = std::getenv("SNV2_PROGRAM");
  if (folder == nullptr) return;
  Network network = Network::load(std::string(folder) + "/net.snv2");
  const std::string picture = read_file(std::string(folder) + "/photo.ppm");
  const std::string expected = read_file(std::string(folder) + "/scores.bin");
  const int64_t classes = network.program().results().back().channels;
  CHECK(static_cast<int64_t>(expected.size()) == 4 * classes);
  const int64_t* const shape = network.program().input().shape;
  const auto* const pixels =
      reinterpret_cast<const uint8_t*>(picture.data()) + picture.size() - 3 * shape[2] * shape[3];
  std::vector<float> scores(static_cast<size_t>(classes), kNan);
  network.run(snv2::Images{pixels, 1, shape[2], shape[3]}, scores.data());
  for (size_t i = 0; i < scores.size(); ++i) {
    float value;
    std::memcpy(&value, &expected[4 * i], 4);
    CHECK(close(scores[i], value, 5), "%zu: %g, not %g", i, scores[i], value);
  }
}

// The same network in bfloat16, no further from PyTorch in float64 than Python's tests allow.
TEST(a_file_of_pythons_in_bfloat16) {
  const char* const folder = std::getenv("SNV2_PROGRAM");
  if (folder == nullptr) return;
  Network network = Network::load(std::string(folder) + "/net.snv2");
  std::string image = read_file(std::string(folder) + "/image.bin");
  const std::string exact = read_file(std::string(folder) + "/exact.bin");
  const int64_t classes = network.program().results().back().channels;
  CHECK(static_cast<int64_t>(exact.size()) == 8 * (classes + 1));
  std::vector<double> expected(static_cast<size_t>(classes) + 1);
  std::memcpy(expected.data(), exact.data(), exact.size());
  const int64_t* const shape = network.program().input().shape;
  CHECK(static_cast<int64_t>(image.size()) == 2 * 3 * shape[2] * shape[3]);
  on_each_isa([&](const char* isa) {
    if (!snv2::cpu::has_bfloat16()) return;
    std::vector<uint16_t> scores(static_cast<size_t>(classes), 0x7fc0);
    network.run({image.data(), DType::kBFloat16, Layout::kContiguous, 1, 3, shape[2], shape[3]},
                {scores.data(), DType::kBFloat16, Layout::kContiguous, 1, classes, 1, 1});
    for (size_t i = 0; i < scores.size(); ++i) {
      const uint32_t bits = uint32_t{scores[i]} << 16;
      float value;
      std::memcpy(&value, &bits, 4);
      CHECK(std::abs(value - expected[i]) <= expected.back(), "%s, %zu: %g, not %g to %g", isa, i,
            value, expected[i], expected.back());
    }
  });
}

}  // namespace

// --write FOLDER: a program and a picture for it.
int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "--write") {
    write_file(std::string(argv[2]) + "/net.snv2", file_of(small_sections()));
    std::string pixels = "P6 23 19 255\n";
    for (int i = 0; i < 3 * 23 * 19; ++i) pixels += static_cast<char>(i * 7);
    write_file(std::string(argv[2]) + "/photo.ppm", pixels);
    return 0;
  }
  return run_all_tests();
}
