#include "emulator/fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(SNV2_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#error "the emulator switches stacks in assembly: x86-64 and 64-bit ARM so far"
#endif

namespace snv2::emulator {
namespace {

constexpr size_t kPage = 64 * 1024;  // no system has larger ones by default
constexpr size_t kStack = 256 * 1024;
// Stacks that began at the same place of a page would share a few sets of the cache.
constexpr size_t kColours = 8, kColour = 512;

thread_local void (*entry_of_contexts)();

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

namespace {

#if defined(__SANITIZE_ADDRESS__)
void before_switch(void** fake_stack, const Context& to) {
  __sanitizer_start_switch_fiber(fake_stack, to.stack, to.stack_bytes);
}
void after_switch(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
#elif defined(SNV2_TSAN)
void before_switch(void**, const Context& to) {
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
}
void after_switch(void*) {}
#else
void before_switch(void**, const Context&) {}
void after_switch(void*) {}
#endif

void begin_context() {
  after_switch(nullptr);
  entry_of_contexts();
}

}  // namespace

Context calling_context() {
  Context context;
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  void* stack = nullptr;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &stack, &context.stack_bytes);
    pthread_attr_destroy(&attributes);
  }
  context.stack = stack;
#elif defined(SNV2_TSAN)
  context.tsan_fiber = __tsan_get_current_fiber();
#endif
  return context;
}

void switch_context(Context& from, const Context& to) {
  before_switch(&from.fake_stack, to);
  snv2_switch_stack(&from.stack_pointer, to.stack_pointer);
  after_switch(from.fake_stack);
}

void leave_context(const Context& to) {
  before_switch(nullptr, to);
  void* left;
  snv2_switch_stack(&left, to.stack_pointer);
  __builtin_unreachable();
}

Pages::Pages(size_t bytes) : bytes_(bytes > 0 ? bytes : 1) {
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<unsigned char*>(memory);
}

Pages::Pages(Pages&& other) noexcept : data_(other.data_), bytes_(other.bytes_) {
  other.data_ = nullptr;
}

Pages::~Pages() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

Context Stacks::start(size_t i, void (*entry)()) {
  entry_of_contexts = entry;
  while (stacks_.size() <= i) {
    stacks_.push_back({Pages(kPage + kStack)});
    mprotect(stacks_.back().memory.data(), kPage, PROT_NONE);
  }
  unsigned char* const base = stacks_[i].memory.data() + kPage;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(base, kStack);
#endif
  // Two words stay free above the frame, so that entry() finds the stack as a call leaves it.
  auto** top = reinterpret_cast<void**>(base + kStack - i % kColours * kColour) - 2;
  Context context;
  context.stack = base;
  context.stack_bytes = kStack;
#if defined(__x86_64__)
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(begin_context);
  context.stack_pointer = top - 2 - kSaved;
#else
  top[-static_cast<ptrdiff_t>(kSaved) + static_cast<ptrdiff_t>(kReturnAddress)] =
      reinterpret_cast<void*>(begin_context);
  context.stack_pointer = top - kSaved;
#endif
#if defined(SNV2_TSAN)
  void*& fiber = stacks_[i].tsan_fiber;
  if (fiber == nullptr) fiber = __tsan_create_fiber(0);
  context.tsan_fiber = fiber;
#endif
  return context;
}

void Stacks::abandon([[maybe_unused]] size_t i) {
#if defined(SNV2_TSAN)
  // It remembers the functions that it is in.
  __tsan_destroy_fiber(stacks_[i].tsan_fiber);
  stacks_[i].tsan_fiber = nullptr;
#endif
}

}  // namespace snv2::emulator
