// Programs with drawn faults: each is refused with an exception, or is a network that runs within
// its memory. SNV2_MUTATIONS says how many.
#include <algorithm>
#include <cstdio>

#include "program_testing.h"
#include "snv2/network.h"

namespace {

constexpr int64_t kMostWorkspace = int64_t{1} << 26;

size_t draw(size_t count) { return generator() % count; }

int64_t absurd(uint64_t before) {
  const int64_t values[] = {0,
                            1,
                            -1,
                            2,
                            15,
                            16,
                            17,
                            255,
                            static_cast<int64_t>(before + 1),
                            static_cast<int64_t>(before - 1),
                            static_cast<int64_t>(before * 2),
                            static_cast<int64_t>(0 - before),
                            int64_t{1} << 20,
                            int64_t{1} << 24,
                            (int64_t{1} << 24) + 1,
                            INT32_MAX,
                            int64_t{1} << 32,
                            INT64_MAX,
                            INT64_MIN,
                            static_cast<int64_t>(generator())};
  return values[draw(std::size(values))];
}

std::vector<Section> all_sections() {
  std::vector<Section> sections = small_sections();
  for (const Section& section : gpu_sections(DType::kFloat16)) sections.push_back(section);
  return sections;
}

template <class T>
void change_word(std::string& bytes, size_t begin, size_t size) {
  if (size < sizeof(T)) return;
  const size_t at = begin + draw(size / sizeof(T)) * sizeof(T);
  T word;
  std::memcpy(&word, &bytes[at], sizeof word);
  put(bytes, at, static_cast<T>(absurd(static_cast<uint64_t>(word))));
}

void flip(std::string& bytes, size_t begin, size_t size) {
  for (size_t i = draw(3) + 1; i > 0 && size > 0; --i) {
    bytes[begin + draw(size)] ^= static_cast<char>(1 << draw(8));
  }
}

std::string mutated(const std::vector<Section>& sections, const std::string& whole) {
  std::string file = whole;
  const snv2::ProgramSection some = section_at(whole, draw(sections.size()));
  switch (draw(8)) {
    case 0:
      flip(file, 0, file.size());
      return file;
    case 1:
      file.resize(draw(file.size() + 200), '\0');
      return file;
    case 2:
      change_word<uint32_t>(file, 8, 56 + 32 * sections.size());
      break;
    case 3:
      flip(file, 0, 64 + 32 * sections.size());
      break;
    case 4:
      flip(file, some.offset, some.bytes);
      break;
    case 5: {  // as long as another says
      std::vector<Section> changed = sections;
      Section& section = changed[draw(changed.size())];
      section.bytes.resize(draw(2) ? draw(section.bytes.size() + 100)
                                   : changed[draw(changed.size())].bytes.size());
      return file_of(changed);
    }
    case 6: {
      std::vector<Section> changed = sections;
      std::swap(changed[draw(changed.size())], changed[draw(changed.size())]);
      if (draw(2))
        changed.erase(changed.begin() + static_cast<std::ptrdiff_t>(draw(changed.size())));
      return file_of(changed);
    }
    default: {  // words of plans and small sections
      for (size_t i = draw(2) + 1; i > 0; --i) change_word<int64_t>(file, some.offset, some.bytes);
    }
  }
  seal(file);
  return file;
}

void run(snv2::Network& network) {
  const int64_t height = 9, width = 7, channels = network.program().input().shape[1];
  if (channels > 64) return;
  Map x(1, channels, height, width, Layout::kContiguous);
  x.randomize();
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    if (network.workspace_bytes(dtype, 1, height, width) > kMostWorkspace) continue;
    x.map.dtype = dtype;
    std::vector<std::vector<float>> memory;
    std::vector<FeatureMap> results;
    for (size_t i = 0; i < network.program().results().size(); ++i) {
      FeatureMap map = network.program().result_shape(i, 1, height, width);
      if (map.numel() > kMostWorkspace) return;
      memory.emplace_back(static_cast<size_t>(map.numel()));
      map.data = memory.back().data(), map.dtype = dtype;
      results.push_back(map);
    }
    network.run(x.map, results.data(), results.size());
  }
  if (!network.program().mean().empty() && network.program().results().size() == 1) {
    const std::vector<uint8_t> bytes(static_cast<size_t>(channels * height * width), 200);
    std::vector<float> result(
        static_cast<size_t>(network.program().result_shape(0, 1, height, width).numel()));
    network.run(snv2::Images{bytes.data(), 1, height, width}, result.data());
  }
}

TEST(damaged_programs) {
  const char* const wanted = std::getenv("SNV2_MUTATIONS");
  const int64_t count = wanted != nullptr ? std::atoll(wanted) : 3000;
  // One has all sections; the others' last is the weights, so that what reads on leaves the file.
  std::vector<Section> bases[] = {all_sections(), small_sections(), integer_sections()};
  bases[1].erase(std::remove_if(bases[1].begin(), bases[1].end(),
                                [](const Section& s) { return s.dtype != DType::kFloat32; }),
                 bases[1].end());
  const std::string files[] = {file_of(bases[0]), file_of(bases[1]), file_of(bases[2])};
  int64_t refused = 0, ran = 0;
  for (int64_t seed = 0; seed < count; ++seed) {
    generator.seed(static_cast<uint32_t>(seed));
    const InMemory memory(mutated(bases[seed % 3], files[seed % 3]));
    try {
      snv2::Network network = snv2::Network::view(memory.data.get(), memory.size, 1);
      run(network);
      ++ran;
    } catch (const std::runtime_error&) {
      ++refused;
    } catch (const std::invalid_argument&) {
      ++refused;
    }
  }
  std::printf("       %lld refused, %lld ran\n", static_cast<long long>(refused),
              static_cast<long long>(ran));
  // Faults that go through are those in numbers that may be anything.
  CHECK(refused > count / 2 && ran > count / 20);
}

}  // namespace
