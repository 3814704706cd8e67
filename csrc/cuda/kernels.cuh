// The three passes as CUDA kernels over a table of tensors: plain pointers in, no torch.
//
// nvcc compiles this file for GPUs; the tests compile it, unmodified, with a host compiler against an emulation of
// CUDA (tests/cuda_emulation) and run it on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../average.h"
#include "../formulas.h"
#include "../storage.h"
#include "../tensor_table.h"
#include "arguments.h"

// The emulation hands out shared memory itself, so that it can poison what a block has not written.
#ifndef CUDA_SHARED
#define CUDA_SHARED(type, name) __shared__ type name
#endif

namespace fsam::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kBlocksPerSm = 2;  // at least: room for 128 registers a thread, see NOTE [groups of 16 bytes]

// ---- What a launch works on --------------------------------------------------------------------

// NOTE [one warp, one piece]
// A warp walks consecutive elements and never waits for another. In a large row the eight warps of
// a block take an eighth of a chunk each; a row of at most kWarpRow elements is the work of one
// warp, so that thousands of biases and norms do not cost a block each. Which of the two a row is
// depends on its size alone, and so does the order of every sum.
constexpr int kPiece = kChunk / kWarps;
constexpr int kWarpRow = 2048;

// NOTE [the table is a kernel parameter]
// The rows travel by value with the launch: no copy to the device, no pinned buffer that would have
// to outlive it, nothing for a CUDA graph to freeze but the pointers themselves. Since CUDA 12.1 a
// kernel takes 32,764 bytes of parameters. All of them are written for each launch, so models of few
// tensors (and flattened ones: a single row) use a small table.
template <int kRows>
struct Table {
  static constexpr int kCapacity = kRows;
  void* param[kRows];
  const void* grad[kRows];
  int64_t offset[kRows];       // of the row's slice in every flat buffer, in elements
  int64_t numel[kRows];        // never 0
  int32_t first_block[kRows];  // of a large row
  int32_t id[kRows];           // noise_norm, perturb: the row's first chunk; restore_adam: its number
  int32_t large;               // rows [0, large) are large, rows [large, rows) are the work of one warp
  int32_t rows;
  int32_t large_blocks;
};
constexpr int kSmallTable = 64;
constexpr int kLargeTable = 800;

// What one warp works on: n elements of a row of the table, from `begin` on.
struct Piece {
  int row;
  int64_t begin;
  int n;
};

template <class Rows>
__device__ __forceinline__ Piece piece_of(const Rows& table, int warp) {
  const int block = blockIdx.x;
  if (block >= table.large_blocks) {
    const int row = table.large + (block - table.large_blocks) * kWarps + warp;
    return row < table.rows ? Piece{row, 0, int(table.numel[row])} : Piece{0, 0, 0};
  }
  int row = 0;  // the last one whose first block is not after this one
  for (int after = table.large; after - row > 1;) {
    const int middle = (row + after) / 2;
    if (table.first_block[middle] <= block) {
      row = middle;
    } else {
      after = middle;
    }
  }
  const int64_t begin = int64_t(block - table.first_block[row]) * kChunk + warp * kPiece;
  const int64_t left = table.numel[row] - begin;
  return {row, begin, left <= 0 ? 0 : left < kPiece ? int(left) : kPiece};
}

__device__ __forceinline__ double value_of(const Number& number) {
  if (number.data == nullptr) return number.otherwise;
  return number.is_double ? *static_cast<const double*>(number.data) : *static_cast<const float*>(number.data);
}

// Whether an update is left out: the ascent or the scaler met a non-finite gradient.
template <class Arguments>
__device__ __forceinline__ bool skips(const Arguments& a) {
  return (a.stats != nullptr && !is_finite(a.stats[0])) || value_of(a.found_inf) != 0;
}

// ---- Storage types -----------------------------------------------------------------------------

// The GPU's own conversions where it has them: the bits of storage.h but for the payload of a NaN.
__device__ __forceinline__ float widen(float x) {
  return x;
}
__device__ __forceinline__ double widen(double x) {
  return x;
}
__device__ __forceinline__ float widen(bfloat16 x) {
  return widen_bfloat16(uint32_t(x.bits));
}
__device__ __forceinline__ float widen(half x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  return widen_half(uint32_t(x.bits));
#endif
}

__device__ __forceinline__ float widen(int8_t x) {
  return float(x);
}

__device__ __forceinline__ void narrow(float x, float& to) {
  to = x;
}
__device__ __forceinline__ void narrow(double x, double& to) {
  to = x;
}
__device__ __forceinline__ void narrow(float x, bfloat16& to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to.bits = uint16_t(narrow_bfloat16(x));
#endif
}
__device__ __forceinline__ void narrow(float x, half& to) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to.bits = uint16_t(narrow_half(x));
#endif
}

// ---- Memory ------------------------------------------------------------------------------------

