// A program: a network packed into one file that runs without the model's Python. docs/program.md
// has the format byte by byte; snv2_kernels/program_file.py writes it.
//
//   [ProgramHeader][ProgramSection x sections][section, each at a multiple of 64 bytes] ...
//
// All numbers are little-endian. Sections stand in the order of (kind, dtype), each at the first
// multiple of 64 behind the one before, with zeros between, and the file ends with the last one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "snv2/gpu_plan.h"
#include "snv2/plan.h"
#include "snv2/types.h"

namespace snv2 {

inline constexpr unsigned char kProgramMagic[8] = {0x89, 'S', 'N', 'V', '2', '\r', '\n', 0x1a};
inline constexpr uint32_t kProgramFormat = 1;
inline constexpr uint32_t kByteOrder = 0x01020304;
inline constexpr int64_t kProgramAlign = 64;
inline constexpr uint32_t kMostSections = 64;

struct ProgramHeader {
  unsigned char magic[8];
  uint32_t byte_order;  // kByteOrder
  uint32_t format;
  uint64_t file_bytes;
  uint32_t section_count;
  uint32_t checksum;  // CRC-32 of the header, with this field zero, and the sections' table
  char library[32];   // version of the library that wrote it, padded with zeros
};

enum class SectionKind : uint32_t {
  kAbout = 1,          // JSON for people and tools; nothing that runs depends on it
  kInput = 2,          // ProgramInput
  kNormalization = 3,  // float64 [2, C]: mean and std of each channel, where bytes are taken
  kClasses = 4,        // a name for each class, one a line
  kCpuPlan = 16,       // words of a Plan, whose element is the section's dtype
  kCpuWeights = 17,    // its floats
  kGpuPlan = 32,       // words of a GpuPlan of the section's dtype
  kGpuWeights = 33,    // its matrices
  kGpuParameters = 34  // its float32
};

struct ProgramSection {
  uint32_t kind;    // SectionKind
  uint32_t dtype;   // DType of the maps, of sections of plans; else 0
  uint64_t offset;  // from the start of the file
  uint64_t bytes;
  uint32_t checksum;  // CRC-32 of the section
  uint32_t zero;
};

struct ProgramInput {
  int64_t shape[4];     // N, C, H and W by default; C is the only one to be had
  int64_t last_map[2];  // height and width of the last map where the network is right for no other
                        // (its pooling window is of that size), else 0
};
static_assert(sizeof(ProgramHeader) == 64 && sizeof(ProgramSection) == 32 &&
              sizeof(ProgramInput) == 48);

// CRC-32 as in zlib and PNG.
SNV2_API uint32_t crc32(const void* data, size_t size);

struct CpuProgram {
  Plan plan;
  const float* weights;
  const int64_t* words;
  int64_t word_count;
  int64_t weight_count;
};

struct GpuProgram {
  GpuPlan plan;
  const void* weights;
  const float* parameters;
  const int64_t* words;
  int64_t word_count;
};

// A file that was checked as a whole: its checksums, and every number of it. Immutable.
class SNV2_API Program {
 public:
  // All throw std::runtime_error, or std::invalid_argument for a plan, saying what is wrong.

  // Reads a file into memory.
  static std::shared_ptr<const Program> load(const std::string& path);
  // Reads `size` bytes in place, such as a mapped file: they must neither change nor go while the
  // program lives. Where they are not aligned to 64 bytes they are copied.
  static std::shared_ptr<const Program> view(const void* data, size_t size);

  const char* library() const { return library_.c_str(); }
  const std::string& about() const { return about_; }
  const ProgramInput& input() const { return input_; }
  const std::vector<std::string>& classes() const { return classes_; }
  // Mean and deviation of each channel; empty unless images are taken as bytes.
  const std::vector<double>& mean() const { return mean_; }
  const std::vector<double>& std() const { return std_; }
  // Results that a run writes, in the order of the network.
  const std::vector<PlanResult>& results() const { return results_; }
  // True if the last result is [N, channels].
  bool classifies() const { return cpu_.front().plan.header().classify != 0; }
  // [N, C, H, W] of a result; a classifier's has one pixel.
  FeatureMap result_shape(size_t result, int64_t batch, int64_t height, int64_t width) const;
  // Throws std::invalid_argument where the network is wrong for images of this size.
  void check_size(int64_t height, int64_t width) const;

  // The plan for maps of `dtype` on the CPU: that of bfloat16 where there is one and this machine
  // multiplies it, else that of float32, which is always there.
  const CpuProgram& cpu(DType dtype) const;
  // The plan for GPUs, or null.
  const GpuProgram* gpu(DType dtype) const;
  const std::vector<CpuProgram>& cpu_plans() const { return cpu_; }
  const std::vector<GpuProgram>& gpu_plans() const { return gpu_; }

 private:
  Program() = default;
  friend class ProgramReader;

  std::shared_ptr<const void> memory_;  // what is read in place
  std::string library_, about_;
  ProgramInput input_{};
  std::vector<std::string> classes_;
  std::vector<double> mean_, std_;
  std::vector<PlanResult> results_;
  std::vector<CpuProgram> cpu_;
  std::vector<GpuProgram> gpu_;
};

}  // namespace snv2
