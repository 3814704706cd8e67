// How a warp walks its pieces of a row: many loads under way, the first of them before anything is waited for.
#pragma once

#include "memory.cuh"
#include "table.cuh"

namespace fsam::cuda {

// NOTE [blocks on a multiprocessor]
// Memory is busy while enough bytes are under way: what CUB keeps for its transforms is 32 KiB a multiprocessor on an
// H100, 48 on an H200, 64 on a B200 and 16 on an A100. A pass that reads few bytes for each parameter needs more
// threads for that, so it is compiled for as many blocks as it takes, at least two: that leaves 128 registers a thread.
// On a B200, too, these are 48 KiB: 64 would leave 32 registers to the norm of 16-bit gradients, which then spills.
// This is also why ASAM's norm, which reads the weights as well, is a kernel of its own: the registers for them would
// cost the others their blocks.
// sm_90 is both an H100 and an H200.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr int kBytesInFlight = 48 * 1024;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
constexpr int kBytesInFlight = 40 * 1024;
#else
constexpr int kBytesInFlight = 16 * 1024;
#endif
constexpr int kBlocksPerSm = 2;

template <class T, int kBytesPerParameter, int kGroups = kInFlight<T>>
constexpr int kBlocksFor = []() {
  constexpr int kBytes = kThreads * kGroup<T> * kGroups * kBytesPerParameter;
  constexpr int kNeeded = (kBytesInFlight + kBytes - 1) / kBytes;
  return kNeeded < kBlocksPerSm ? kBlocksPerSm : kNeeded;
}();
template <class M>
constexpr int kBytesOf = sizeof(M);
template <>
constexpr int kBytesOf<void> = 0;

// For work that sums nothing over a piece.
struct NoSums {
  __device__ __forceinline__ void end_piece() const {}
};

// NOTE [loads before scalars]
// What a pass multiplies by depends on numbers on the device, which one thread reads and turns into scalars for its
// block while the others wait. So every warp asks for its first elements before it waits: `ready` is called once, by
// all threads of a block, between the first loads and their use. Averages of eight bits and pass B of SAM on float64
// have no registers to keep elements in meanwhile, but at the price of their blocks: there `ready` comes first.
struct NothingToWaitFor {
  template <class Work>
  __device__ __forceinline__ bool operator()(Work&) const {
    return true;
  }
};

// Walks a warp's pieces. `work` is at a group of parameters of type T and has a type Loaded; it can
//   move(by)                         go on by a number of elements,
//   load(access, beyond, loaded)     ask for the group that lies `beyond` elements further, and
//   finish(access, beyond, loaded)   compute and store it;
//   end_piece()                      is called where one piece is behind and another ahead.
// ready(work) is called once, and where it returns false nothing is finished: so does this. kTogether: the lanes have
// to meet inside finish, so they all call it in step, those past the end with a group of no elements. Which lane takes
// which element does not depend on the alignment.
template <class T, int kGroups = kInFlight<T>, bool kTogether = false, bool kReadyFirst = false, class Work,
          class Ready>
__device__ __forceinline__ bool walk(const Piece& piece, bool aligned, Work& work, const Ready& ready) {
  constexpr int kStride = kWarp * kGroup<T>, kRound = kGroups * kStride, kUnit = kTogether ? kRound : kGroup<T>;
  static_assert(kPiece % kRound == 0);
  const int lane = threadIdx.x % kWarp, mine = lane * kGroup<T>;
  const int whole = aligned ? piece.n / kUnit * kUnit : 0;  // elements [0, whole) are walked in rounds
  int at = 0;                                               // the work is there, and this lane's is `mine` further
  work.move(mine);
  const auto in_round = [&](int k) { return kTogether ? at < whole : at + mine + k * kStride < whole; };
  const auto advance = [&](int by) {
    if (piece.large && ((at + by) & int(kChunk - 1)) == kPiece) {
      by += int(kChunk) - kPiece;
      if (at + by < piece.n) work.end_piece();
    }
    at += by;
    work.move(by);
  };
  if (kReadyFirst && !ready(work)) return false;
  for (bool first = !kReadyFirst; first || at < whole; first = false) {
    typename Work::Loaded loaded[kGroups];
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      if (in_round(k)) work.load(Whole{}, k * kStride, loaded[k]);
    }
    if (first && !ready(work)) return false;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      if (in_round(k)) work.finish(Whole{}, k * kStride, loaded[k]);
    }
    if (at < whole) advance(kRound);
  }
  // Group by group: what is not aligned, or the group in which an aligned row ends. One piece of code for both is a
  // fifth of all kernels' bytes.
  const bool one_by_one = kTogether || !aligned;
  const bool ends_here = whole < piece.n && whole / kGroup<T> % kWarp == lane;
  const int beyond = one_by_one ? 0 : whole - at - mine;
  for (bool more = one_by_one ? at < piece.n : ends_here; more; more = one_by_one && at < piece.n) {
    const int left = piece.n - (at + mine + beyond);
    const Part access{left <= 0 ? 0 : left < kGroup<T> ? left : kGroup<T>};
    typename Work::Loaded loaded;
    work.load(access, beyond, loaded);
    work.finish(access, beyond, loaded);
    if (one_by_one) advance(kStride);
  }
  return true;
}

// to = from, bit for bit; or rounded, where the masters of 16-bit parameters are copied.
template <class From, class To>
struct Copy : NoSums {
  const From* from;
  To* to;

  using Loaded = Pack<From, kGroup<To>>;
  __device__ __forceinline__ void move(int by) {
    from += by;
    to += by;
  }
  template <class Access>
  __device__ __forceinline__ void load(Access access, int beyond, Loaded& x) const {
    access.template load<Reuse::late>(from + beyond, x);
  }
  template <class Access>
  __device__ __forceinline__ void finish(Access access, int beyond, const Loaded& x) const {
    if constexpr (std::is_same_v<From, To>) {
      access.template store<Reuse::soon>(to + beyond, x);
    } else {
      Pack<To, kGroup<To>> low;
#pragma unroll
      for (int j = 0; j < kGroup<To>; ++j) narrow(x.v[j], low.v[j]);
      access.template store<Reuse::soon>(to + beyond, low);
    }
  }
};
template <class From, class To>
__device__ __forceinline__ void copy(const Piece& piece, const From* from, To* to) {
  Copy<From, To> work{{}, from, to};
  walk<To>(piece, is_aligned(from, to), work, NothingToWaitFor{});
}

}  // namespace fsam::cuda
