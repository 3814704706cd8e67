// What the projection of the second gradient takes: its product with the first one, and that one's squared norm.
#pragma once

#include "kept.cuh"
#include "scalars.cuh"
#include "sums.cuh"

namespace fsam::cuda {

// A lane's place in a gradient and in what is kept; kAgain: when the latter is read again.
template <class T, Reuse kAgain>
struct GradientAndKept {
  using S = compute_t<T>;
  const T* g;
  KeptPlace<T> kept;
  S inverse_scale;

  struct Loaded {
    Pack<T, kGroup<T>> g;
    KeptPack<T> kept;
  };
  __device__ __forceinline__ void move(int by) {
    g += by;
    kept.move(by);
  }
  template <class Access>
  __device__ __forceinline__ void load(Access access, int beyond, Loaded& x) const {
    access.template load<Reuse::soon>(g + beyond, x.g);
    load_kept<kAgain>(access, kept, beyond, x.kept);
  }
  __device__ __forceinline__ S gradient(const Loaded& x, int j) const {
    return unscaled(S(widen_at(x.g, j)), inverse_scale);
  }
};

template <class T>
struct Dots : GradientAndKept<T, Reuse::soon> {
  using S = compute_t<T>;
  using typename GradientAndKept<T, Reuse::soon>::Loaded;
  S dot, kept_sq;
  PieceSums<kDots, S> pieces;

  template <class Access>
  __device__ __forceinline__ void finish(Access access, int, const Loaded& x) {
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) {
      if (!access.has(j)) continue;
      const S k = kept_at(this->kept, x.kept, j);
      dot = dot + this->gradient(x, j) * k;
      kept_sq = kept_sq + k * k;
    }
  }
  // The sums of the piece, which start anew.
  __device__ __forceinline__ void end_piece() {
    pieces.end_piece({dot, kept_sq});
    dot = kept_sq = 0;
  }
};

template <class T, class Rows>
__global__ void __launch_bounds__(kThreads, kBlocksFor<T, int(sizeof(T)) + kNarrowestKept<T>>)
    dots_kernel(const Rows __grid_constant__ table, const DotsArguments<compute_t<T>> a) {
  using S = compute_t<T>;
  using PassSums = BlockSums<kDots, S>;
  CUDA_SHARED(S, inverse_scale);
  CUDA_SHARED(PassSums, block_sums);
  const Piece piece = piece_of(table, threadIdx.x / kWarp);
  const T* g = static_cast<const T*>(table.grad[piece.row]) + piece.begin;
  const KeptPlace<T> kept = place_of<T>(a.kept, table.offset[piece.row] + piece.begin);
  Dots<T> work{{g, kept, {}}, {}, {}, {&block_sums}};
  const auto ready = [&](auto& walked) {
    if (threadIdx.x == 0) inverse_scale = S(1.0 / value_of(a.grad_scale));
    __syncthreads();
    walked.inverse_scale = inverse_scale;
    return true;
  };
  walk<T>(piece, is_aligned(g, kept.data), work, ready);
  work.pieces.store(table, piece, {work.dot, work.kept_sq}, a.slots, 1, a.chunks);
}

}  // namespace fsam::cuda
