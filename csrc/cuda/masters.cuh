// Masters of 16-bit weights: formulas.h, NOTE [masters adopt].
//
// Weights of others are rare, so what finds them is fast and what brings masters up to date is small: it is compiled
// into every pass that reads masters.
#pragma once

#include "walk.cuh"

namespace fsam::cuda {

template <class T>
__device__ __forceinline__ void adopt_one(const T& weight, compute_t<T>& master) {
  T rounded;
  narrow(master, rounded);
  if (rounded.bits != weight.bits) master = adopted(master, widen(rounded), widen(weight));
}

// A group of masters that was loaded with its weights, brought up to date there and in memory.
template <class T, class Access>
__device__ __forceinline__ void adopt(Access access, const T* w, compute_t<T>* master,
                                      Pack<compute_t<T>, kGroup<T>>& masters, const Pack<T, kGroup<T>>& weights) {
  bool others = false;
#pragma unroll
  for (int j = 0; j < kGroup<T>; ++j) {
    T rounded;
    narrow(masters.v[j], rounded);
    others |= rounded.bits != weights.v[j].bits;
  }
  if (!others) return;
#pragma unroll 1
  for (int j = 0; j < kGroup<T> && access.has(j); ++j) adopt_one(w[j], master[j]);
  access.template load<Reuse::late>(master, masters);
}

// The masters of a warp's pieces.
template <class T>
__device__ __forceinline__ void adopt(const Piece& piece, const T* w, compute_t<T>* master) {
  const int extent = piece.large ? kPiece : piece.n;
#pragma unroll 1
  for (int start = 0; start < piece.n; start += int(kChunk)) {
    const int end = start + extent < piece.n ? start + extent : piece.n;
#pragma unroll 1
    for (int i = start + int(threadIdx.x) % kWarp; i < end; i += kWarp) adopt_one(w[i], master[i]);
  }
}

}  // namespace fsam::cuda
