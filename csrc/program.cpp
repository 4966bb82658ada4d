// Reads programs. A file comes from outside: nothing in it is used before it was checked.
#include "snv2/program.h"

#include <sys/stat.h>

#include <array>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "program_memory.h"
#include "snv2/cpu.h"

namespace snv2 {
namespace {

constexpr int64_t kMostExtent = int64_t{1} << 24;
constexpr size_t kMostByteChannels = 4;  // snv2::Image

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("program: " + what); }

void require(bool ok, const char* what) {
  if (!ok) fail(what);
}

std::string text(uint64_t number) { return std::to_string(number); }

// Eight tables: byte b of eight is looked up in table 7 - b.
std::array<std::array<uint32_t, 256>, 8> crc_tables() {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1) != 0 ? 0xedb88320u : 0u);
    tables[0][i] = crc;
  }
  for (size_t t = 1; t < 8; ++t)
    for (size_t i = 0; i < 256; ++i) {
      const uint32_t before = tables[t - 1][i];
      tables[t][i] = before >> 8 ^ tables[0][before & 0xff];
    }
  return tables;
}

bool is_utf8(const unsigned char* s, size_t size) {
  for (size_t i = 0; i < size;) {
    const unsigned char lead = s[i++];
    if (lead < 0x80) {
      if (lead == 0) return false;
      continue;
    }
    const int rest = lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : 1;
    uint32_t code = lead & (0x3f >> rest);
    if (lead < 0xc2 || lead > 0xf4) return false;
    for (int k = 0; k < rest; ++k, ++i) {
      if (i == size || (s[i] & 0xc0) != 0x80) return false;
      code = code << 6 | (s[i] & 0x3f);
    }
    constexpr uint32_t kLeast[] = {0x80, 0x800, 0x10000};
    if (code < kLeast[rest - 1] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
      return false;
  }
  return true;
}

bool same(const std::vector<PlanResult>& a, const std::vector<PlanResult>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].channels != b[i].channels || a[i].halvings != b[i].halvings) return false;
  }
  return true;
}

// The format of plans is in the last 12 bits of their magic number.
void check_plan_format(const int64_t* words, int64_t count, int64_t magic, const char* of) {
  constexpr int64_t kFormat = 0xfff;
  if (count > 0 && words[0] != magic && (words[0] & ~kFormat) == (magic & ~kFormat)) {
    fail("made by a library whose plans for " + std::string(of) + " have format " +
         std::to_string(words[0] & kFormat) + "; this one reads " +
         std::to_string(magic & kFormat) + ": export it again");
  }
}

std::shared_ptr<const void> copied(const void* data, size_t size) {
  std::shared_ptr<void> memory = allocate(size, "the program");
  std::memcpy(memory.get(), data, size);
  return memory;
}

}  // namespace

uint32_t crc32(const void* data, size_t size) {
  static const auto tables = crc_tables();
  const auto* bytes = static_cast<const unsigned char*>(data);
  uint32_t crc = 0xffffffffu;
  for (; size >= 8; bytes += 8, size -= 8) {
    uint32_t low;
    std::memcpy(&low, bytes, sizeof low);
    low ^= crc;
    crc = tables[7][low & 0xff] ^ tables[6][low >> 8 & 0xff] ^ tables[5][low >> 16 & 0xff] ^
          tables[4][low >> 24] ^ tables[3][bytes[4]] ^ tables[2][bytes[5]] ^ tables[1][bytes[6]] ^
          tables[0][bytes[7]];
  }
  for (; size > 0; ++bytes, --size) crc = crc >> 8 ^ tables[0][(crc ^ *bytes) & 0xff];
  return ~crc;
}

class ProgramReader {
 public:
  ProgramReader(std::shared_ptr<const void> memory, const void* data, size_t size)
      : data_(static_cast<const unsigned char*>(data)), size_(size) {
    program_->memory_ = std::move(memory);
  }

  std::shared_ptr<const Program> read() {
    check_header();
    check_sections();
    read_plans();
    read_input();
    read_normalization();
    read_classes();
    return program_;
  }

 private:
  void check_header();
  void check_sections();
  void read_plans();
  void read_cpu_plan(const ProgramSection& section);
  void read_gpu_plan(const ProgramSection& section);
  void read_input();
  void read_normalization();
  void read_classes();

