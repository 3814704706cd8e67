// A stack to run a function on, and the switch between stacks: what one emulated CUDA thread is made of.
//
// ucontext saves the signal mask with a system call in each switch; a kernel switches hundreds of times for each
// thread, so x86-64 has a switch of its own.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, and goes on where `to` was saved.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

// Either a stack of its own with a function to run, or (default-constructed) the place that a thread came from.
class Fiber {
 public:
  // Frames of instrumented code are several times as large.
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kStackBytes = 256 << 10;
#else
  static constexpr size_t kStackBytes = 64 << 10;
#endif

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    if (stack_ == nullptr) return;
    unpoison();
    munmap(stack_, kStackBytes);
  }

  // The next switch to this fiber calls `entry`, which must not return. The lowest page is left without access rights,
  // so that a stack overflow is a fault instead of a mystery. Stacks that all began at the same distance from a page
  // would fight for the same cache lines: `number` sets them apart.
  void prepare(void (*entry)(), unsigned number) {
    if (stack_ == nullptr) {
      void* memory =
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) abort();
      stack_ = static_cast<char*>(memory);
      mprotect(stack_, 4096, PROT_NONE);
    }
    unpoison();
    bottom_ = stack_;
    bytes_ = kStackBytes - number % 61 * 192;
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack_ + bytes_) - 2;  // aligned as if `entry` had been called
    *top = reinterpret_cast<void*>(entry);
    top_ = top - 6;  // the registers that the switch restores hold nothing yet
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = bytes_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Leaves this fiber for another; returns when somebody switches back to this one.
  void switch_to(Fiber& other) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, other.bottom_, other.bytes_);
#endif
#if defined(__x86_64__)
    switch_stack(&top_, other.top_);
#else
    swapcontext(&context_, &other.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // Called first thing in `entry`: tells the sanitizer which stack the fiber was entered from.
  static void entered(Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &from.bottom_, &from.bytes_);
#else
    (void)from;
#endif
  }

 private:
  // Whoever was on the stack has left its frames without returning, and the sanitizer still guards them.
  void unpoison() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
  }

  char* stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
#if defined(__x86_64__)
  void* top_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace emulation
