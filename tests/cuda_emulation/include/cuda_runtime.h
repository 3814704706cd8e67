// An emulation of the part of CUDA that fsam_ext uses: kernels compiled by a host compiler run on the CPU.
//
// It stands in for CUDA's own cuda_runtime.h on the include path, so csrc/cuda is compiled as it is. See block.h for
// what it checks. FSAM_EMULATION_SEED (0: in order) shuffles blocks and threads, FSAM_EMULATION_THREADS sets the number
// of host threads that run blocks at the same time; both are read at each launch. With FSAM_EMULATION_LAUNCH=0 a launch
// does nothing, which leaves the host's share of a call to be measured. It has one stream, and no weak memory: what a
// fence would order is in order here.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulation/block.h"

// ---- Language ----------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// A grid constant is one object that all threads of the grid read.
#define __grid_constant__ &
#define CUDA_SHARED(type, name)        \
  static char emulation_key_of_##name; \
  type& name = emulation::Block::current->shared<type>(&emulation_key_of_##name)

#define threadIdx (emulation::Block::current->thread_index())
#define blockIdx (emulation::Block::current->block_index)
#define blockDim (emulation::Block::current->block_dim)
#define gridDim (emulation::Block::current->grid_dim)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct __attribute__((may_alias, aligned(16))) uint4 {
  uint32_t x, y, z, w;
};
struct __attribute__((may_alias, aligned(8))) uint2 {
  uint32_t x, y;
};

// ---- Device functions --------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) {
  emulation::Block::current->barrier(line);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  emulation::Block::current->warp_barrier(mask, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  return emulation::Block::current->exchange(mask, value, line, [&](unsigned) { return unsigned(source) % 32; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int line = __builtin_LINE()) {
  return emulation::Block::current->exchange(mask, value, line, [&](unsigned lane) { return lane ^ distance; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int line = __builtin_LINE()) {
  return emulation::Block::current->exchange(
      mask, value, line, [&](unsigned lane) { return lane + distance < 32 ? lane + distance : lane; });
}

namespace emulation {
template <class T>
void check_alignment(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0) {
    Block::current->fail("misaligned access of " + std::to_string(sizeof(T)) + " bytes");
  }
}
}  // namespace emulation

template <class T>
T __ldg(const T* p) {
  emulation::check_alignment(p);
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return __ldg(p);
}
template <class T>
void __stwb(T* p, T value) {
  emulation::check_alignment(p);
  *p = value;
}
template <class T>
void __stcs(T* p, T value) {
  __stwb(p, value);
}

// ---- Host functions ----------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
};

namespace emulation {

inline thread_local cudaError_t last_error = cudaSuccess;
inline thread_local std::string failure;

inline unsigned environment_number(const char* name, unsigned otherwise) {
  const char* value = getenv(name);
  return value == nullptr ? otherwise : unsigned(strtoul(value, nullptr, 10));
}

// Calls body() for each thread of each block; returns an empty string, or what went wrong in one of them.
template <class Body>
std::string run_grid(unsigned blocks, unsigned threads, const Body& body) {
  const unsigned seed = environment_number("FSAM_EMULATION_SEED", 0);
  const unsigned workers = std::min(blocks, environment_number("FSAM_EMULATION_THREADS", 1));
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  std::atomic<unsigned> next{0};
  std::mutex mutex;
  std::string first_failure;
  const auto work = [&] {
    static thread_local std::unique_ptr<Block> block;
    if (!block) block = std::make_unique<Block>();
    for (unsigned i; (i = next++) < blocks;) {
      block->block_index = {order[i], 0, 0};
      block->block_dim = {threads, 1, 1};
      block->grid_dim = {blocks, 1, 1};
      const std::string why = block->run(threads, seed == 0 ? 0 : seed + order[i], body);
      if (why.empty()) continue;
      const std::lock_guard lock(mutex);
      if (first_failure.empty()) first_failure = why;
      next = blocks;
    }
  };
  if (workers <= 1) {
    work();
  } else {
    std::vector<std::thread> pool;
    for (unsigned i = 0; i < workers; ++i) pool.emplace_back(work);
    for (std::thread& thread : pool) thread.join();
  }
  return first_failure;
}

}  // namespace emulation

inline cudaError_t cudaGetLastError() {
  return std::exchange(emulation::last_error, cudaSuccess);
}

// One device, which needs no driver.
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorLaunchFailure:
      return emulation::failure.c_str();
    default:
      break;
  }
  return "unrecognized error code";
}

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  constexpr size_t bytes = (sizeof(std::remove_reference_t<Parameters>) + ... + 0);
  if (bytes > 32764 || shared_bytes != 0) return emulation::last_error = cudaErrorInvalidValue;
  if (grid.x == 0 || grid.y != 1 || grid.z != 1 || block.x == 0 || block.x > 1024 || block.y != 1 || block.z != 1) {
    return emulation::last_error = cudaErrorInvalidConfiguration;
  }
  if (emulation::environment_number("FSAM_EMULATION_LAUNCH", 1) == 0) return cudaSuccess;
  const auto call = [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    return emulation::run_grid(
        grid.x, block.x, [&] { kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[kIndex])...); });
  };
  emulation::failure = call(std::index_sequence_for<Parameters...>{});
  return emulation::last_error = emulation::failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
