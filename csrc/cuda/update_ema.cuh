// The average without an ascent, and on the way the squared norm of the gradient.
#pragma once

#include "average.cuh"
#include "scalars.cuh"
#include "sums.cuh"

namespace fsam::cuda {

template <class T, class M, bool kMeasures>
struct UpdateEma {
  using S = compute_t<T>;
  const T* g;
  AveragePlace<M> ema;
  AscentScalars<S> s;
  bool feeds;
  S grad_sq;
  PieceSums<1, S> pieces;

  struct Loaded {
    Pack<T, kGroup<T>> g;
    AveragePack<T, M> ema;
  };
  __device__ __forceinline__ void move(int by) {
    g += by;
    ema.move(by);
  }
  template <class Access>
  __device__ __forceinline__ void load(Access access, int beyond, Loaded& x) const {
    access.template load<Reuse::soon>(g + beyond, x.g);
    load_average<Reuse::late>(access, ema, beyond, x.ema);
  }
  template <class Access>
  __device__ __forceinline__ void finish(Access access, int beyond, const Loaded& x) {
    if constexpr (kMeasures) {
#pragma unroll
      for (int j = 0; j < kGroup<T>; ++j) {
        if (!access.has(j)) continue;
        const S gradient = unscaled(S(widen_at(x.g, j)), s.inverse_scale);
        grad_sq = grad_sq + gradient * gradient;
      }
      if (!feeds) return;
    }
    S fresh[kGroup<T>];
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) {
      fresh[j] = fed(average_at<T, M>(x.ema, j), S(widen_at(x.g, j)), s.inverse_scale, s.lmbda, s.one_minus_lmbda);
    }
    store_average<T, M>(access, ema, beyond, fresh);
  }
  // The sum of the piece, which starts anew.
  __device__ __forceinline__ void end_piece() {
    if constexpr (!kMeasures) return;
    pieces.end_piece({grad_sq});
    grad_sq = 0;
  }
};

template <class T, class M, bool kMeasures, class Rows>
__global__ void __launch_bounds__(kThreads, kBlocksFor<T, int(sizeof(T)) + kBytesOf<M>>)
    update_ema_kernel(const Rows __grid_constant__ table, const UpdateEmaArguments<compute_t<T>> a) {
  using S = compute_t<T>;
  using Scalars = AscentScalars<S>;
  using PassSums = BlockSums<1, S>;
  CUDA_SHARED(Scalars, scalars);
  CUDA_SHARED(bool, skip);
  const Piece piece = piece_of(table, threadIdx.x / kWarp);
  const T* g = static_cast<const T*>(table.grad[piece.row]) + piece.begin;
  const AverageSlice<M> ema = slice_of<M>(a.ema, table.offset[piece.row] + piece.begin);
  UpdateEma<T, M, kMeasures> work{g, {ema}, {}, {}, {}, {}};
  if constexpr (kMeasures) {
    CUDA_SHARED(PassSums, block_sums);
    work.pieces.block = &block_sums;
  }
  const auto ready = [&](auto& walked) {
    if (threadIdx.x == 0) {
      scalars = ascent_scalars<S>(1.0 / value_of(a.grad_scale), 0.0, a.lmbda, 0.0, false, false);
      skip = skips(a);
    }
    __syncthreads();
    walked.s = scalars;
    walked.feeds = !skip;
    return kMeasures || !skip;
  };
  walk_averages<T, M>(piece, is_aligned(g, ema.data), work, ready);
  if constexpr (kMeasures) work.pieces.store(table, piece, {work.grad_sq}, a.slots, 1, 0);
}

}  // namespace fsam::cuda
