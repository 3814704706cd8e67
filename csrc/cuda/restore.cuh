// Pass C without a base optimizer, and what the two with one share: where weights come from and how they are given
// back.
#pragma once

#include "masters.cuh"
#include "scalars.cuh"

namespace fsam::cuda {

// w = the saved weights: a copy of them, or the masters, rounded: what w was.
template <class T, bool kMaster>
__device__ __forceinline__ void restore(const Piece& piece, T* w, const T* backup, const compute_t<T>* master) {
  if constexpr (kMaster) {
    copy(piece, master, w);
  } else if (backup != nullptr) {
    copy(piece, backup, w);
  }
}

template <class T, bool kMaster, class Rows>
__global__ void __launch_bounds__(kThreads, kBlocksFor<T, kMaster ? 4 : int(sizeof(T))>)
    restore_kernel(const Rows __grid_constant__ table, const RestoreArguments<T> a) {
  const Piece piece = piece_of(table, threadIdx.x / kWarp);
  const int64_t in_buffer = table.offset[piece.row] + piece.begin;
  restore<T, kMaster>(piece, static_cast<T*>(table.param[piece.row]) + piece.begin,
                      kMaster ? nullptr : a.backup + in_buffer, kMaster ? a.master + in_buffer : nullptr);
}

// Where the base updates take weights from and how they give them back.
template <class T, bool kMaster>
struct Weights {
  using S = compute_t<T>;
  T* w;
  const T* from;  // a backup, or w itself
  S* master;
  bool adopts, stochastic;
  int64_t position;  // of the piece, in the flat state
  uint32_t key = 0;  // of the stochastic rounding

  using Loaded = std::conditional_t<kMaster, MasterGroup<T>, WeightGroup<T>>;
  __device__ __forceinline__ bool aligned() const { return kMaster ? is_aligned(w, master) : is_aligned(w, from); }
  __device__ __forceinline__ void move(int by) {
    w += by;
    if constexpr (kMaster) {
      master += by;
    } else {
      from += by;
    }
    position += by;
  }
  template <class Access>
  __device__ __forceinline__ void load(Access access, int beyond, Loaded& x) const {
    if constexpr (kMaster) {
      if (adopts) return load_adopting(access, w + beyond, master + beyond, x);
      access.template load<Reuse::late>(master + beyond, x.v);
    } else {
      access.template load<Reuse::late>(from + beyond, x.v);
    }
  }
  // To be called before the loaded weights are used.
  template <class Access>
  __device__ __forceinline__ void adopt(Access access, int beyond, Loaded& x) const {
    if constexpr (kMaster) {
      if (adopts) adopt_loaded(access, w + beyond, master + beyond, x);
    }
  }
  template <class Access>
  __device__ __forceinline__ void store(Access access, int beyond, const S (&updated)[kGroup<T>]) const {
    Pack<T, kGroup<T>> low;
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) narrow(updated[j], low.v[j]);
    if constexpr (sizeof(T) == 2 && !kMaster) {
      if (stochastic) {
        const int64_t start = position + beyond;
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
      Pack<S, kGroup<T>> full;
#pragma unroll
      for (int j = 0; j < kGroup<T>; ++j) full.v[j] = updated[j];
      access.template store<Reuse::late>(master + beyond, full);
    }
    access.template store<Reuse::soon>(w + beyond, low);
  }
};

template <class T, bool kMaster, class Rows>
__device__ __forceinline__ Weights<T, kMaster> weights_of(const Rows& table, const Piece& piece,
                                                          const UpdateArguments<T>& a) {
  const int64_t in_buffer = table.offset[piece.row] + piece.begin;
  T* w = static_cast<T*>(table.param[piece.row]) + piece.begin;
  return {w,
          a.backup == nullptr ? w : a.backup + in_buffer,
          kMaster ? a.master + in_buffer : nullptr,
          a.adopts,
          a.rounding != nullptr,
          in_buffer};
}

// What is left of an update that is skipped.
template <class T, bool kMaster>
__device__ __forceinline__ void only_restore(const Piece& piece, const Weights<T, kMaster>& weights,
                                             const UpdateArguments<T>& a) {
  if constexpr (kMaster) {
    if (a.adopts) return adopt(piece, weights.w, weights.master);
  }
  restore<T, kMaster>(piece, weights.w, a.backup == nullptr ? nullptr : weights.from, weights.master);
}

template <class T>
__device__ __forceinline__ uint32_t key_of(const UpdateArguments<T>& a) {
  return a.rounding == nullptr ? 0 : rounding_key(uint64_t(a.rounding[0]), uint64_t(a.rounding[1]));
}

}  // namespace fsam::cuda
