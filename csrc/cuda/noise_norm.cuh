// Pass A: the norm of the noise, chunk by chunk, and then the sum over the chunks.
#pragma once

#include "average.cuh"
#include "scalars.cuh"
#include "sums.cuh"

namespace fsam::cuda {

template <class T, class M, bool kAdaptive>
struct NoiseNorm {
  using S = compute_t<T>;
  const T* w;
  const T* g;
  AveragePlace<M> ema;
  AscentScalars<S> s;
  Statistics<S> sums;
  PieceSums<kStatistics, S> pieces;

  struct Loaded {
    Pack<T, kGroup<T>> w, g;
    AveragePack<T, M> ema;
  };
  __device__ __forceinline__ void move(int by) {
    if constexpr (kAdaptive) w += by;
    g += by;
    ema.move(by);
  }
  template <class Access>
  __device__ __forceinline__ void load(Access access, int beyond, Loaded& x) const {
    access.template load<Reuse::soon>(g + beyond, x.g);
    load_average<Reuse::soon>(access, ema, beyond, x.ema);
    if constexpr (kAdaptive) access.template load<Reuse::soon>(w + beyond, x.w);
  }
  template <class Access>
  __device__ __forceinline__ void finish(Access access, int, const Loaded& x) {
    // What is the same for a group is decided once: most have no unset average and no gradient that is not finite.
    const auto gradient = [&](int j) { return unscaled(S(widen_at(x.g, j)), s.inverse_scale); };
    S probe(0);  // NaN where an average is
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) probe = probe + average_at<T, M>(x.ema, j);
    const bool set = !s.updated && !is_nan(probe);
    AscentScalars<S> scalars = s;
    scalars.adaptive = kAdaptive;
    for_flag(!has_average<M> || set, [&](auto known_set) {
      constexpr bool kSet = decltype(known_set)::value;
      if constexpr (kSet) scalars.updated = false;
#pragma unroll
      for (int j = 0; j < kGroup<T>; ++j) {
        if (!access.has(j)) continue;
        S weight(0);
        if constexpr (kAdaptive) weight = widen_at(x.w, j);
        accumulate_products<has_average<M>, kSet>(sums, weight, gradient(j), average_at<T, M>(x.ema, j), scalars);
      }
    });
    if (!is_finite(sums.grad_sq)) {
#pragma unroll
      for (int j = 0; j < kGroup<T>; ++j) {
        if (access.has(j)) count_nonfinite(sums, gradient(j));
      }
    }
  }
  // The sums of the piece, which start anew.
  __device__ __forceinline__ void end_piece() {
    pieces.end_piece({sums.noise_sq, sums.grad_sq, sums.grad_dot_ema, sums.ema_sq, sums.nonfinite});
    sums = {};
  }
};

template <class T, class M, bool kAdaptive, class Rows>
__global__ void __launch_bounds__(kThreads, kBlocksFor<T, int(sizeof(T)) * (kAdaptive ? 2 : 1) + kBytesOf<M>>)
    noise_norm_kernel(const Rows __grid_constant__ table, const NoiseNormArguments<compute_t<T>> a) {
  using S = compute_t<T>;
  using Scalars = AscentScalars<S>;
  using PassSums = BlockSums<kStatistics, S>;
  CUDA_SHARED(Scalars, scalars);
  CUDA_SHARED(PassSums, block_sums);
  const Piece piece = piece_of(table, threadIdx.x / kWarp);
  const T* w = static_cast<const T*>(table.param[piece.row]) + piece.begin;
  const T* g = static_cast<const T*>(table.grad[piece.row]) + piece.begin;
  const AverageSlice<M> ema = slice_of<M>(a.ema, table.offset[piece.row] + piece.begin);
  NoiseNorm<T, M, kAdaptive> work{w, g, {ema}, {}, {}, {&block_sums}};
  const auto ready = [&](auto& walked) {
    if (threadIdx.x == 0) {
      scalars = ascent_scalars<S>(1.0 / value_of(a.grad_scale), a.sigma, a.lmbda, 0.0, kAdaptive, a.updated);
    }
    __syncthreads();
    walked.s = scalars;
    walked.s.updated = a.updated;  // from the arguments, where the compiler sees one value for all threads
    return true;
  };
  walk<T, kInFlight<T>, false, is_quantized<M>>(piece, is_aligned(g, ema.data) && (!kAdaptive || is_aligned(w)), work,
                                                ready);
  const Statistics<S>& sums = work.sums;
  work.pieces.store(table, piece, {sums.noise_sq, sums.grad_sq, sums.grad_dot_ema, sums.ema_sq, sums.nonfinite},
                    a.slots, 1, a.chunks);
}

// sums = those of rows of slots in fp64, a block for each; NaN where there is a `gate` that is not finite.
constexpr int kSumThreads = 512;

template <class S>
__global__ void __launch_bounds__(kSumThreads)
    sum_slots_kernel(const S* slots, int64_t chunks, double* sums, const double* gate) {
  using Sums = double[kSumThreads / kWarp];
  CUDA_SHARED(Sums, warp_sums);
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
    if (lane == 0) sums[blockIdx.x] = gate == nullptr ? sum : sum + 0 * gate[0];
  }
}

}  // namespace fsam::cuda