// NOTE [groups of 16 bytes]
// A lane takes as many parameters at once as fill 16 bytes, the widest access there is, and their
// fp32 state with one or two more. A lane has the loads of kInFlight groups under way before it uses
// the first: 16 parameters (8 of fp64) keep enough bytes in flight at an occupancy of a quarter. Adam on fp64, with
// four operands of eight bytes, has registers for half of that.
constexpr int kAccess = 16;
template <class T>
constexpr int kGroup = kAccess / int(sizeof(T));
template <class T>
constexpr int kInFlight = sizeof(T) == 2 ? 2 : 4;

constexpr int alignment(int bytes) {
  return bytes < kAccess ? bytes : kAccess;
}
template <class E, int kCount>
struct alignas(alignment(int(sizeof(E)) * kCount)) Pack {
  E v[kCount];
};
// What moves a pack at once. Only averages that are narrower than the arithmetic fill less than 16 bytes.
template <int kBytes>
struct WordOf {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};

// NOTE [cache hints]
// `soon`: read again by the next pass over the model or by the forward pass (g, m, w in pass A, which
// writes none of them; the weights that B and C write), worth keeping in the L2. `late`: not touched before all of the
// model has gone by, so it should leave the L2 first. Both are spelled as intrinsics: nvcc may split an ordinary copy
// of 16 bytes into words and not put it together again.
enum class Reuse { soon, late };

template <Reuse kReuse, class E, int kCount>
__device__ __forceinline__ void load_vector(const E* p, Pack<E, kCount>& to) {
  using Word = typename WordOf<int(sizeof to)>::type;
  const Word* from = reinterpret_cast<const Word*>(p);
  Word* words = reinterpret_cast<Word*>(&to);
#pragma unroll
  for (int i = 0; i < int(sizeof to / sizeof(Word)); ++i) {
    words[i] = kReuse == Reuse::late ? __ldcs(from + i) : __ldg(from + i);
  }
}
template <Reuse kReuse, class E, int kCount>
__device__ __forceinline__ void store_vector(E* p, const Pack<E, kCount>& from) {
  using Word = typename WordOf<int(sizeof from)>::type;
  Word* to = reinterpret_cast<Word*>(p);
  const Word* words = reinterpret_cast<const Word*>(&from);
#pragma unroll
  for (int i = 0; i < int(sizeof from / sizeof(Word)); ++i) {
    if constexpr (kReuse == Reuse::late) {
      __stcs(to + i, words[i]);
    } else {
      __stwb(to + i, words[i]);
    }
  }
}
template <class E, int kCount>
__device__ __forceinline__ void load_elements(const E* p, int count, Pack<E, kCount>& to) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) to.v[j] = j < count ? p[j] : E{};
}
template <class E, int kCount>
__device__ __forceinline__ void store_elements(E* p, int count, const Pack<E, kCount>& from) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (j < count) p[j] = from.v[j];
  }
}

__device__ __forceinline__ bool is_aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % kAccess == 0;
}

// How a group is reached. Whole: it is complete and every pointer is aligned.
struct Whole {
  template <Reuse kReuse, class E, int kCount>
  __device__ __forceinline__ void load(const E* p, Pack<E, kCount>& to) const {
    load_vector<kReuse>(p, to);
  }
  template <Reuse kReuse, class E, int kCount>
  __device__ __forceinline__ void store(E* p, const Pack<E, kCount>& from) const {
    store_vector<kReuse>(p, from);
  }
  __device__ __forceinline__ bool has(int) const { return true; }
};

// Part: the row ends inside the group, or some pointer is misaligned; the others still move 16 bytes at once.
struct Part {
  int count;

  template <Reuse kReuse, class E, int kCount>
  __device__ __forceinline__ void load(const E* p, Pack<E, kCount>& to) const {
    if (count == kCount && is_aligned(p)) {
      load_vector<kReuse>(p, to);
    } else {
      load_elements(p, count, to);
    }
  }
  template <Reuse kReuse, class E, int kCount>
  __device__ __forceinline__ void store(E* p, const Pack<E, kCount>& from) const {
    if (count == kCount && is_aligned(p)) {
      store_vector<kReuse>(p, from);
    } else {
      store_elements(p, count, from);
    }
  }
  __device__ __forceinline__ bool has(int j) const { return j < count; }
};

