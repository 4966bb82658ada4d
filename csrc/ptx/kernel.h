// PTX as the interpreter runs it: kernels, their instructions and where operands lie.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace snv2::ptx {

// A kernel did what no kernel may, or has an instruction that the interpreter does not know.
class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

constexpr uint32_t kLanes = 32;
constexpr uint32_t kAllLanes = ~0u;

struct Warp;
struct Instruction;
// Does an instruction for the lanes of a mask, which has one at least.
using Operation = void (*)(Warp&, const Instruction&, uint32_t mask);

// What the scheduler does with an instruction.
enum class Flow : uint8_t {
  kNext,
  kYield,  // other warps run next: it may be a turn of a loop that waits for them
  kBranch,
  kReturn,
  kTrap,
  kBarrier,  // of the CTA
  kClusterArrive,
  kClusterWait,
  kTransaction,      // others may be waiting for it
  kTransactionWait,  // and here they do
  kWholeWarp,        // all live lanes do it at once
  kMembers,          // the lanes of a mask do it at once
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kParameter };

// Where an operand lies: bytes into the warp's registers or, of a constant, into Kernel::constants.
// Both have one value for each lane, a predicate one bit.
using Place = int32_t;
constexpr Place kConstantBit = INT32_MIN;
constexpr Place kNowhere = INT32_MAX;  // a result that is dropped, an address that is a number

// d, a, b and c are called as in the PTX ISA; what else they are stands at the operation.
struct Instruction {
  Operation operation = nullptr;
  Place d = 0, a = 0, b = 0, c = 0;
  Place predicate = kNowhere;
  int32_t immediate = 0;  // added to an address; the target of a branch
  int32_t list = -1;      // the first of further operands in Kernel::operands
  bool negated = false;   // the predicate
  Flow flow = Flow::kNext;
  Space space = Space::kGeneric;
  uint8_t elements = 1;       // of a vector in memory; matrices
  uint8_t element_bytes = 0;  // of each
  bool wide_address = false;  // of 64 bits
  bool transposed = false;    // a matrix
  int32_t location = 0;       // in Kernel::locations
  std::string_view text;
};

// A source line, and in Kernel::locations the call by which it is inlined, -1 where it is not.
struct Location {
  int file = 0, line = 0;
  int32_t call = -1;
};

// A value for all lanes; registers and constants begin at its alignment.
struct alignas(64) Block {
  uint8_t bytes[64];
};

struct Module;

struct Kernel {
  struct Parameter {
    std::string name;
    uint32_t offset, bytes;
  };

  const Module* module = nullptr;
  std::string name;
  std::string_view body;  // within its braces
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t max_threads = 1024;

  // What decode() makes of the body.
  std::vector<Instruction> code;
  std::vector<Place> operands;
  std::vector<Block> constants;
  std::vector<Location> locations;
  // A special register and where it lies; of values see special_value().
  struct Special {
    int index;
    Place place;
  };
  std::vector<Special> specials;
  size_t register_blocks = 0;

  // How often each instruction was executed by a warp, since the counts were reset.
  std::vector<uint64_t> executed;

  bool decoded() const { return !code.empty(); }
};

struct Module {
  std::string text;
  int architecture = 0;  // 90 for sm_90
  std::map<int, std::string> files;
  std::map<std::string, Kernel> kernels;
  std::vector<std::string> shared_names;  // of the launch's shared memory
};

// Reads all but the bodies of kernels. Throws Fault.
std::unique_ptr<Module> parse_module(std::string text);
// Reads a kernel's body.
void decode(Kernel& kernel);

// "file:line", and " in file:line" of each call by which that is inlined, the kernel's own last.
std::string name_of(const Kernel& kernel, int32_t location);

}  // namespace snv2::ptx
