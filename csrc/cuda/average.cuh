// The moving average, in whichever type stores it, a group at a time.
#pragma once

#include "../average.h"
#include "walk.cuh"

namespace fsam::cuda {

// The place of a lane in an average.
template <class M>
struct AveragePlace {
  AverageSlice<M> slice;
  int at = 0;  // elements from its start; counted only where they share scales

  __device__ __forceinline__ void move(int by) {
    if constexpr (has_average<M>) slice.data += by;
    if constexpr (is_quantized<M>) at += by;
  }
};

// A group of an average as it was loaded: of type M for parameters of type T.
template <class T, class M>
struct AveragePack {
  Pack<M, kGroup<T>> v;
  float scale;
};
template <class T>
struct AveragePack<T, void> {};

template <Reuse kReuse, class T, class M, class Access>
__device__ __forceinline__ void load_average(Access access, const AveragePlace<M>& ema, int beyond,
                                             AveragePack<T, M>& x) {
  if constexpr (has_average<M>) access.template load<kReuse>(ema.slice.data + beyond, x.v);
  if constexpr (is_quantized<M>) x.scale = access.has(0) ? ema.slice.scales[(ema.at + beyond) / int(kQuantized)] : 0.0f;
}
template <class T, class M>
__device__ __forceinline__ compute_t<T> average_at(const AveragePack<T, M>& x, int j) {
  if constexpr (is_quantized<M>) {
    return widen(x.v.v[j]) * x.scale;
  } else if constexpr (has_average<M>) {
    return widen_at(x.v, j);
  } else {
    return 0;
  }
}

// Stores a group of new averages. Quantized, the lanes that share a block agree on its scale first.
template <class T, class M, class Access>
__device__ __forceinline__ void store_average(Access access, const AveragePlace<M>& ema, int beyond,
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
    access.template store<Reuse::late>(ema.slice.data + beyond, packed);
    const int at = ema.at + beyond;
    if (access.has(0) && at % int(kQuantized) == 0) ema.slice.scales[at / int(kQuantized)] = scale;
  } else if constexpr (has_average<M>) {
    Pack<M, kGroup<T>> packed;
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) narrow(fresh[j], packed.v[j]);
    access.template store<Reuse::late>(ema.slice.data + beyond, packed);
  }
}

// Walks with work that loads and stores an average of type M.
template <class T, class M, int kGroups = kInFlight<T>, class Work, class Ready>
__device__ __forceinline__ bool walk_averages(const Piece& piece, bool aligned, Work& work, const Ready& ready) {
  constexpr bool kReadyFirst = is_quantized<M> || (sizeof(T) == 8 && !has_average<M>);
  return walk<T, kGroups, is_quantized<M>, kReadyFirst>(piece, aligned, work, ready);
}

}  // namespace fsam::cuda
