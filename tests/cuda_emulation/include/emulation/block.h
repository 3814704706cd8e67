// Runs the threads of one CUDA block as fibers, and notices what a GPU would punish or hide.
//
// Threads run one at a time, each until it waits for others, in an order that a seed shuffles. A barrier wants every
// thread of the block, a warp operation every lane of its mask, all from the same line of the source. Shared memory
// starts as NaN for each block. A violation ends the launch with a sentence, as an error of the CUDA runtime.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace emulation {

constexpr unsigned kWarpSize = 32;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

class Block {
 public:
  static constexpr size_t kSharedBytes = 48 << 10;  // what a kernel may declare statically

  static inline thread_local Block* current = nullptr;

  Index thread_index() const { return {running_, 0, 0}; }
  Index block_index, block_dim, grid_dim;

  // Calls body() once for each thread. Returns an empty string, or what went wrong.
  template <class Body>
  std::string run(unsigned threads, unsigned seed, const Body& body) {
    current = this;
    body_ = [](const void* b) { (*static_cast<const Body*>(b))(); };
    body_data_ = &body;
    reset(threads, seed);
    while (finished_ < threads_.size() && failure_.empty()) {
      bool progress = false;
      for (const unsigned index : order_) {
        if (threads_[index].state != State::ready || !failure_.empty()) continue;
        progress = true;
        running_ = index;
        scheduler_.switch_to(fibers_[index]);
      }
      if (!progress && failure_.empty()) failure_ = deadlock();
    }
    current = nullptr;
    return failure_;
  }

  // Ends the launch. Nothing on the stacks of the threads needs to be destroyed.
  [[noreturn]] void fail(const std::string& why) {
    if (failure_.empty()) failure_ = why + where(running_);
    fibers_[running_].switch_to(scheduler_);
    abort();
  }

  void barrier(int line) {
    Thread& self = threads_[running_];
    if (at_barrier_ > 0 && barrier_line_ != line) {
      fail("divergent barrier: threads wait at __syncthreads of lines " + std::to_string(barrier_line_) + " and " +
           std::to_string(line));
    }
    barrier_line_ = line;
    self.state = State::barrier;
    if (++at_barrier_ < threads_.size()) return wait();
    at_barrier_ = 0;
    for (Thread& thread : threads_) thread.state = State::ready;
  }

  // What lane source(lane) of the warp brings, for all lanes of the mask at once.
  template <class T, class Source>
  T exchange(unsigned mask, T value, int line, const Source& source) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    const unsigned lane = running_ % kWarpSize;
    Warp& warp = warps_[running_ / kWarpSize];
    warp.in[lane] = 0;
    memcpy(&warp.in[lane], &value, sizeof value);
    meet(mask, line, warp, lane);
    // All lanes of the mask have brought their value; none can bring the next one before this one has left.
    const unsigned from = source(lane);
    if (from >= kWarpSize || !(mask >> from & 1)) fail("a shuffle reads a lane that is not in its mask");
    T result;
    memcpy(&result, &warp.out[from], sizeof result);
    return result;
  }

  void warp_barrier(unsigned mask, int line) { meet(mask, line, warps_[running_ / kWarpSize], running_ % kWarpSize); }

  // The block's only object of that declaration.
  template <class T>
  T& shared(const void* declaration) {
    for (const auto& [key, offset] : declared_)
      if (key == declaration) return *reinterpret_cast<T*>(shared_ + offset);
    const size_t offset = (shared_used_ + alignof(T) - 1) / alignof(T) * alignof(T);
    if (offset + sizeof(T) > kSharedBytes) fail("more than 48 KiB of shared memory");
    shared_used_ = offset + sizeof(T);
    declared_.push_back({declaration, offset});
    return *reinterpret_cast<T*>(shared_ + offset);
  }

 private:
  enum class State { ready, barrier, warp, finished };
  struct Thread {
    State state;
    unsigned mask;
    int line;
  };
  struct Warp {
    unsigned waiting = 0;
    uint64_t in[kWarpSize], out[kWarpSize];
  };

  void reset(unsigned threads, unsigned seed) {
    if (fibers_.size() < threads) fibers_ = std::vector<Fiber>(threads);
    for (unsigned i = 0; i < threads; ++i) fibers_[i].prepare(&Block::entry, i);
    threads_.assign(threads, {State::ready, 0, 0});
    warps_.assign((threads + kWarpSize - 1) / kWarpSize, {});
    order_.resize(threads);
    for (unsigned i = 0; i < threads; ++i) order_[i] = i;
    if (seed != 0) std::shuffle(order_.begin(), order_.end(), std::mt19937(seed));
    memset(shared_, 0xff, kSharedBytes);
    shared_used_ = 0;
    declared_.clear();
    failure_.clear();
    finished_ = at_barrier_ = 0;
  }

  static void entry() {
    Block& block = *current;
    Fiber::entered(block.scheduler_);
    block.body_(block.body_data_);
    block.threads_[block.running_].state = State::finished;
    ++block.finished_;
    block.fibers_[block.running_].switch_to(block.scheduler_);
    abort();
  }

  void wait() { fibers_[running_].switch_to(scheduler_); }

  void meet(unsigned mask, int line, Warp& warp, unsigned lane) {
    if (!(mask >> lane & 1)) fail("a lane calls a warp operation whose mask leaves it out");
    Thread& self = threads_[running_];
    self = {State::warp, mask, line};
    warp.waiting |= 1u << lane;
    if ((warp.waiting & mask) != mask) return wait();
    const unsigned first = running_ - lane;
    for (unsigned l = 0; l < kWarpSize; ++l) {
      if (!(mask >> l & 1)) continue;
      Thread& other = threads_[first + l];
      if (other.mask != mask) fail("lanes meet in a warp operation with different masks");
      if (other.line != line) fail("lanes meet in warp operations of different lines");
      warp.out[l] = warp.in[l];
      other.state = State::ready;
    }
    warp.waiting &= ~mask;
  }

  std::string deadlock() const {
    for (unsigned i = 0; i < threads_.size(); ++i) {
      if (threads_[i].state == State::barrier) {
        return "divergent barrier: __syncthreads of line " + std::to_string(barrier_line_) +
               " is not reached by all threads" + where(i);
      }
    }
    for (unsigned i = 0; i < threads_.size(); ++i) {
      if (threads_[i].state == State::warp) {
        return "divergent warp operation: line " + std::to_string(threads_[i].line) +
               " is not reached by all lanes of its mask" + where(i);
      }
    }
    return "deadlock";
  }

  std::string where(unsigned thread) const {
    return " (block " + std::to_string(block_index.x) + ", thread " + std::to_string(thread) + ")";
  }

  Fiber scheduler_;
  std::vector<Fiber> fibers_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<unsigned> order_;
  alignas(64) char shared_[kSharedBytes];
  std::vector<std::pair<const void*, size_t>> declared_;
  size_t shared_used_ = 0;
  unsigned running_ = 0, finished_ = 0, at_barrier_ = 0;
  int barrier_line_ = 0;
  std::string failure_;
  void (*body_)(const void*) = nullptr;
  const void* body_data_ = nullptr;
};

}  // namespace emulation