// Walks n elements with the lanes of one warp. `work` has a type Loaded and, for the group of parameters of type T
// that starts at element `at`, load(access, at, loaded) and finish(access, at, loaded). Which lane takes which element
// does not depend on the alignment.
template <class T, int kGroups = kInFlight<T>, class Work>
__device__ __forceinline__ void walk(int n, bool aligned, Work& work) {
  constexpr int kStride = kWarp * kGroup<T>;
  const int lane = threadIdx.x % kWarp;
  int at = lane * kGroup<T>;
  if (aligned) {
    const int whole = n / kGroup<T> * kGroup<T>;
    for (; at < whole; at += kGroups * kStride) {
      typename Work::Loaded loaded[kGroups];
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        if (at + k * kStride < whole) work.load(Whole{}, at + k * kStride, loaded[k]);
      }
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        if (at + k * kStride < whole) work.finish(Whole{}, at + k * kStride, loaded[k]);
      }
    }
    at = whole / kGroup<T> % kWarp == lane ? whole : n;  // the group in which the row ends
  }
  for (; at < n; at += kStride) {
    const Part part{n - at < kGroup<T> ? n - at : kGroup<T>};
    typename Work::Loaded loaded;
    work.load(part, at, loaded);
    work.finish(part, at, loaded);
  }
}

// NOTE [blocks on a multiprocessor]
// Memory is busy while enough bytes are under way: 44 KB a multiprocessor on the fastest GPU there is
// (bench/cuda_check.py, NOTE [bytes in flight]). A pass that reads few bytes for each parameter needs more threads for
// that, so it is compiled for as many blocks as it takes, at least two. That is why ASAM's norm, which reads the
// weights as well, is a kernel of its own: the registers for them would cost the others their blocks.
template <class T, int kBytesPerParameter>
constexpr int kBlocksFor = []() {
  constexpr int kBytes = kThreads * kGroup<T> * kInFlight<T> * kBytesPerParameter;
  constexpr int kNeeded = (44 * 1024 + kBytes - 1) / kBytes;
  return kNeeded < kBlocksPerSm ? kBlocksPerSm : kNeeded;
}();
template <class M>
constexpr int kBytesOf = sizeof(M);
template <>
constexpr int kBytesOf<void> = 0;

// As walk, for work whose lanes have to meet inside finish: they all call it in step, those past the end with a group
// of no elements.
template <class T, int kGroups = kInFlight<T>, class Work>
__device__ __forceinline__ void walk_together(int n, bool aligned, Work& work) {
  constexpr int kStride = kWarp * kGroup<T>;
  int at = threadIdx.x % kWarp * kGroup<T>;
  int left = n;  // for the warp
  if (aligned) {
    for (; left >= kGroups * kStride; left -= kGroups * kStride, at += kGroups * kStride) {
      typename Work::Loaded loaded[kGroups];
#pragma unroll
      for (int k = 0; k < kGroups; ++k) work.load(Whole{}, at + k * kStride, loaded[k]);
#pragma unroll
      for (int k = 0; k < kGroups; ++k) work.finish(Whole{}, at + k * kStride, loaded[k]);
    }
  }
  for (; left > 0; left -= kStride, at += kStride) {
    const Part part{n <= at ? 0 : n - at < kGroup<T> ? n - at : kGroup<T>};
    typename Work::Loaded loaded;
    work.load(part, at, loaded);
    work.finish(part, at, loaded);
  }
}

// to = from, bit for bit; or rounded, where the masters of 16-bit parameters are copied.
template <class From, class To>
struct Copy {
  const From* from;
  To* to;

  using Loaded = Pack<From, kGroup<To>>;
  template <class Access>
  __device__ __forceinline__ void load(Access access, int at, Loaded& x) const {
    access.template load<Reuse::late>(from + at, x);
  }
  template <class Access>
  __device__ __forceinline__ void finish(Access access, int at, const Loaded& x) const {
    if constexpr (std::is_same_v<From, To>) {
      access.template store<Reuse::soon>(to + at, x);
    } else {
      Pack<To, kGroup<To>> low;
#pragma unroll
      for (int j = 0; j < kGroup<To>; ++j) narrow(x.v[j], low.v[j]);
      access.template store<Reuse::soon>(to + at, low);
    }
  }
};
template <class From, class To>
__device__ __forceinline__ void copy(const From* from, To* to, int n) {
  Copy<From, To> work{from, to};
  walk<To>(n, is_aligned(from) && is_aligned(to), work);
}

// ---- The average -------------------------------------------------------------------------------

// A group of an average as it was loaded: of type M for parameters of type T.
template <class T, class M>
struct AveragePack {
  Pack<M, kGroup<T>> v;
  float scale;
};
template <class T>
struct AveragePack<T, void> {};

template <Reuse kReuse, class T, class M, class Access>
__device__ __forceinline__ void load_average(Access access, const AverageSlice<M>& ema, int at, AveragePack<T, M>& x) {
  if constexpr (has_average<M>) access.template load<kReuse>(ema.data + at, x.v);
  if constexpr (is_quantized<M>) x.scale = access.has(0) ? ema.scales[at / int(kQuantized)] : 0.0f;
}
template <class T, class M>
__device__ __forceinline__ compute_t<T> average_at(const AveragePack<T, M>& x, int j) {
  if constexpr (is_quantized<M>) {
    return widen(x.v.v[j]) * x.scale;
  } else if constexpr (has_average<M>) {
    return widen(x.v.v[j]);
  } else {
    return 0;
  }
}

