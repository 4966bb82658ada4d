// Stacks to run CUDA threads on, and the switch between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace snv2::emulator {

// A suspended flow of control: its stack pointer.
struct Context {
  void* stack_pointer = nullptr;
};

// Saves the running context in `from` and continues `to`; returns when something switches back.
void switch_context(Context& from, Context& to);

// Stacks kept from launch to launch, each with a page below it that faults.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();

  // A context that starts in entry() on stack `i`. What lay on that stack before is gone.
  Context start(size_t i, void (*entry)());

 private:
  std::vector<unsigned char*> stacks_;
};

}  // namespace snv2::emulator
