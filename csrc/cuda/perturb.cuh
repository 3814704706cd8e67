// Pass B: the backup, the average and the perturbed weights, and what rounding leaves of the perturbation.
#pragma once

#include "average.cuh"
#include "kept.cuh"
#include "masters.cuh"
#include "scalars.cuh"
#include "sums.cuh"

namespace fsam::cuda {

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

// Keeps the gradients of a group. A part is rare: its gradients are read again, so that the code is small.
template <class T>
__device__ __forceinline__ void keep(Whole access, const KeptPlace<T>& kept, const T*, const Pack<T, kGroup<T>>& g,
                                     compute_t<T> inverse_scale) {
  with_type(kept, [&](auto* to) {
    Pack<std::remove_pointer_t<decltype(to)>, kGroup<T>> packed;
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) narrow(unscaled(compute_t<T>(widen_at(g, j)), inverse_scale), packed.v[j]);
    access.store<Reuse::late>(to, packed);
  });
}
template <class T>
__device__ __forceinline__ void keep(Part access, const KeptPlace<T>& kept, const T* g, const Pack<T, kGroup<T>>&,
                                     compute_t<T> inverse_scale) {
  with_type(kept, [&](auto* to) {
#pragma unroll 1
    for (int i = 0; i < access.count; ++i) narrow(unscaled(compute_t<T>(widen(g[i])), inverse_scale), to[i]);
  });
}

template <class T>
constexpr int kPerturbInFlight = sizeof(T) == 8 ? 2 : kInFlight<T>;

template <class T, class M, bool kMaster>
struct Perturb {
  using S = compute_t<T>;
  T* w;
  const T* g;
  AveragePlace<M> ema;
  T* backup;
  S* master;
  AscentScalars<S> s;
  bool feeds, measures;
  Forward forward;
  Kept kept;
  int64_t at;      // in the flat buffers
  const T* saved;  // the first of the backup
  Effect<S> effect;
  PieceSums<kEffect, S> pieces;

  struct Loaded {
    std::conditional_t<kMaster, MasterGroup<T>, WeightGroup<T>> w;
    Pack<T, kGroup<T>> g;
    AveragePack<T, M> ema;
  };
  __device__ __forceinline__ void move(int by) {
    w += by;
    g += by;
    ema.move(by);
    at += by;
    if constexpr (kMaster) {
      master += by;
    } else {
      backup += by;
    }
  }
  template <class Access>
  __device__ __forceinline__ void load(Access access, int beyond, Loaded& x) const {
    if constexpr (kMaster) {
      load_adopting(access, w + beyond, master + beyond, x.w);
    } else {
      access.template load<Reuse::late>(w + beyond, x.w.v);
    }
    access.template load<Reuse::late>(g + beyond, x.g);
    load_average<Reuse::late>(access, ema, beyond, x.ema);
  }
  template <class Access>
  __device__ __forceinline__ void finish(Access access, int beyond, Loaded& x) {
    if constexpr (kMaster) {
      adopt_loaded(access, w + beyond, master + beyond, x.w);
    } else {
      access.template store<Reuse::late>(backup + beyond, x.w.v);
    }
    if (kept) {
      // fp64 has no registers to count in: there the place is a difference of pointers, which makes some accesses to
      // the backup generic.
      const int64_t here = sizeof(T) == 8 ? backup - saved : at;
      keep<T>(access, place_of<T>(kept, here + beyond), g + beyond, x.g, s.inverse_scale);
    }
    Pack<T, kGroup<T>> after;
    S fresh[kGroup<T>], intended[kGroup<T>];
    AscentScalars<S> scalars = s;
    for_flag(s.adaptive, [&](auto adaptive) {
      scalars.adaptive = decltype(adaptive)::value;
#pragma unroll
      for (int j = 0; j < kGroup<T>; ++j) {
        const S start = widen_at(x.w.v, j);
        const S gradient = unscaled(S(widen_at(x.g, j)), s.inverse_scale);
        const S average = average_at<T, M>(x.ema, j);
        intended[j] = perturbation(start, noise<has_average<M>>(gradient, average, scalars), scalars);
        narrow(start + intended[j], after.v[j]);
        fresh[j] = ema_update(average, gradient, s.lmbda, s.one_minus_lmbda);
      }
    });
    if (measures) {
#pragma unroll
      for (int j = 0; j < kGroup<T>; ++j) {
        if (!access.has(j)) continue;
        S before = widen_at(x.w.v, j);
        if constexpr (kMaster) {
          T low;
          narrow(before, low);
          before = widen(low);
        }
        accumulate(effect, seen(S(widen(after.v[j])), forward) - seen(before, forward), intended[j]);
      }
    }
    access.template store<Reuse::soon>(w + beyond, after);
    if (feeds) store_average<T, M>(access, ema, beyond, fresh);
  }
  // The sums of the piece, which start anew.
  __device__ __forceinline__ void end_piece() {
    if (!measures) return;
    pieces.end_piece({effect.effective_sq, effect.effective_dot_intended, effect.intended_sq});
    effect = {};
  }
};