  const ProgramSection* find(SectionKind kind, uint32_t dtype = 0) const {
    for (const ProgramSection& section : sections_) {
      if (section.kind == static_cast<uint32_t>(kind) && section.dtype == dtype) return &section;
    }
    return nullptr;
  }
  const ProgramSection& needed(SectionKind kind, uint32_t dtype, const char* what) const {
    const ProgramSection* const section = find(kind, dtype);
    require(section != nullptr, what);
    return *section;
  }
  const void* at(const ProgramSection& section) const { return data_ + section.offset; }
  // The section as whole elements.
  template <class T>
  const T* array(const ProgramSection& section, int64_t& count, const char* what) const {
    require(section.bytes % sizeof(T) == 0, what);
    count = static_cast<int64_t>(section.bytes / sizeof(T));
    return reinterpret_cast<const T*>(at(section));
  }

  const unsigned char* data_;
  size_t size_;
  ProgramHeader header_{};
  std::vector<ProgramSection> sections_;
  std::shared_ptr<Program> program_{new Program};
};

void ProgramReader::check_header() {
  require(size_ >= sizeof kProgramMagic && std::memcmp(data_, kProgramMagic, 8) == 0,
          "not a program of snv2_kernels");
  require(size_ >= sizeof header_, "truncated: its header is cut off");
  std::memcpy(&header_, data_, sizeof header_);
  if (header_.byte_order != kByteOrder) {
    require(header_.byte_order == 0x04030201u, "damaged: its byte order is none");
    fail("of the other byte order than this machine's, which reads little-endian programs only");
  }
  if (header_.format != kProgramFormat) {
    fail("of format " + text(header_.format) + "; this library reads format " +
         text(kProgramFormat) +
         (header_.format > kProgramFormat ? ": update it" : ": export again"));
  }
  if (header_.file_bytes > size_) {
    fail("truncated: " + text(size_) + " bytes of " + text(header_.file_bytes));
  }
  if (header_.file_bytes < size_) {
    fail("damaged: " + text(size_ - header_.file_bytes) + " bytes behind its end");
  }
  require(header_.section_count >= 1 && header_.section_count <= kMostSections &&
              sizeof header_ + header_.section_count * sizeof(ProgramSection) <= size_,
          "damaged: section_count");
  std::vector<unsigned char> head(
      data_, data_ + sizeof header_ + header_.section_count * sizeof(ProgramSection));
  std::memset(head.data() + offsetof(ProgramHeader, checksum), 0, sizeof header_.checksum);
  require(crc32(head.data(), head.size()) == header_.checksum, "damaged: checksum of its header");
  const size_t length = strnlen(header_.library, sizeof header_.library);
  require(length < sizeof header_.library &&
              is_utf8(reinterpret_cast<const unsigned char*>(header_.library), length),
          "damaged: library");
  program_->library_ = header_.library;
}

void ProgramReader::check_sections() {
  sections_.resize(header_.section_count);
  const size_t bytes = sections_.size() * sizeof(ProgramSection);
  std::memcpy(sections_.data(), data_ + sizeof header_, bytes);
  uint64_t end = sizeof header_ + bytes;
  const ProgramSection* before = nullptr;
  for (const ProgramSection& section : sections_) {
    const std::string name = "section of kind " + text(section.kind);
    const uint64_t begin = (end + kProgramAlign - 1) / kProgramAlign * kProgramAlign;
    if (section.offset != begin || begin > size_ || section.bytes > size_ - begin ||
        section.zero != 0) {
      fail("damaged: place of the " + name);
    }
    if (before != nullptr && (section.kind < before->kind ||
                              (section.kind == before->kind && section.dtype <= before->dtype))) {
      fail("damaged: order of the " + name);
    }
    for (; end < begin; ++end) require(data_[end] == 0, "damaged: between its sections");
    if (crc32(at(section), section.bytes) != section.checksum) {
      fail("damaged: checksum of the " + name);
    }
    end = begin + section.bytes;
    before = &section;
  }
  require(end == size_, "damaged: its sections end before it");
}