// Stores a group of new averages. Quantized, the lanes that share a block agree on its scale first.
template <class T, class M, class Access>
__device__ __forceinline__ void store_average(Access access, const AverageSlice<M>& ema, int at,
                                              const compute_t<T> (&fresh)[kGroup<T>]) {
  if constexpr (is_quantized<M>) {
    constexpr int kLanes = int(kQuantized) / kGroup<T>;
    float largest = 0;
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) {
      const float magnitude = fabsf(known(fresh[j]));
      if (access.has(j) && magnitude > largest) largest = magnitude;
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, largest, distance);
      largest = other > largest ? other : largest;
    }
    const float scale = quantization_scale(largest), inverse = inverse_quantization_scale(scale);
    Pack<M, kGroup<T>> packed;
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) packed.v[j] = M(quantized(known(fresh[j]), inverse));
    access.template store<Reuse::late>(ema.data + at, packed);
    if (access.has(0) && at % int(kQuantized) == 0) ema.scales[at / int(kQuantized)] = scale;
  } else if constexpr (has_average<M>) {
    Pack<M, kGroup<T>> packed;
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) narrow(fresh[j], packed.v[j]);
    access.template store<Reuse::late>(ema.data + at, packed);
  }
}

// Walks a piece with work that loads and stores an average of type M.
template <class T, class M, class Work>
__device__ __forceinline__ void walk_averages(int n, bool aligned, Work& work) {
  if constexpr (is_quantized<M>) {
    walk_together<T>(n, aligned, work);
  } else {
    walk<T>(n, aligned, work);
  }
}

// ---- Pass A ------------------------------------------------------------------------------------

template <class T, class M, bool kAdaptive>
struct NoiseNorm {
  using S = compute_t<T>;
  const T* w;
  const T* g;
  AverageSlice<M> ema;
  AscentScalars<S> s;
  Statistics<S> sums;

  struct Loaded {
    Pack<T, kGroup<T>> w, g;
    AveragePack<T, M> ema;
  };
  template <class Access>
  __device__ __forceinline__ void load(Access access, int at, Loaded& x) const {
    access.template load<Reuse::soon>(g + at, x.g);
    load_average<Reuse::soon>(access, ema, at, x.ema);
    if constexpr (kAdaptive) access.template load<Reuse::soon>(w + at, x.w);
  }
  template <class Access>
  __device__ __forceinline__ void finish(Access access, int, const Loaded& x) {
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) {
      if (!access.has(j)) continue;
      S weight(0);
      if constexpr (kAdaptive) weight = widen(x.w.v[j]);
      accumulate<has_average<M>>(sums, weight, S(widen(x.g.v[j])), average_at<T, M>(x.ema, j), s);
    }
  }
};

template <class S>
__device__ __forceinline__ S warp_sum(S x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    x = x + __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

// Sums each chunk into a slot of its own, to[chunk * per_chunk + k * per_sum]. See NOTE [chunks are fixed].
template <int kCount, class S, class Rows>
__device__ __forceinline__ void store_sums(const Rows& table, const Piece& piece, const S (&sums)[kCount],
                                           S (&warp_sums)[kCount][kWarps], S* to, int64_t per_chunk, int64_t per_sum) {
  const int block = blockIdx.x, thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  S* slot = to + table.id[piece.row] * per_chunk;
  if (block >= table.large_blocks) {
    if (lane == 0 && piece.n > 0) {
      for (int k = 0; k < kCount; ++k) slot[k * per_sum] = sums[k];
    }
    return;
  }
  if (lane == 0) {
    for (int k = 0; k < kCount; ++k) warp_sums[k][warp] = sums[k];
  }
  __syncthreads();
  if (thread < kCount) {
    S sum = warp_sums[thread][0];
    for (int i = 1; i < kWarps; ++i) sum = sum + warp_sums[thread][i];
    slot[thread * per_sum + (block - table.first_block[piece.row]) * per_chunk] = sum;
  }
}

template <class T, class M, bool kAdaptive, class Rows>
__global__ void __launch_bounds__(kThreads, kBlocksFor<T, int(sizeof(T)) * (kAdaptive ? 2 : 1) + kBytesOf<M>>)
    noise_norm_kernel(const Rows __grid_constant__ table, const NoiseNormArguments<compute_t<T>> a) {
  using S = compute_t<T>;
  using Scalars = AscentScalars<S>;
  using WarpSums = S[kStatistics][kWarps];
  CUDA_SHARED(Scalars, scalars);
  CUDA_SHARED(WarpSums, warp_sums);
  if (threadIdx.x == 0) {
    scalars = ascent_scalars<S>(1.0 / value_of(a.grad_scale), a.sigma, a.lmbda, 0.0, kAdaptive, a.updated);
  }
  __syncthreads();

  const Piece piece = piece_of(table, threadIdx.x / kWarp);
  const T* w = static_cast<const T*>(table.param[piece.row]) + piece.begin;
  const T* g = static_cast<const T*>(table.grad[piece.row]) + piece.begin;
  const AverageSlice<M> ema = slice_of<M>(a.ema, table.offset[piece.row] + piece.begin);
  const bool aligned = is_aligned(g) && is_aligned(ema.data) && (!kAdaptive || is_aligned(w));
  NoiseNorm<T, M, kAdaptive> work{w, g, ema, scalars, {}};
  walk<T>(piece.n, aligned, work);

  const S sums[kStatistics] = {warp_sum(work.sums.noise_sq), warp_sum(work.sums.grad_sq),
                               warp_sum(work.sums.grad_dot_ema), warp_sum(work.sums.ema_sq),
                               warp_sum(work.sums.nonfinite)};
  store_sums(table, piece, sums, warp_sums, a.slots, 1, a.chunks);
}

// stats = the sums of the slots in fp64, a block for each statistic.
constexpr int kSumThreads = 512;

template <class S>
__global__ void __launch_bounds__(kSumThreads) sum_slots_kernel(const S* slots, int64_t chunks, double* stats) {
  using WarpSums = double[kSumThreads / kWarp];
  CUDA_SHARED(WarpSums, warp_sums);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const S* mine = slots + blockIdx.x * chunks;
  double sum = 0;
#pragma unroll 16
  for (int64_t i = thread; i < chunks; i += kSumThreads) sum += double(mine[i]);
  sum = warp_sum(sum);
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = warp_sum(lane < kSumThreads / kWarp ? warp_sums[lane] : 0.0);
    if (lane == 0) stats[blockIdx.x] = sum;
  }
}

