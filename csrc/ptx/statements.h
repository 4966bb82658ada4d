// A kernel's body as statements on virtual registers, before registers have their places.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "ptx/kernel.h"

namespace snv2::ptx {

enum class RegisterClass : uint8_t { kPredicate, k16, k32, k64 };

struct Operand {
  enum class Kind : uint8_t { kRegister, kNumber, kAddress, kVector, kMemory, kLabel, kDropped };

  Kind kind = Kind::kDropped;
  int reg = -1;                   // also the base of memory
  int second = -1;                // q of p|q
  bool negated = false;           // !p
  uint64_t number = 0;            // also an address, or what is added to a base
  Space space = Space::kGeneric;  // of an address without a register
  std::vector<Operand> parts;     // of a vector
};

struct Statement {
  std::string_view text;
  std::string_view opcode;
  std::vector<std::string_view> words;  // of the opcode, between its dots
  std::vector<Operand> operands;
  int predicate = -1;
  bool negated = false;
  int location = 0;
  int target = -1;  // the statement that a branch goes to

  bool has(std::string_view word) const;
  bool is(std::string_view word) const { return words[0] == word; }
};

struct Body {
  // A special register, of special_index().
  struct Special {
    int index;
    int reg;
  };

  std::vector<Statement> statements;
  std::vector<RegisterClass> registers;
  std::vector<Special> specials;
  std::vector<Location> locations;
};

Body read_body(const Kernel& kernel);

// Where each register of a body lies: two that are never needed at once may share a place.
struct RegisterPlaces {
  std::vector<Place> places;
  size_t blocks;
};
RegisterPlaces place_registers(const Body& body);

// Of a name such as %tid.x; -1 if there is none.
int special_index(std::string_view name);

}  // namespace snv2::ptx