void ProgramReader::read_plans() {
  for (const ProgramSection& section : sections_) {
    const auto kind = static_cast<SectionKind>(section.kind);
    const bool plans = section.kind >= static_cast<uint32_t>(SectionKind::kCpuPlan);
    const bool of_cpu = kind == SectionKind::kCpuPlan || kind == SectionKind::kCpuWeights;
    const DType last = of_cpu ? DType::kUint8 : DType::kBFloat16;
    require(plans ? section.dtype <= static_cast<uint32_t>(last) : section.dtype == 0,
            "damaged: dtype of a section");
    switch (kind) {
      case SectionKind::kCpuPlan:
        read_cpu_plan(section);
        break;
      case SectionKind::kGpuPlan:
        read_gpu_plan(section);
        break;
      case SectionKind::kCpuWeights:
        needed(SectionKind::kCpuPlan, section.dtype, "weights without a plan");
        break;
      case SectionKind::kGpuWeights:
      case SectionKind::kGpuParameters:
        needed(SectionKind::kGpuPlan, section.dtype, "weights without a plan");
        break;
      case SectionKind::kAbout:
      case SectionKind::kInput:
      case SectionKind::kNormalization:
      case SectionKind::kClasses:
        break;
      default:
        fail("a section of unknown kind " + text(section.kind));
    }
  }
  const std::vector<CpuProgram>& cpu = program_->cpu_;
  // Whatever processor it is read on has one that runs.
  require(!cpu.empty() && cpu.front().plan.element() != DType::kBFloat16,
          "it has no plan of float32 or of integers for the CPU");
  const PlanHeader& first = cpu.front().plan.header();
  program_->results_ = results_of(cpu.front().plan);
  const auto fits = [&](const auto& plan) {
    const auto& header = plan.header();
    require(header.in_channels == first.in_channels && header.classify == first.classify &&
                same(results_of(plan), program_->results_),
            "its plans are not of one network");
  };
  for (const CpuProgram& part : cpu) fits(part.plan);
  for (const GpuProgram& part : program_->gpu_) fits(part.plan);
}

void ProgramReader::read_cpu_plan(const ProgramSection& section) {
  int64_t words = 0, floats = 0;
  const auto* const plan = array<int64_t>(section, words, "size of a plan");
  check_plan_format(plan, words, kPlanMagic, "the CPU");
  const auto* const weights =
      array<float>(needed(SectionKind::kCpuWeights, section.dtype, "a plan without weights"),
                   floats, "size of weights");
  CpuProgram part{Plan(plan, words, floats), weights, plan, words, floats};
  require(static_cast<uint32_t>(part.plan.element()) == section.dtype, "element of a plan");
  program_->cpu_.push_back(part);
}

void ProgramReader::read_gpu_plan(const ProgramSection& section) {
  int64_t words = 0, parameters = 0;
  const auto* const plan = array<int64_t>(section, words, "size of a plan");
  check_plan_format(plan, words, kGpuPlanMagic, "GPUs");
  const ProgramSection& weights =
      needed(SectionKind::kGpuWeights, section.dtype, "a plan without weights");
  const auto* const floats =
      array<float>(needed(SectionKind::kGpuParameters, section.dtype, "a plan without parameters"),
                   parameters, "size of parameters");
  GpuProgram part{GpuPlan(plan, words), at(weights), floats, plan, words};
  const GpuPlanHeader& header = part.plan.header();
  const auto element = static_cast<uint64_t>(size_of(part.plan.dtype()));
  require(static_cast<uint32_t>(part.plan.dtype()) == section.dtype, "dtype of a plan");
  require(header.parameter_count == parameters && weights.bytes % element == 0 &&
              static_cast<uint64_t>(header.weight_count) == weights.bytes / element,
          "size of weights");
  program_->gpu_.push_back(part);
}

void ProgramReader::read_input() {
  const ProgramSection& section = needed(SectionKind::kInput, 0, "it has no section of its input");
  require(section.bytes == sizeof(ProgramInput), "size of the input's section");
  ProgramInput& input = program_->input_;
  std::memcpy(&input, at(section), sizeof input);
  const auto within = [](int64_t value, int64_t least) {
    return value >= least && value <= kMostExtent;
  };
  const auto& [n, c, h, w] = input.shape;
  require(within(n, 0) && within(h, 1) && within(w, 1) &&
              c == program_->cpu_.front().plan.header().in_channels,
          "shape of its input");
  const auto& [height, width] = input.last_map;
  require((height == 0 && width == 0) || (within(height, 1) && within(width, 1)),
          "last_map of its input");
  program_->check_size(h, w);
  if (const ProgramSection* const about = find(SectionKind::kAbout)) {
    const auto* const bytes = static_cast<const unsigned char*>(at(*about));
    require(is_utf8(bytes, about->bytes), "its section about itself is no text");
    program_->about_.assign(bytes, bytes + about->bytes);
  }
}