// ---- Pass B ------------------------------------------------------------------------------------

// What the forward pass sees of a weight.
__device__ __forceinline__ double seen(double weight, Forward) {
  return weight;
}
__device__ __forceinline__ float seen(float weight, Forward forward) {
  if (forward == Forward::bfloat16) {
    bfloat16 low;
    narrow(weight, low);
    return widen(low);
  }
  if (forward == Forward::half) {
    half low;
    narrow(weight, low);
    return widen(low);
  }
  return weight;
}

template <class T, class M, bool kMaster>
struct Perturb {
  using S = compute_t<T>;
  T* w;
  const T* g;
  AverageSlice<M> ema;
  T* backup;
  const S* master;
  AscentScalars<S> s;
  bool feeds, measures;
  Forward forward;
  Effect<S> effect;

  struct Loaded {
    Pack<std::conditional_t<kMaster, S, T>, kGroup<T>> w;
    Pack<T, kGroup<T>> g;
    AveragePack<T, M> ema;
  };
  template <class Access>
  __device__ __forceinline__ void load(Access access, int at, Loaded& x) const {
    if constexpr (kMaster) {
      access.template load<Reuse::late>(master + at, x.w);
    } else {
      access.template load<Reuse::late>(w + at, x.w);
    }
    access.template load<Reuse::late>(g + at, x.g);
    load_average<Reuse::late>(access, ema, at, x.ema);
  }
  template <class Access>
  __device__ __forceinline__ void finish(Access access, int at, Loaded& x) {
    if constexpr (!kMaster) access.template store<Reuse::late>(backup + at, x.w);
    Pack<T, kGroup<T>> after;
    S fresh[kGroup<T>];
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) {
      const S start = widen(x.w.v[j]);
      const S gradient = widen(x.g.v[j]) * s.inverse_scale;
      const S average = average_at<T, M>(x.ema, j);
      const S intended = perturbation(start, noise<has_average<M>>(gradient, average, s), s);
      narrow(start + intended, after.v[j]);
      if (measures && access.has(j)) {
        S before = start;
        if constexpr (kMaster) {
          T low;
          narrow(start, low);
          before = widen(low);
        }
        accumulate(effect, seen(S(widen(after.v[j])), forward) - seen(before, forward), intended);
      }
      fresh[j] = ema_update(average, gradient, s.lmbda, s.one_minus_lmbda);
    }
    access.template store<Reuse::soon>(w + at, after);
    if (feeds) store_average<T, M>(access, ema, at, fresh);
  }
};

template <class S>
struct PerturbPrologue {
  AscentScalars<S> scalars;
  bool finite;
};

