// Programs written by hand, as docs/program.md says, and a small network to put into one.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>

#include "cpu_plan_testing.h"
#include "gpu_plan_packing.h"
#include "snv2/program.h"

using snv2::SectionKind;

struct Section {
  SectionKind kind;
  DType dtype;
  std::string bytes;
};

template <class T>
std::string bytes_of(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

template <class T>
void put(std::string& file, size_t offset, T value) {
  std::memcpy(&file[offset], &value, sizeof value);
}

inline snv2::ProgramSection section_at(const std::string& file, size_t index) {
  snv2::ProgramSection entry;
  std::memcpy(&entry, &file[64 + 32 * index], sizeof entry);
  return entry;
}

// Makes the checksums right, of sections that lie within the file.
inline void seal(std::string& file) {
  uint32_t count;
  std::memcpy(&count, &file[24], 4);
  if (file.size() < 64 || count > (file.size() - 64) / 32) return;
  for (uint32_t i = 0; i < count; ++i) {
    const snv2::ProgramSection entry = section_at(file, i);
    if (entry.offset > file.size() || entry.bytes > file.size() - entry.offset) continue;
    put(file, 64 + 32 * i + 24, snv2::crc32(&file[entry.offset], entry.bytes));
  }
  put(file, 28, uint32_t{0});
  put(file, 28, snv2::crc32(file.data(), 64 + 32 * count));
}

inline std::string file_of(const std::vector<Section>& sections) {
  const auto up = [](size_t size) { return (size + 63) / 64 * 64; };
  std::string file(64 + 32 * sections.size(), '\0');
  for (size_t i = 0; i < sections.size(); ++i) {
    const Section& section = sections[i];
    file.resize(up(file.size()));
    const snv2::ProgramSection entry{static_cast<uint32_t>(section.kind),
                                     static_cast<uint32_t>(section.dtype),
                                     file.size(),
                                     section.bytes.size(),
                                     0,
                                     0};
    put(file, 64 + 32 * i, entry);
    file += section.bytes;
  }
  std::memcpy(&file[0], snv2::kProgramMagic, 8);
  put(file, 8, snv2::kByteOrder);
  put(file, 12, snv2::kProgramFormat);
  put(file, 16, uint64_t{file.size()});
  put(file, 24, static_cast<uint32_t>(sections.size()));
  std::memcpy(&file[32], "0.1.0", 5);
  seal(file);
  return file;
}

// A stem, a unit and a head, of random weights: from three channels to five classes.
struct SmallNetwork {
  Packer packer;

  int64_t table(int64_t channels) {
    std::vector<int64_t> entries;
    for (int64_t c = 0; c < channels; c += packer.planes()) entries.push_back(c);
    return packer.add_table(entries);
  }
  int64_t words(int64_t channels) const { return snv2::ceil_div(channels, packer.planes()); }
  snv2::Layer layer(int64_t outputs, int64_t depth) {
    snv2::Layer packed{};
    if (packer.element == DType::kUint8) {  // words of any four bytes
      packed.weights = floats(snv2::packed_floats(outputs, depth, packer.element));
      return packed;
    }
    std::vector<float> weights = random(outputs * depth, 0.3f);
    if (packer.element == DType::kBFloat16) {
      // A word of bfloat16 is a pair: of the same number, which is about what the word is.
      for (float& weight : weights) {
        uint32_t word;
        std::memcpy(&word, &weight, sizeof word);
        word = word >> 16 | (word & 0xffff0000u);
        std::memcpy(&weight, &word, sizeof word);
      }
    }
    packed.weights = packer.add_weights(weights, random(outputs));
    return packed;
  }

  int64_t floats(int64_t count) {
    const std::vector<float> more = random(count);
    packer.weights.insert(packer.weights.end(), more.begin(), more.end());
    return static_cast<int64_t>(packer.weights.size()) - count;
  }

  explicit SmallNetwork(DType element) : packer{element, {}, {}, {}} {
    const bool integers = element == DType::kUint8;
    Step stem{};
    stem.kind = StepKind::kStem;
    stem.stride = 1, stem.new_buffer = 1, stem.buffer_panels = 1;
    stem.main.in_channels = 3, stem.main.out_channels = 8;
    stem.main.pw1 = layer(8, words(3) * 9);
    if (integers) stem.main.dw.weights = floats(3 * 3);
    packer.steps.push_back(stem);

    Step unit{};
    unit.kind = StepKind::kUnit;
    unit.stride = 2, unit.new_buffer = 1, unit.buffer_panels = 1;
    Branch& main = unit.main;
    main.parts = snv2::kExpand | snv2::kDepthwise | snv2::kProject;
    main.in_channels = words(8), main.in_table = table(8);
    main.mid_channels = 12, main.window = 3, main.dilation = 1;
    main.depth = words(12), main.table = table(12);
    main.out_channels = 10;
    main.pw1 = layer(12, words(8)), main.dw = layer(12, integers ? 3 : 9),
    main.pw2 = layer(10, words(12));
    packer.steps.push_back(unit);

    Step head{};
    head.kind = StepKind::kHead;
    head.stride = 1;
    head.main.in_channels = words(10), head.main.in_table = table(10);
    head.main.mid_channels = 14, head.main.out_channels = 5;
    head.main.pw1 = layer(14, words(10)), head.main.pw2 = layer(5, words(14));
    packer.steps.push_back(head);
  }

  std::vector<int64_t> plan() const {
    std::vector<int64_t> all = packer.words(3, 5, 3);
    all[5] = 1;  // classify
    return all;
  }
};

inline std::vector<Section> small_sections() {
  generator.seed(3);
  const SmallNetwork single(DType::kFloat32), narrow(DType::kBFloat16);
  const DType none = DType::kFloat32;
  return {
      {SectionKind::kAbout, none, "{\"model\": \"small\"}"},
      {SectionKind::kInput, none, bytes_of(std::vector<int64_t>{1, 3, 19, 23, 0, 0})},
      {SectionKind::kNormalization, none,
       bytes_of(std::vector<double>{0.485, 0.456, 0.406, 0.229, 0.224, 0.225})},
      {SectionKind::kClasses, none, "cat\ndog\nb\xc3\xa4r\n\nfifth"},
      {SectionKind::kCpuPlan, DType::kFloat32, bytes_of(single.plan())},
      {SectionKind::kCpuPlan, DType::kBFloat16, bytes_of(narrow.plan())},
      {SectionKind::kCpuWeights, DType::kFloat32, bytes_of(single.packer.weights)},
      {SectionKind::kCpuWeights, DType::kBFloat16, bytes_of(narrow.packer.weights)},
  };
}

// The same network in integers, which needs no other plan.
inline std::vector<Section> integer_sections() {
  const SmallNetwork network(DType::kUint8);
  std::vector<Section> sections = small_sections();
  sections.erase(std::remove_if(sections.begin(), sections.end(),
                                [](const Section& s) {
                                  return s.kind == SectionKind::kCpuPlan ||
                                         s.kind == SectionKind::kCpuWeights;
                                }),
                 sections.end());
  sections.push_back({SectionKind::kCpuPlan, DType::kUint8, bytes_of(network.plan())});
  sections.push_back({SectionKind::kCpuWeights, DType::kUint8, bytes_of(network.packer.weights)});
  return sections;
}

// A plan for GPUs of as many channels.
inline std::vector<Section> gpu_sections(DType dtype) {
  snv2::Packer packer(3, dtype);
  const auto range = snv2::Packer::range;
  packer.stem(8);
  packer.unit(2, 0, 1, range(0, 8), range(0, 10), 10, 5);
  packer.head(1, range(0, 10), 14, 5);
  const std::string words = bytes_of(packer.words());
  std::vector<float> weights = random(packer.header.weight_count, 0.2f);
  weights.resize(static_cast<size_t>(packer.header.weight_count * snv2::size_of(dtype) / 4));
  return {{SectionKind::kGpuPlan, dtype, words},
          {SectionKind::kGpuWeights, dtype, bytes_of(weights)},
          {SectionKind::kGpuParameters, dtype, bytes_of(random(packer.header.parameter_count))}};
}

// A file in memory that ends where the file does.
struct InMemory {
  std::unique_ptr<void, void (*)(void*)> data{nullptr, std::free};
  size_t size;

  explicit InMemory(const std::string& file) : size(file.size()) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, size + (size == 0)) != 0) std::abort();
    data.reset(memory);
    std::memcpy(memory, file.data(), size);
  }
};

inline void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<int64_t>(bytes.size()));
}
