// Pass C with SGD.
#pragma once

#include "kept.cuh"
#include "restore.cuh"

namespace fsam::cuda {

// With kReused, which has fewer kernels, kMomentum means that there may be a buffer.
template <class T, bool kMaster, bool kMomentum, bool kReused>
struct RestoreSgd : NoSums {
  using S = compute_t<T>;
  Weights<T, kMaster> weights;
  const T* g;
  S* momentum_buffer;
  Reusing<T, kReused> reused;
  bool buffered;
  SgdScalars<S> s;

  struct Loaded {
    typename Weights<T, kMaster>::Loaded w;
    Pack<T, kGroup<T>> g;
    Pack<S, kGroup<T>> momentum_buffer;
    typename Reusing<T, kReused>::Loaded reused;
  };
  __device__ __forceinline__ bool has_buffer() const { return kReused ? buffered : kMomentum; }
  __device__ __forceinline__ void move(int by) {
    weights.move(by);
    g += by;
    if constexpr (kMomentum) momentum_buffer += by;
    reused.move(by);
  }
  template <class Access>
  __device__ __forceinline__ void load(Access access, int beyond, Loaded& x) const {
    weights.load(access, beyond, x.w);
    access.template load<Reuse::late>(g + beyond, x.g);
    if constexpr (kMomentum) {
      if (has_buffer()) access.template load<Reuse::late>(momentum_buffer + beyond, x.momentum_buffer);
    }
    reused.load(access, beyond, x.reused);
  }
  template <class Access>
  __device__ __forceinline__ void finish(Access access, int beyond, Loaded& x) const {
    weights.adopt(access, beyond, x.w);
    S updated[kGroup<T>];
    for_flag(has_buffer(), [&](auto with_buffer) {
      constexpr bool kBuffer = kMomentum && decltype(with_buffer)::value;
#pragma unroll
      for (int j = 0; j < kGroup<T>; ++j) {
        S buffer(0);
        if constexpr (kBuffer) buffer = x.momentum_buffer.v[j];
        const S gradient = reused.gradient(unscaled(S(widen_at(x.g, j)), s.inverse_scale), x.reused, j);
        updated[j] = sgd<kBuffer>(S(widen_at(x.w.v, j)), gradient, buffer, s);
        if constexpr (kBuffer) x.momentum_buffer.v[j] = buffer;
      }
    });
    weights.store(access, beyond, updated);
    if constexpr (kMomentum) {
      if (has_buffer()) access.template store<Reuse::late>(momentum_buffer + beyond, x.momentum_buffer);
    }
  }
};

// Of fp64 there is no room for four operands of as many groups as of three.
template <class T, bool kReused>
constexpr int kSgdInFlight = sizeof(T) == 8 && kReused ? 2 : kInFlight<T>;

template <class S>
struct SgdPrologue {
  SgdScalars<S> scalars;
  S length;
  uint32_t key;
  bool skip;
};

template <class T, bool kMaster, bool kMomentum, bool kReused, class Rows>
__global__ void __launch_bounds__(
    kThreads,
    kReused ? kBlocksPerSm
            : kBlocksFor<T, (kMaster ? 4 : int(sizeof(T))) + int(sizeof(T)) + (kMomentum ? kBytesOf<compute_t<T>> : 0)>)
    restore_sgd_kernel(const Rows __grid_constant__ table, const SgdArguments<T> a) {
  using S = compute_t<T>;
  using Prologue = SgdPrologue<S>;
  CUDA_SHARED(Prologue, prologue);
  const Piece piece = piece_of(table, threadIdx.x / kWarp);
  const Weights<T, kMaster> weights = weights_of<T, kMaster>(table, piece, a.update);
  const T* g = static_cast<const T*>(table.grad[piece.row]) + piece.begin;
  S* momentum_buffer = kMomentum ? a.momentum_buffer + weights.position : nullptr;
  const bool buffered = a.momentum_buffer != nullptr;
  const Reusing<T, kReused> reused = reusing<T, kReused>(a.update, weights.position);
  RestoreSgd<T, kMaster, kMomentum, kReused> work{{}, weights, g, momentum_buffer, reused, buffered, {}};
  const auto ready = [&](auto& walked) {
    if (threadIdx.x == 0) {
      prologue.scalars = sgd_scalars<S>(1.0 / value_of(a.update.grad_scale), value_of(a.update.lr), a.momentum,
                                        a.dampening, a.weight_decay, a.nesterov, a.maximize);
      prologue.length = length_of<kReused>(a.update);
      prologue.key = key_of(a.update);
      prologue.skip = skips(a.update);
    }
    __syncthreads();
    walked.s = prologue.scalars;
    if constexpr (kReused) walked.reused.length = prologue.length;
    walked.weights.key = prologue.key;
    return !prologue.skip;
  };
  if (!walk<T, kSgdInFlight<T, kReused>>(piece, weights.aligned() && is_aligned(g, momentum_buffer) && reused.aligned(),
                                         work, ready)) {
    only_restore(piece, weights, a.update);
  }
}

}  // namespace fsam::cuda
