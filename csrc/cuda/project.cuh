// v in the place of the first gradient: what of the second one is orthogonal to it, and its squared norm.
#pragma once

#include "dots.cuh"

namespace fsam::cuda {

template <class T>
struct Project : GradientAndKept<T, Reuse::late> {
  using S = compute_t<T>;
  using typename GradientAndKept<T, Reuse::late>::Loaded;
  S part;  // of the first gradient in the second one
  S kept_sq;
  PieceSums<1, S> pieces;

  template <class Access>
  __device__ __forceinline__ void finish(Access access, int beyond, const Loaded& x) {
    with_type(this->kept, [&](auto* to) {
      Pack<std::remove_pointer_t<decltype(to)>, kGroup<T>> stored;
#pragma unroll
      for (int j = 0; j < kGroup<T>; ++j) {
        narrow(this->gradient(x, j) - part * kept_at(this->kept, x.kept, j), stored.v[j]);
        const S v = widen(stored.v[j]);
        if (access.has(j)) kept_sq = kept_sq + v * v;
      }
      access.template store<Reuse::late>(to + beyond, stored);
    });
  }
  // The sum of the piece, which starts anew.
  __device__ __forceinline__ void end_piece() {
    pieces.end_piece({kept_sq});
    kept_sq = 0;
  }
};

template <class S>
struct ProjectPrologue {
  S inverse_scale, part;
  bool skip;
};

template <class T, class Rows>
__global__ void __launch_bounds__(kThreads, kBlocksFor<T, int(sizeof(T)) + kNarrowestKept<T>>)
    project_kernel(const Rows __grid_constant__ table, const ProjectArguments<compute_t<T>> a) {
  using S = compute_t<T>;
  using Prologue = ProjectPrologue<S>;
  using PassSums = BlockSums<1, S>;
  CUDA_SHARED(Prologue, prologue);
  CUDA_SHARED(PassSums, block_sums);
  const Piece piece = piece_of(table, threadIdx.x / kWarp);
  const T* g = static_cast<const T*>(table.grad[piece.row]) + piece.begin;
  const KeptPlace<T> kept = place_of<T>(a.kept, table.offset[piece.row] + piece.begin);
  Project<T> work{{g, kept, {}}, {}, {}, {&block_sums}};
  const auto ready = [&](auto& walked) {
    if (threadIdx.x == 0) {
      const double dot = a.sums[0], kept_sq = a.sums[1];
      prologue.inverse_scale = S(1.0 / value_of(a.grad_scale));
      prologue.part = S(projection(dot, kept_sq));
      prologue.skip = skips(a) || !is_finite(dot) || !is_finite(kept_sq);
    }
    __syncthreads();
    walked.inverse_scale = prologue.inverse_scale;
    walked.part = prologue.part;
    return !prologue.skip;
  };
  walk<T>(piece, is_aligned(g, kept.data), work, ready);
  work.pieces.store(table, piece, {work.kept_sq}, a.slots, 1, 0);
}

}  // namespace fsam::cuda