template <class T, class M, bool kMaster, class Rows>
__global__ void __launch_bounds__(kThreads,
                                  kBlocksFor<T, (kMaster ? 4 : int(sizeof(T))) + int(sizeof(T)) + kBytesOf<M>>)
    perturb_kernel(const Rows __grid_constant__ table, const PerturbArguments<T> a) {
  using S = compute_t<T>;
  using Prologue = PerturbPrologue<S>;
  using WarpSums = S[kEffect][kWarps];
  CUDA_SHARED(Prologue, prologue);
  CUDA_SHARED(WarpSums, warp_sums);
  if (threadIdx.x == 0) {
    const double noise_sq = a.stats[0];
    prologue.scalars =
        ascent_scalars<S>(1.0 / value_of(a.grad_scale), a.sigma, a.lmbda,
                          perturbation_step_length(noise_sq, value_of(a.rho), a.eps), a.adaptive, a.updated);
    prologue.finite = is_finite(noise_sq);
  }
  __syncthreads();

  const Piece piece = piece_of(table, threadIdx.x / kWarp);
  const int64_t in_buffer = table.offset[piece.row] + piece.begin;
  T* w = static_cast<T*>(table.param[piece.row]) + piece.begin;
  const T* g = static_cast<const T*>(table.grad[piece.row]) + piece.begin;
  const AverageSlice<M> ema = slice_of<M>(a.ema, in_buffer);
  T* backup = kMaster ? nullptr : a.backup + in_buffer;
  const S* master = kMaster ? a.master + in_buffer : nullptr;
  const bool measures = a.effect != nullptr;
  Perturb<T, M, kMaster> work{w, g, ema, backup, master, prologue.scalars, a.feeds, measures, a.forward, {}};
  if (prologue.finite) {
    const bool aligned =
        is_aligned(w) && is_aligned(g) && is_aligned(ema.data) && is_aligned(backup) && is_aligned(master);
    walk_averages<T, M>(piece.n, aligned, work);
  } else if (!kMaster) {
    copy<T, T>(w, backup, piece.n);
  }
  if (measures) {
    const S sums[kEffect] = {warp_sum(work.effect.effective_sq), warp_sum(work.effect.effective_dot_intended),
                             warp_sum(work.effect.intended_sq)};
    // The piece is found again: its registers are worth more during the walk.
    store_sums(table, piece_of(table, threadIdx.x / kWarp), sums, warp_sums, a.effect, kEffect, 1);
  }
}

// ---- The average without an ascent ---------------------------------------------------------------

template <class T, class M>
struct UpdateEma {
  using S = compute_t<T>;
  const T* g;
  AverageSlice<M> ema;
  AscentScalars<S> s;

  struct Loaded {
    Pack<T, kGroup<T>> g;
    AveragePack<T, M> ema;
  };
  template <class Access>
  __device__ __forceinline__ void load(Access access, int at, Loaded& x) const {
    access.template load<Reuse::soon>(g + at, x.g);
    load_average<Reuse::late>(access, ema, at, x.ema);
  }
  template <class Access>
  __device__ __forceinline__ void finish(Access access, int at, const Loaded& x) const {
    S fresh[kGroup<T>];
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) {
      fresh[j] = fed(average_at<T, M>(x.ema, j), S(widen(x.g.v[j])), s.inverse_scale, s.lmbda, s.one_minus_lmbda);
    }
    store_average<T, M>(access, ema, at, fresh);
  }
};

template <class T, class M, class Rows>
__global__ void __launch_bounds__(kThreads, kBlocksFor<T, int(sizeof(T)) + kBytesOf<M>>)
    update_ema_kernel(const Rows __grid_constant__ table, const UpdateEmaArguments a) {
  using S = compute_t<T>;
  using Scalars = AscentScalars<S>;
  CUDA_SHARED(Scalars, scalars);
  if (threadIdx.x == 0) {
    scalars = ascent_scalars<S>(1.0 / value_of(a.grad_scale), 0.0, a.lmbda, 0.0, false, false);
  }
  __syncthreads();
  if (skips(a)) return;
  const Piece piece = piece_of(table, threadIdx.x / kWarp);
  const T* g = static_cast<const T*>(table.grad[piece.row]) + piece.begin;
  UpdateEma<T, M> work{g, slice_of<M>(a.ema, table.offset[piece.row] + piece.begin), scalars};
  walk_averages<T, M>(piece.n, is_aligned(g) && is_aligned(work.ema.data), work);
}

// ---- Pass C ------------------------------------------------------------------------------------

// w = the saved weights: a copy of them, or the masters, rounded: what w was.
template <class T, bool kMaster>
__device__ __forceinline__ void restore(T* w, const T* backup, const compute_t<T>* master, int n) {
  if constexpr (kMaster) {
    copy(master, w, n);
  } else if (backup != nullptr) {
    copy(backup, w, n);
  }
}

template <class T, bool kMaster, class Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    restore_kernel(const Rows __grid_constant__ table, const RestoreArguments<T> a) {
  const Piece piece = piece_of(table, threadIdx.x / kWarp);
  const int64_t in_buffer = table.offset[piece.row] + piece.begin;
  restore<T, kMaster>(static_cast<T*>(table.param[piece.row]) + piece.begin, kMaster ? nullptr : a.backup + in_buffer,
                      kMaster ? a.master + in_buffer : nullptr, piece.n);
}

