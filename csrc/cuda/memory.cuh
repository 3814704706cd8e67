// How elements move: storage types to and from the type of the arithmetic, 16 bytes at a time where they are aligned.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../storage.h"

// The emulation hands out shared memory itself, so that it can poison what a block has not written.
#ifndef CUDA_SHARED
#define CUDA_SHARED(type, name) __shared__ type name
#endif

namespace fsam::cuda {

// ---- Storage types -----------------------------------------------------------------------------

// The GPU's own conversions where it has them: the bits of storage.h but for the payload of a NaN.
__device__ __forceinline__ float widen(float x) {
  return x;
}
__device__ __forceinline__ double widen(double x) {
  return x;
}
__device__ __forceinline__ float widen(bfloat16 x) {
  return widen_bfloat16(uint32_t(x.bits));
}
__device__ __forceinline__ float widen(half x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  return widen_half(uint32_t(x.bits));
#endif
}

__device__ __forceinline__ float widen(int8_t x) {
  return float(x);
}

__device__ __forceinline__ void narrow(float x, float& to) {
  to = x;
}
__device__ __forceinline__ void narrow(double x, double& to) {
  to = x;
}
__device__ __forceinline__ void narrow(float x, bfloat16& to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to.bits = uint16_t(narrow_bfloat16(x));
#endif
}
__device__ __forceinline__ void narrow(float x, half& to) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to.bits = uint16_t(narrow_half(x));
#endif
}

// ---- Groups ------------------------------------------------------------------------------------

// NOTE [groups of 16 bytes]
// A lane takes as many parameters at once as fill 16 bytes, the widest access there is, and their
// fp32 state with one or two more. A lane has the loads of kInFlight groups under way before it uses
// the first: 16 parameters (8 of fp64) keep enough bytes in flight at an occupancy of a quarter. Adam, with four
// operands, takes half of that, and so does pass B on fp64.
constexpr int kAccess = 16;
template <class T>
constexpr int kGroup = kAccess / int(sizeof(T));
template <class T>
constexpr int kInFlight = sizeof(T) == 2 ? 2 : 4;

constexpr int alignment(int bytes) {
  return bytes < kAccess ? bytes : kAccess;
}
template <class E, int kCount>
struct alignas(alignment(int(sizeof(E)) * kCount)) Pack {
  E v[kCount];
};
// The element j of a pack in the type of the arithmetic; of two bfloat16 in a word at the price of one instruction.
template <class E, int kCount>
__device__ __forceinline__ auto widen_at(const Pack<E, kCount>& x, int j) {
  return widen(x.v[j]);
}
template <int kCount>
__device__ __forceinline__ float widen_at(const Pack<bfloat16, kCount>& x, int j) {
  uint32_t word;
  memcpy(&word, &x.v[j & ~1], sizeof word);
  return float_of(j % 2 == 0 ? word << 16 : word & 0xffff0000u);
}
// What moves a pack at once. Only averages that are narrower than the arithmetic fill less than 16 bytes.
template <int kBytes>
struct WordOf {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};

// NOTE [cache hints]
// `soon`: read again by the next pass over the model or by the forward pass (g, m, w in pass A, which
// writes none of them; the weights that B and C write), worth keeping in the L2. `late`: not touched before all of the
// model has gone by, so it should leave the L2 first. Both are spelled as intrinsics: nvcc may split an ordinary copy
// of 16 bytes into words and not put it together again.
enum class Reuse { soon, late };

template <Reuse kReuse, class Word>
__device__ __forceinline__ Word load_word(const Word* p) {
  return kReuse == Reuse::late ? __ldcs(p) : __ldg(p);
}
template <Reuse kReuse, class E, int kCount>
__device__ __forceinline__ void load_vector(const E* p, Pack<E, kCount>& to) {
  using Word = typename WordOf<int(sizeof to)>::type;
  const Word* from = reinterpret_cast<const Word*>(p);
  Word* words = reinterpret_cast<Word*>(&to);
#pragma unroll
  for (int i = 0; i < int(sizeof to / sizeof(Word)); ++i) words[i] = load_word<kReuse>(from + i);
}
template <Reuse kReuse, class E, int kCount>
__device__ __forceinline__ void store_vector(E* p, const Pack<E, kCount>& from) {
  using Word = typename WordOf<int(sizeof from)>::type;
  Word* to = reinterpret_cast<Word*>(p);
  const Word* words = reinterpret_cast<const Word*>(&from);
#pragma unroll
  for (int i = 0; i < int(sizeof from / sizeof(Word)); ++i) {
    if constexpr (kReuse == Reuse::late) {
      __stcs(to + i, words[i]);
    } else {
      __stwb(to + i, words[i]);
    }
  }
}
template <class E, int kCount>
__device__ __forceinline__ void load_elements(const E* p, int count, Pack<E, kCount>& to) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) to.v[j] = j < count ? p[j] : E{};
}
template <class E, int kCount>
__device__ __forceinline__ void store_elements(E* p, int count, const Pack<E, kCount>& from) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (j < count) p[j] = from.v[j];
  }
}

// Whether all of these may be accessed 16 bytes at a time; a null pointer is no obstacle.
template <class... Pointers>
__device__ __forceinline__ bool is_aligned(const Pointers*... p) {
  return (reinterpret_cast<uintptr_t>(p) | ...) % kAccess == 0;
}

// How a group is reached. Whole: it is complete and every pointer is aligned.
struct Whole {
  template <Reuse kReuse, class E, int kCount>
  __device__ __forceinline__ void load(const E* p, Pack<E, kCount>& to) const {
    load_vector<kReuse>(p, to);
  }
  template <Reuse kReuse, class E, int kCount>
  __device__ __forceinline__ void store(E* p, const Pack<E, kCount>& from) const {
    store_vector<kReuse>(p, from);
  }
  __device__ __forceinline__ bool has(int) const { return true; }
};

// Part: the row ends inside the group, or some pointer is misaligned; the others still move 16 bytes at once.
struct Part {
  int count;

  template <Reuse kReuse, class E, int kCount>
  __device__ __forceinline__ void load(const E* p, Pack<E, kCount>& to) const {
    if (count == kCount && is_aligned(p)) {
      load_vector<kReuse>(p, to);
    } else {
      load_elements(p, count, to);
    }
  }
  template <Reuse kReuse, class E, int kCount>
  __device__ __forceinline__ void store(E* p, const Pack<E, kCount>& from) const {
    if (count == kCount && is_aligned(p)) {
      store_vector<kReuse>(p, from);
    } else {
      store_elements(p, count, from);
    }
  }
  __device__ __forceinline__ bool has(int j) const { return j < count; }
};

}  // namespace fsam::cuda