void ProgramReader::read_normalization() {
  const ProgramSection* const section = find(SectionKind::kNormalization);
  if (section == nullptr) return;
  const Plan& plan = program_->cpu_.front().plan;
  const auto channels = static_cast<size_t>(plan.header().in_channels);
  require(plan.begin()->kind == StepKind::kStem,
          "normalization: only a whole network takes images");
  require(channels <= kMostByteChannels, "normalization: expected at most 4 channels");
  require(section->bytes == 2 * channels * sizeof(double), "size of the normalization");
  std::vector<double> values(2 * channels);
  std::memcpy(values.data(), at(*section), section->bytes);
  program_->mean_.assign(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(channels));
  program_->std_.assign(values.begin() + static_cast<std::ptrdiff_t>(channels), values.end());
  for (size_t c = 0; c < channels; ++c) {
    const double mean = values[c], std = values[channels + c];
    require(std::isfinite(mean) && std::isfinite(std) && std > 0 &&
                std::isfinite(static_cast<float>(1 / (255 * std))) &&
                std::isfinite(static_cast<float>(-mean / std)),
            "normalization: expected finite numbers, std > 0");
  }
}

void ProgramReader::read_classes() {
  const ProgramSection* const section = find(SectionKind::kClasses);
  if (section == nullptr) return;
  const auto* const bytes = static_cast<const unsigned char*>(at(*section));
  require(is_utf8(bytes, section->bytes), "its names of classes are no text");
  program_->classes_.emplace_back();
  for (uint64_t i = 0; i < section->bytes; ++i) {
    if (bytes[i] == '\n') {
      program_->classes_.emplace_back();
    } else {
      program_->classes_.back() += static_cast<char>(bytes[i]);
    }
  }
  require(program_->classifies() &&
              static_cast<int64_t>(program_->classes_.size()) == program_->results_.back().channels,
          "its names of classes are not as many as its classes");
}

std::shared_ptr<const Program> Program::load(const std::string& path) {
  const auto close = [](std::FILE* file) { std::fclose(file); };
  const std::unique_ptr<std::FILE, decltype(close)> file(std::fopen(path.c_str(), "rb"), close);
  const auto complain = [&](const char* why) { throw std::runtime_error(path + ": " + why); };
  struct stat status{};
  if (file == nullptr || fstat(fileno(file.get()), &status) != 0) complain(std::strerror(errno));
  if (!S_ISREG(status.st_mode)) complain("not a file");
  const auto bytes = static_cast<size_t>(status.st_size);
  std::shared_ptr<void> memory = allocate(bytes, path.c_str());
  const size_t got = std::fread(memory.get(), 1, bytes, file.get());
  if (std::ferror(file.get()) != 0) complain(std::strerror(errno));
  try {
    return ProgramReader(memory, memory.get(), got).read();
  } catch (const std::exception& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
}

std::shared_ptr<const Program> Program::view(const void* data, size_t size) {
  if (data == nullptr) throw std::invalid_argument("data: expected a program, got null");
  if (reinterpret_cast<uintptr_t>(data) % kProgramAlign == 0) {
    return ProgramReader(nullptr, data, size).read();
  }
  const std::shared_ptr<const void> memory = copied(data, size);
  return ProgramReader(memory, memory.get(), size).read();
}

FeatureMap Program::result_shape(size_t result, int64_t batch, int64_t height,
                                 int64_t width) const {
  const PlanResult& made = results_.at(result);
  const bool scores = classifies() && result + 1 == results_.size();
  return {nullptr,
          DType::kFloat32,
          Layout::kContiguous,
          batch,
          made.channels,
          scores ? 1 : halved(height, made.halvings),
          scores ? 1 : halved(width, made.halvings)};
}

void Program::check_size(int64_t height, int64_t width) const {
  const auto& [last_height, last_width] = input_.last_map;
  const int64_t halvings = results_.back().halvings;
  if (last_height == 0) return;
  if (halved(height, halvings) != last_height || halved(width, halvings) != last_width) {
    throw std::invalid_argument("x: " + std::to_string(height) + " x " + std::to_string(width) +
                                " pixels; this network is right only where its last map is " +
                                std::to_string(last_height) + " x " + std::to_string(last_width));
  }
}

const CpuProgram& Program::cpu(DType dtype) const {
  if (dtype == DType::kBFloat16 && snv2::cpu::has_bfloat16()) {
    for (const CpuProgram& part : cpu_) {
      if (part.plan.element() == dtype) return part;
    }
  }
  return cpu_.front();
}

const GpuProgram* Program::gpu(DType dtype) const {
  for (const GpuProgram& part : gpu_) {
    if (part.plan.dtype() == dtype) return &part;
  }
  return nullptr;
}

}  // namespace snv2