// Where the base updates take weights from and how they give them back.
template <class T, bool kMaster>
struct Weights {
  using S = compute_t<T>;
  T* w;
  const T* from;  // a backup, or w itself
  S* master;
  bool stochastic;
  uint32_t key;
  int64_t position;  // of the piece, in the flat state

  using Loaded = Pack<std::conditional_t<kMaster, S, T>, kGroup<T>>;
  __device__ __forceinline__ bool aligned() const {
    return is_aligned(w) && (kMaster ? is_aligned(master) : is_aligned(from));
  }
  template <class Access>
  __device__ __forceinline__ void load(Access access, int at, Loaded& x) const {
    if constexpr (kMaster) {
      access.template load<Reuse::late>(master + at, x);
    } else {
      access.template load<Reuse::late>(from + at, x);
    }
  }
  template <class Access>
  __device__ __forceinline__ void store(Access access, int at, const S (&updated)[kGroup<T>]) const {
    Pack<T, kGroup<T>> low;
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) narrow(updated[j], low.v[j]);
    if constexpr (sizeof(T) == 2 && !kMaster) {
      if (stochastic) {
        const int64_t start = position + at;
        const uint32_t group_key = rounding_key_of(key, start);
#pragma unroll
        for (int j = 0; j < kGroup<T>; ++j) {
          const uint32_t random = random_bits(uint32_t(start) + uint32_t(j), group_key);
          if constexpr (std::is_same_v<T, bfloat16>) {
            low.v[j].bits = uint16_t(narrow_bfloat16_stochastically(updated[j], random));
          } else {
            low.v[j].bits = uint16_t(narrow_half_stochastically(updated[j], random));
          }
        }
      }
    }
    if constexpr (kMaster) {
      Loaded full;
#pragma unroll
      for (int j = 0; j < kGroup<T>; ++j) full.v[j] = updated[j];
      access.template store<Reuse::late>(master + at, full);
    }
    access.template store<Reuse::soon>(w + at, low);
  }
};

template <class T, bool kMaster, class Rows>
__device__ __forceinline__ Weights<T, kMaster> weights_of(const Rows& table, const Piece& piece,
                                                          const UpdateArguments<T>& a, uint32_t key) {
  const int64_t in_buffer = table.offset[piece.row] + piece.begin;
  T* w = static_cast<T*>(table.param[piece.row]) + piece.begin;
  return {w,
          a.backup == nullptr ? w : a.backup + in_buffer,
          kMaster ? a.master + in_buffer : nullptr,
          a.rounding != nullptr,
          key,
          in_buffer};
}

template <class T>
__device__ __forceinline__ uint32_t key_of(const UpdateArguments<T>& a) {
  return a.rounding == nullptr ? 0 : rounding_key(uint64_t(a.rounding[0]), uint64_t(a.rounding[1]));
}

template <class T, bool kMaster, bool kMomentum>
struct RestoreSgd {
  using S = compute_t<T>;
  Weights<T, kMaster> weights;
  const T* g;
  S* momentum_buffer;
  SgdScalars<S> s;

  struct Loaded {
    typename Weights<T, kMaster>::Loaded w;
    Pack<T, kGroup<T>> g;
    Pack<S, kGroup<T>> momentum_buffer;
  };
  template <class Access>
  __device__ __forceinline__ void load(Access access, int at, Loaded& x) const {
    weights.load(access, at, x.w);
    access.template load<Reuse::late>(g + at, x.g);
    if constexpr (kMomentum) access.template load<Reuse::late>(momentum_buffer + at, x.momentum_buffer);
  }
  template <class Access>
  __device__ __forceinline__ void finish(Access access, int at, Loaded& x) const {
    S updated[kGroup<T>];
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) {
      S buffer(0);
      if constexpr (kMomentum) buffer = x.momentum_buffer.v[j];
      updated[j] = sgd<kMomentum>(S(widen(x.w.v[j])), S(widen(x.g.v[j])), buffer, s);
      if constexpr (kMomentum) x.momentum_buffer.v[j] = buffer;
    }
    weights.store(access, at, updated);
    if constexpr (kMomentum) access.template store<Reuse::late>(momentum_buffer + at, x.momentum_buffer);
  }
};

template <class S>
struct SgdPrologue {
  SgdScalars<S> scalars;
  uint32_t key;
  bool skip;
};