template <class T, class M, bool kMaster, class Rows>
__global__ void __launch_bounds__(
    kThreads, kBlocksFor<T, (kMaster ? 4 : 0) + 2 * int(sizeof(T)) + kBytesOf<M>, kPerturbInFlight<T>>)
    perturb_kernel(const Rows __grid_constant__ table, const PerturbArguments<T> a) {
  using S = compute_t<T>;
  using Scalars = AscentScalars<S>;
  using PassSums = BlockSums<kEffect, S>;
  CUDA_SHARED(Scalars, scalars);
  CUDA_SHARED(bool, finite);
  CUDA_SHARED(PassSums, block_sums);
  const Piece piece = piece_of(table, threadIdx.x / kWarp);
  const int64_t in_buffer = table.offset[piece.row] + piece.begin;
  T* w = static_cast<T*>(table.param[piece.row]) + piece.begin;
  const T* g = static_cast<const T*>(table.grad[piece.row]) + piece.begin;
  const AverageSlice<M> ema = slice_of<M>(a.ema, in_buffer);
  T* backup = kMaster ? nullptr : a.backup + in_buffer;
  S* master = kMaster ? a.master + in_buffer : nullptr;
  const bool measures = a.effect != nullptr;
  Perturb<T, M, kMaster> work{w,        g,         {ema},  backup,    master,   {}, a.feeds,
                              measures, a.forward, a.kept, in_buffer, a.backup, {}, {&block_sums}};
  const auto ready = [&](auto& walked) {
    if (threadIdx.x == 0) {
      const double noise_sq = a.stats[0];
      scalars = ascent_scalars<S>(1.0 / value_of(a.grad_scale), a.sigma, a.lmbda,
                                  perturbation_step_length(noise_sq, value_of(a.rho), a.eps), a.adaptive, a.updated);
      finite = is_finite(noise_sq);
    }
    __syncthreads();
    walked.s = scalars;
    walked.s.adaptive = a.adaptive;  // from the arguments, where the compiler sees one value for all threads
    walked.s.updated = a.updated;
    return finite;
  };
  const bool aligned =
      is_aligned(w, g, ema.data, backup, master) && (!a.kept || is_aligned(place_of<T>(a.kept, in_buffer).data));
  const bool perturbed = walk_averages<T, M, kPerturbInFlight<T>>(piece, aligned, work, ready);
  if constexpr (kMaster) {
    if (!perturbed) adopt(piece, w, master);
  } else {
    if (!perturbed) copy<T, T>(piece, w, backup);
  }
  if (measures) {
    const Effect<S>& sums = work.effect;
    // The piece is found again: its registers are worth more during the walk.
    work.pieces.store(table, piece_of(table, threadIdx.x / kWarp),
                      {sums.effective_sq, sums.effective_dot_intended, sums.intended_sq}, a.effect, kEffect, 1);
  }
}

}  // namespace fsam::cuda
