// Stacks to run CUDA threads on, and the switch between them.
#pragma once

#include <cstddef>
#include <vector>

namespace snv2::emulator {

// A suspended flow of control.
struct Context {
  void* stack_pointer = nullptr;
  // For AddressSanitizer, which keeps a second stack.
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* tsan_fiber = nullptr;  // ThreadSanitizer's
};

// The one that calls this, to be switched from.
Context calling_context();

// Saves the calling context in `from` and continues `to`; returns when something switches back. To
// ThreadSanitizer a switch orders nothing.
void switch_context(Context& from, const Context& to);
// Continues `to`, and the calling context never.
[[noreturn]] void leave_context(const Context& to);

// Zeros from the system, which take memory as they are touched.
class Pages {
 public:
  explicit Pages(size_t bytes);
  ~Pages();
  Pages(Pages&& other) noexcept;
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  unsigned char* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  unsigned char* data_;
  size_t bytes_;
};

// Stacks kept from launch to launch, each with a page below it that faults.
class Stacks {
 public:
  // A context that starts in entry(), which must not return, on stack `i`. What lay on that stack
  // before is gone.
  Context start(size_t i, void (*entry)());
  // The context on stack `i` will not be continued, although it has not come to its end.
  void abandon(size_t i);

 private:
  struct Stack {
    Pages memory;
    void* tsan_fiber = nullptr;
  };
  std::vector<Stack> stacks_;
};

}  // namespace snv2::emulator
