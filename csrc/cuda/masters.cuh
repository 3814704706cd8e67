// Masters of 16-bit weights: formulas.h, NOTE [masters adopt].
//
// Weights of others are rare, so what finds them is fast and what brings masters up to date, in memory, is small: it is
// compiled several times into every pass that reads masters.
#pragma once

#include "walk.cuh"

namespace fsam::cuda {

// `first`, and every `stride`th element up to `end`.
template <class T>
__device__ __forceinline__ void adopt(const T* w, compute_t<T>* master, int first, int end, int stride) {
#pragma unroll 1
  for (int i = first; i < end; i += stride) {
    T rounded;
    narrow(master[i], rounded);
    if (rounded.bits != w[i].bits) master[i] = adopted(master[i], widen(rounded), widen(w[i]));
  }
}

// The masters of a warp's pieces.
template <class T>
__device__ __forceinline__ void adopt(const Piece& piece, const T* w, compute_t<T>* master) {
  const int extent = piece.large ? kPiece : piece.n;
#pragma unroll 1
  for (int start = 0; start < piece.n; start += int(kChunk)) {
    const int end = start + extent < piece.n ? start + extent : piece.n;
    adopt(w, master, start + int(threadIdx.x) % kWarp, end, kWarp);
  }
}

// A group of masters that adopts. Whole, it is loaded with its weights, and those that differ are looked for when both
// are there; a part is brought up to date before it is loaded.
template <class T>
struct MasterGroup {
  Pack<compute_t<T>, kGroup<T>> v;
  Pack<T, kGroup<T>> weights;
};
template <class T>
__device__ __forceinline__ void load_adopting(Whole access, const T* w, compute_t<T>* master, MasterGroup<T>& x) {
  access.load<Reuse::late>(master, x.v);
  access.load<Reuse::late>(w, x.weights);
}
template <class T>
__device__ __forceinline__ void load_adopting(Part access, const T* w, compute_t<T>* master, MasterGroup<T>& x) {
  adopt(w, master, 0, access.count, 1);
  access.load<Reuse::late>(master, x.v);
}
template <class T>
__device__ __forceinline__ void adopt_loaded(Whole access, const T* w, compute_t<T>* master, MasterGroup<T>& x) {
  bool others = false;
#pragma unroll
  for (int j = 0; j < kGroup<T>; ++j) {
    T rounded;
    narrow(x.v.v[j], rounded);
    others |= rounded.bits != x.weights.v[j].bits;
  }
  if (!others) return;
  adopt(w, master, 0, kGroup<T>, 1);
  access.load<Reuse::late>(master, x.v);
}
template <class T>
__device__ __forceinline__ void adopt_loaded(Part, const T*, compute_t<T>*, MasterGroup<T>&) {}

// A group of weights where no masters are.
template <class T>
struct WeightGroup {
  Pack<T, kGroup<T>> v;
};

}  // namespace fsam::cuda
