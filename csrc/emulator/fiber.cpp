#include "emulator/fiber.h"

#include <sys/mman.h>

#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#error "the emulator switches stacks in assembly: x86-64 and 64-bit ARM so far"
#endif

namespace snv2::emulator {
namespace {

constexpr size_t kPage = 64 * 1024;  // no system has larger ones by default
constexpr size_t kStack = 256 * 1024;

}  // namespace

// Pushes the registers that a function call keeps, exchanges stack pointers, pops.
extern "C" void snv2_switch_stack(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.type snv2_switch_stack, @function
.hidden snv2_switch_stack
.globl snv2_switch_stack
snv2_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size snv2_switch_stack, .-snv2_switch_stack
)");
constexpr size_t kSaved = 6;  // registers below the return address
#else
asm(R"(
.text
.type snv2_switch_stack, %function
.hidden snv2_switch_stack
.globl snv2_switch_stack
snv2_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size snv2_switch_stack, .-snv2_switch_stack
)");
constexpr size_t kSaved = 20;
constexpr size_t kReturnAddress = 11;  // x30
#endif

void switch_context(Context& from, Context& to) {
  snv2_switch_stack(&from.stack_pointer, to.stack_pointer);
}

Context Stacks::start(size_t i, void (*entry)()) {
  while (stacks_.size() <= i) {
    void* memory = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kPage, PROT_NONE);
    stacks_.push_back(static_cast<unsigned char*>(memory));
  }
  unsigned char* base = stacks_[i] + kPage;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(base, kStack);
#endif
  // Two words stay free above the frame, so that entry() finds the stack as a call leaves it.
  auto** top = reinterpret_cast<void**>(base + kStack) - 2;
  Context context;
#if defined(__x86_64__)
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  context.stack_pointer = top - 2 - kSaved;
#else
  top[-static_cast<ptrdiff_t>(kSaved) + static_cast<ptrdiff_t>(kReturnAddress)] =
      reinterpret_cast<void*>(entry);
  context.stack_pointer = top - kSaved;
#endif
  return context;
}

Stacks::~Stacks() {
  for (unsigned char* stack : stacks_) munmap(stack, kPage + kStack);
}

}  // namespace snv2::emulator
