// What is kept of gradients between passes and steps, in either type that stores it, a group at a time.
#pragma once

#include "../kept.h"
#include "walk.cuh"

namespace fsam::cuda {

// NOTE [one kernel for both types of what is kept]
// Which type stores it is looked up where it is loaded and stored: a branch that all threads take alike and a select
// for each element, beside memory that is waited for. Kernels of their own for bfloat16 would double the number of
// those that keep or reuse.

// The bytes of an element in the narrower type: bfloat16, but for arithmetic in double.
template <class T>
constexpr int kNarrowestKept = sizeof(T) == 8 ? 8 : 2;

// The place of a lane in it.
template <class T>
struct KeptPlace {
  using S = compute_t<T>;
  char* data;
  bool narrow;

  __device__ __forceinline__ void move(int by) {
    data += int64_t(by) * (narrow ? int(sizeof(bfloat16)) : int(sizeof(S)));
  }
};
// No question whether something is kept: a pointer that may be null is one into no known memory, which costs generic
// accesses.
template <class T>
__device__ __forceinline__ KeptPlace<T> place_of(const Kept& kept, int64_t element) {
  KeptPlace<T> place{static_cast<char*>(kept.data), sizeof(T) != 8 && kept.narrow};
  place.data += element * (place.narrow ? int(sizeof(bfloat16)) : int(sizeof(compute_t<T>)));
  return place;
}

// Calls body(elements) with a pointer to them as what they are stored as.
template <class T, class Body>
__device__ __forceinline__ void with_type(const KeptPlace<T>& kept, const Body& body) {
  if constexpr (sizeof(T) != 8) {
    if (kept.narrow) return body(reinterpret_cast<bfloat16*>(kept.data));
  }
  body(reinterpret_cast<compute_t<T>*>(kept.data));
}

// A group as it was loaded; bfloat16 fill the first half.
template <class T>
struct KeptPack {
  Pack<compute_t<T>, kGroup<T>> v;
};
template <Reuse kReuse, class T, class Access>
__device__ __forceinline__ void load_kept_as_typed(Access access, const KeptPlace<T>& kept, int beyond,
                                                   KeptPack<T>& x) {
  with_type(kept, [&](auto* data) {
    Pack<std::remove_pointer_t<decltype(data)>, kGroup<T>> loaded;
    access.template load<kReuse>(data + beyond, loaded);
    memcpy(&x.v, &loaded, sizeof loaded);
  });
}

// The words of both types go to the same registers: values that two branches load into registers of their own are
// waited for where the branches meet, and then a lane has a single group under way.
template <Reuse kReuse, class T>
__device__ __forceinline__ void load_kept(Whole access, const KeptPlace<T>& kept, int beyond, KeptPack<T>& x) {
  if constexpr (sizeof(T) == 2) {
    KeptPlace<T> from = kept;
    from.move(beyond);
    const uint4* words = reinterpret_cast<const uint4*>(from.data);
    uint4* to = reinterpret_cast<uint4*>(&x.v);
    to[0] = load_word<kReuse>(words);
    if (!kept.narrow) to[1] = load_word<kReuse>(words + 1);
  } else {
    load_kept_as_typed<kReuse>(access, kept, beyond, x);
  }
}
template <Reuse kReuse, class T>
__device__ __forceinline__ void load_kept(Part access, const KeptPlace<T>& kept, int beyond, KeptPack<T>& x) {
  load_kept_as_typed<kReuse>(access, kept, beyond, x);
}

template <class T>
__device__ __forceinline__ compute_t<T> kept_at(const KeptPlace<T>& kept, const KeptPack<T>& x, int j) {
  if constexpr (sizeof(T) == 8) {
    return x.v.v[j];
  } else {
    Pack<bfloat16, kGroup<T>> low;
    memcpy(&low, &x.v, sizeof low);
    return kept.narrow ? widen_at(low, j) : x.v.v[j];
  }
}

// v in an update that reuses it: formulas.h, NOTE [reuse of the second gradient]. Nothing in one that does not.
template <class T, bool kReused>
struct Reusing {
  using S = compute_t<T>;
  using Loaded = KeptPack<T>;
  KeptPlace<T> v;
  S length = 0;

  __device__ __forceinline__ bool aligned() const { return is_aligned(v.data); }
  __device__ __forceinline__ void move(int by) { v.move(by); }
  template <class Access>
  __device__ __forceinline__ void load(Access access, int beyond, Loaded& x) const {
    load_kept<Reuse::late>(access, v, beyond, x);
  }
  __device__ __forceinline__ S gradient(S g, const Loaded& x, int j) const {
    return with_reused(g, kept_at(v, x, j), length);
  }
};
template <class T>
struct Reusing<T, false> {
  using S = compute_t<T>;
  struct Loaded {};

  __device__ __forceinline__ bool aligned() const { return true; }
  __device__ __forceinline__ void move(int) {}
  template <class Access>
  __device__ __forceinline__ void load(Access, int, Loaded&) const {}
  __device__ __forceinline__ S gradient(S g, const Loaded&, int) const { return g; }
};

template <class T, bool kReused>
__device__ __forceinline__ Reusing<T, kReused> reusing(const UpdateArguments<T>& a, int64_t element) {
  if constexpr (kReused) return {place_of<T>(a.reused.v, element)};
  return {};
}
// To be computed by one thread of a block.
template <bool kReused, class T>
__device__ __forceinline__ compute_t<T> length_of(const UpdateArguments<T>& a) {
  if constexpr (!kReused) return 0;
  return compute_t<T>(reuse_length(a.reused.squares[0], a.reused.squares[1], a.reuse, a.reuse_eps));
}

}  // namespace fsam::cuda
