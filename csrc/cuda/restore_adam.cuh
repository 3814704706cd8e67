// Pass C with Adam and AdamW.
#pragma once

#include "divide.cuh"
#include "kept.cuh"
#include "restore.cuh"

namespace fsam::cuda {

// Four operands: eight parameters of each (four of fp64) are as many bytes as sixteen of the other passes' two.
template <class T>
constexpr int kAdamInFlight = sizeof(T) == 2 ? 1 : 2;

template <class T, bool kMaster, bool kReused>
struct RestoreAdam : NoSums {
  using S = compute_t<T>;
  Weights<T, kMaster> weights;
  const T* g;
  S* exp_avg;
  S* exp_avg_sq;
  Reusing<T, kReused> reused;
  AdamScalars<S> s;
  BiasCorrection<S> correction;
  DivisionFor<S> division;

  struct Loaded {
    typename Weights<T, kMaster>::Loaded w;
    Pack<T, kGroup<T>> g;
    Pack<S, kGroup<T>> exp_avg, exp_avg_sq;
    typename Reusing<T, kReused>::Loaded reused;
  };
  __device__ __forceinline__ void move(int by) {
    weights.move(by);
    g += by;
    exp_avg += by;
    exp_avg_sq += by;
    reused.move(by);
  }
  template <class Access>
  __device__ __forceinline__ void load(Access access, int beyond, Loaded& x) const {
    weights.load(access, beyond, x.w);
    access.template load<Reuse::late>(g + beyond, x.g);
    access.template load<Reuse::late>(exp_avg + beyond, x.exp_avg);
    access.template load<Reuse::late>(exp_avg_sq + beyond, x.exp_avg_sq);
    reused.load(access, beyond, x.reused);
  }
  template <class Access>
  __device__ __forceinline__ void finish(Access access, int beyond, Loaded& x) const {
    weights.adopt(access, beyond, x.w);
    S updated[kGroup<T>];
    bool fits = division.usable;
    AdamScalars<S> scalars = s;
    for_flag(s.decoupled, [&](auto decoupled) {
      scalars.decoupled = decltype(decoupled)::value;
#pragma unroll
      for (int j = 0; j < kGroup<T>; ++j) {
        const S gradient = reused.gradient(unscaled(S(widen_at(x.g, j)), s.inverse_scale), x.reused, j);
        updated[j] = adam_moments(S(widen_at(x.w.v, j)), gradient, x.exp_avg.v[j], x.exp_avg_sq.v[j], scalars);
        fits &= division.fits(x.exp_avg.v[j], x.exp_avg_sq.v[j]);
      }
    });
    const auto step = [&](const auto& how) {
#pragma unroll
      for (int j = 0; j < kGroup<T>; ++j) {
        updated[j] = adam_step(updated[j], x.exp_avg.v[j], x.exp_avg_sq.v[j], s.eps, correction, how);
      }
    };
    if (fits) {
      step(division);
    } else {
      step(PlainDivision{});
    }
    weights.store(access, beyond, updated);
    access.template store<Reuse::late>(exp_avg + beyond, x.exp_avg);
    access.template store<Reuse::late>(exp_avg_sq + beyond, x.exp_avg_sq);
  }
};

template <class S>
struct AdamPrologue {
  AdamScalars<S> scalars;
  S length;
  uint32_t key;
  bool skip;
};

template <class T, bool kMaster, bool kReused, class Rows>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    restore_adam_kernel(const Rows __grid_constant__ table, const AdamArguments<T> a) {
  using S = compute_t<T>;
  using Prologue = AdamPrologue<S>;
  CUDA_SHARED(Prologue, prologue);
  const Piece piece = piece_of(table, threadIdx.x / kWarp);
  const Weights<T, kMaster> weights = weights_of<T, kMaster>(table, piece, a.update);
  const T* g = static_cast<const T*>(table.grad[piece.row]) + piece.begin;
  S* exp_avg = a.exp_avg + weights.position;
  S* exp_avg_sq = a.exp_avg_sq + weights.position;
  const Reusing<T, kReused> reused = reusing<T, kReused>(a.update, weights.position);
  RestoreAdam<T, kMaster, kReused> work{
      {}, weights, g, exp_avg, exp_avg_sq, reused, {}, a.corrections[table.id[piece.row]], {}};
  const auto ready = [&](auto& walked) {
    if (threadIdx.x == 0) {
      prologue.scalars = adam_scalars<S>(1.0 / value_of(a.update.grad_scale), value_of(a.update.lr), a.beta1, a.beta2,
                                         a.eps, a.weight_decay, a.decoupled, a.maximize);
      prologue.length = length_of<kReused>(a.update);
      prologue.key = key_of(a.update);
      prologue.skip = skips(a.update);
    }
    __syncthreads();
    walked.s = prologue.scalars;
    walked.s.decoupled = a.decoupled;  // from the arguments, where the compiler sees one value for all threads
    walked.division = DivisionFor<S>(walked.s.eps, walked.correction.sqrt_second);
    if constexpr (kReused) walked.reused.length = prologue.length;
    walked.weights.key = prologue.key;
    return !prologue.skip;
  };
  const bool aligned = weights.aligned() && is_aligned(g, exp_avg, exp_avg_sq) && reused.aligned();
  if (!walk<T, kAdamInFlight<T>>(piece, aligned, work, ready)) {
    only_restore(piece, weights, a.update);
  }
}

}  // namespace fsam::cuda
