// Kernels with one bug each: the emulation has to notice every one of them, or it is no evidence for the others.
//
// Usage: planted_bugs NAME. Prints what was noticed and exits with 1, or prints "as expected" and exits with 0.

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace {

constexpr int kThreads = 64;
constexpr unsigned kAll = 0xffffffffu;
using Shared = float[kThreads];

__global__ void correct(float* out) {
  CUDA_SHARED(Shared, values);
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(kAll, values[kThreads - 1 - threadIdx.x], 1);
}

__global__ void barrier_in_branch(float*) {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void two_barriers(float*) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_after_return(float*) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
}

__global__ void left_out(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffu, out[threadIdx.x], 1);
}

__global__ void source_outside(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_down_sync(0xffffu, out[threadIdx.x], 16);
}

__global__ void different_masks(float* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? kAll : kAll - (1u << 3);
  out[threadIdx.x] = __shfl_xor_sync(mask, out[threadIdx.x], 16);
}

__global__ void missing_lane(float* out) {
  if (threadIdx.x % 32 != 5) out[threadIdx.x] = __shfl_xor_sync(kAll, out[threadIdx.x], 1);
}

__global__ void missing_barrier(float* out) {
  CUDA_SHARED(Shared, values);
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = __shfl_xor_sync(kAll, values[kThreads - 1 - threadIdx.x], 1);
}

__global__ void uninitialised(float* out) {
  CUDA_SHARED(Shared, values);
  if (threadIdx.x != 7) values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(kAll, values[kThreads - 1 - threadIdx.x], 1);
}

// Each block reads what the one before it has written.
__global__ void ordered_blocks(float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = blockIdx.x == 0 ? (threadIdx.x ^ 1) * -1.0f + kThreads - 1 : out[i - int(blockDim.x)];
}

__global__ void misaligned_hint(float* out) {
  const uint4* p = reinterpret_cast<const uint4*>(out + 1);
  const uint4 x = __ldcs(p);
  __stcs(reinterpret_cast<uint4*>(out), x);
}

__global__ void misaligned_vector(float* out) {
  *reinterpret_cast<uint4*>(out + 1) = uint4{1, 2, 3, 4};
}

__global__ void out_of_bounds(float* out) {
  out[threadIdx.x + 1] = 0;
}

using Huge = float[20000];
__global__ void shared_hog(float* out) {
  CUDA_SHARED(Huge, values);
  values[threadIdx.x] = out[threadIdx.x];
}

struct Large {
  char bytes[32764];
};
__global__ void many_parameters(float*, Large) {}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, Arguments... arguments) {
  void* pointers[] = {&arguments...};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), pointers, 0, nullptr);
}

}  // namespace

int main(int count, char** names) {
  const char* name = count > 1 ? names[1] : "";
  const auto is = [&](const char* bug) { return strcmp(name, bug) == 0; };
  int blocks = 1;
  if (is("blocks that expect an order")) blocks = 8;
  float* out = static_cast<float*>(aligned_alloc(64, blocks * kThreads * sizeof(float)));
  memset(out, 0xff, blocks * kThreads * sizeof(float));
  cudaError_t error = cudaSuccess;
  if (is("none"))
    error = launch(correct, 1, out);
  else if (is("barrier in a branch"))
    error = launch(barrier_in_branch, 1, out);
  else if (is("two different barriers"))
    error = launch(two_barriers, 1, out);
  else if (is("barrier after an early return"))
    error = launch(barrier_after_return, 1, out);
  else if (is("lane outside the mask reads"))
    error = launch(left_out, 1, out);
  else if (is("shuffle from outside the mask"))
    error = launch(source_outside, 1, out);
  else if (is("lanes with different masks"))
    error = launch(different_masks, 1, out);
  else if (is("lane missing from a shuffle"))
    error = launch(missing_lane, 1, out);
  else if (is("missing barrier"))
    error = launch(missing_barrier, 1, out);
  else if (is("uninitialised shared memory"))
    error = launch(uninitialised, 1, out);
  else if (is("blocks that expect an order"))
    error = launch(ordered_blocks, blocks, out);
  else if (is("misaligned hinted access"))
    error = launch(misaligned_hint, 1, out);
  else if (is("misaligned vector access"))
    error = launch(misaligned_vector, 1, out);
  else if (is("out of bounds"))
    error = launch(out_of_bounds, 1, out);
  else if (is("too much shared memory"))
    error = launch(shared_hog, 1, out);
  else if (is("too many parameters"))
    error = launch(many_parameters, 1, out, Large{});
  else if (is("no blocks"))
    error = launch(correct, 0, out);
  else {
    printf("no bug is called '%s'\n", name);
    return 2;
  }
  if (error != cudaSuccess) {
    printf("%s\n", cudaGetErrorString(error));
    return 1;
  }
  int unexpected = 0;
  for (int i = 0; i < blocks * kThreads; ++i) unexpected += out[i] != kThreads - 1 - ((i % kThreads) ^ 1);
  free(out);
  if (unexpected > 0) {
    printf("%d unexpected values\n", unexpected);
    return 1;
  }
  printf("as expected\n");
}