template <class T, bool kMaster, bool kMomentum, class Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    restore_sgd_kernel(const Rows __grid_constant__ table, const SgdArguments<T> a) {
  using S = compute_t<T>;
  using Prologue = SgdPrologue<S>;
  CUDA_SHARED(Prologue, prologue);
  if (threadIdx.x == 0) {
    prologue.scalars = sgd_scalars<S>(1.0 / value_of(a.update.grad_scale), value_of(a.update.lr), a.momentum,
                                      a.dampening, a.weight_decay, a.nesterov, a.maximize);
    prologue.key = key_of(a.update);
    prologue.skip = skips(a.update);
  }
  __syncthreads();

  const Piece piece = piece_of(table, threadIdx.x / kWarp);
  const Weights<T, kMaster> weights = weights_of<T, kMaster>(table, piece, a.update, prologue.key);
  if (prologue.skip) {
    restore<T, kMaster>(weights.w, a.update.backup == nullptr ? nullptr : weights.from, weights.master, piece.n);
    return;
  }
  const T* g = static_cast<const T*>(table.grad[piece.row]) + piece.begin;
  S* momentum_buffer = kMomentum ? a.momentum_buffer + weights.position : nullptr;
  RestoreSgd<T, kMaster, kMomentum> work{weights, g, momentum_buffer, prologue.scalars};
  walk<T>(piece.n, weights.aligned() && is_aligned(g) && is_aligned(momentum_buffer), work);
}

// NOTE [steps are counted once]
// A thread for each parameter of a segment: one more step unless the update is left out, and for those that start a row
// the two powers of its bias corrections. Here they cost two powers a row; in pass C every block would wait for them.
constexpr int kCountThreads = 128;

template <class S>
__global__ void __launch_bounds__(kCountThreads) count_steps_kernel(const CountArguments<S> a) {
  const int64_t i = int64_t(blockIdx.x) * kCountThreads + threadIdx.x;
  if (i >= a.members) return;
  float* step = a.steps + a.index[i];
  const float count = skips(a) ? *step : *step + 1.0f;
  *step = count;
  if (i < a.rows) a.corrections[i] = bias_correction<S>(value_of(a.lr), a.beta1, a.beta2, double(count));
}

template <class T, bool kMaster>
struct RestoreAdam {
  using S = compute_t<T>;
  Weights<T, kMaster> weights;
  const T* g;
  S* exp_avg;
  S* exp_avg_sq;
  AdamScalars<S> s;
  BiasCorrection<S> correction;

  struct Loaded {
    typename Weights<T, kMaster>::Loaded w;
    Pack<T, kGroup<T>> g;
    Pack<S, kGroup<T>> exp_avg, exp_avg_sq;
  };
  template <class Access>
  __device__ __forceinline__ void load(Access access, int at, Loaded& x) const {
    weights.load(access, at, x.w);
    access.template load<Reuse::late>(g + at, x.g);
    access.template load<Reuse::late>(exp_avg + at, x.exp_avg);
    access.template load<Reuse::late>(exp_avg_sq + at, x.exp_avg_sq);
  }
  template <class Access>
  __device__ __forceinline__ void finish(Access access, int at, Loaded& x) const {
    S updated[kGroup<T>];
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) {
      updated[j] = adam(S(widen(x.w.v[j])), S(widen(x.g.v[j])), x.exp_avg.v[j], x.exp_avg_sq.v[j], s, correction);
    }
    weights.store(access, at, updated);
    access.template store<Reuse::late>(exp_avg + at, x.exp_avg);
    access.template store<Reuse::late>(exp_avg_sq + at, x.exp_avg_sq);
  }
};

template <class S>
struct AdamPrologue {
  AdamScalars<S> scalars;
  uint32_t key;
  bool skip;
};

template <class T, bool kMaster, class Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    restore_adam_kernel(const Rows __grid_constant__ table, const AdamArguments<T> a) {
  using S = compute_t<T>;
  using Prologue = AdamPrologue<S>;
  CUDA_SHARED(Prologue, prologue);
  if (threadIdx.x == 0) {
    prologue.scalars = adam_scalars<S>(1.0 / value_of(a.update.grad_scale), value_of(a.update.lr), a.beta1, a.beta2,
                                       a.eps, a.weight_decay, a.decoupled, a.maximize);
    prologue.key = key_of(a.update);
    prologue.skip = skips(a.update);
  }
  __syncthreads();

  const Piece piece = piece_of(table, threadIdx.x / kWarp);
  const Weights<T, kMaster> weights = weights_of<T, kMaster>(table, piece, a.update, prologue.key);
  if (prologue.skip) {
    restore<T, kMaster>(weights.w, a.update.backup == nullptr ? nullptr : weights.from, weights.master, piece.n);
    return;
  }
  const T* g = static_cast<const T*>(table.grad[piece.row]) + piece.begin;
  S* exp_avg = a.exp_avg + weights.position;
  S* exp_avg_sq = a.exp_avg_sq + weights.position;
  const bool aligned = weights.aligned() && is_aligned(g) && is_aligned(exp_avg) && is_aligned(exp_avg_sq);
  RestoreAdam<T, kMaster> work{weights, g, exp_avg, exp_avg_sq, prologue.scalars, a.corrections[table.id[piece.row]]};
  walk<T, sizeof(T) == 8 ? 2 : kInFlight<T>>(piece.n, aligned, work);
}

}  // namespace fsam::cuda
