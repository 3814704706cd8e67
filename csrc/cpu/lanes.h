// Sixteen floats (or eight doubles) as one value that the formulas can use: 64 bytes, in the
// vectors of this ISA.
//
// The number of lanes is fixed, not the ISA's: a sum over lanes has the same bits on SSE2, AVX2,
// AVX-512 and NEON. Everything lives in a namespace of the ISA, because this header is compiled
// once for each (leaf_loops.cpp), and two ISAs' versions of one inline function must never be
// merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../storage.h"

namespace fsam::FSAM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLaneBytes = 64;
constexpr int kParts = kLaneBytes / kVectorBytes;

// NOTE [vectors move one by one]
// Copying all lanes at once with memcpy is correct but slow: g++ then moves 16 bytes at a time through the stack, and
// each wider load from there waits for the stores before it. Five times slower than memory, as measured.
template <class E>
struct Vector {
  typedef E type __attribute__((vector_size(kVectorBytes)));
  typedef E packed __attribute__((vector_size(kVectorBytes / 4 * sizeof(E))));  // as many as 32-bit lanes
};

// One bit pattern of all ones or zeros for each lane.
template <class E>
struct Mask {
  using type = decltype(typename Vector<E>::type{} == typename Vector<E>::type{});
  type part[kParts];
};

template <class E>
struct Lanes {
  static constexpr int kCount = kLaneBytes / int(sizeof(E));
  using vector = typename Vector<E>::type;
  vector part[kParts];

  Lanes() = default;
  FSAM_FN Lanes(E scalar) {
    for (int k = 0; k < kParts; ++k) part[k] = scalar - vector{};
  }
  FSAM_FN Lanes operator-() const {
    Lanes r;
    for (int k = 0; k < kParts; ++k) r.part[k] = -part[k];
    return r;
  }

#define FSAM_LANES_OPERATOR(op)                                          \
  friend FSAM_FN Lanes operator op(Lanes a, Lanes b) {                   \
    Lanes r;                                                             \
    for (int k = 0; k < kParts; ++k) r.part[k] = a.part[k] op b.part[k]; \
    return r;                                                            \
  }
  FSAM_LANES_OPERATOR(+)
  FSAM_LANES_OPERATOR(-)
  FSAM_LANES_OPERATOR(*)
  FSAM_LANES_OPERATOR(/)
  FSAM_LANES_OPERATOR(&)
  FSAM_LANES_OPERATOR(|)
  FSAM_LANES_OPERATOR(^)
  FSAM_LANES_OPERATOR(<<)
  FSAM_LANES_OPERATOR(>>)
#undef FSAM_LANES_OPERATOR

#define FSAM_LANES_COMPARISON(op)                                        \
  friend FSAM_FN Mask<E> operator op(Lanes a, Lanes b) {                 \
    Mask<E> r;                                                           \
    for (int k = 0; k < kParts; ++k) r.part[k] = a.part[k] op b.part[k]; \
    return r;                                                            \
  }
  FSAM_LANES_COMPARISON(==)
  FSAM_LANES_COMPARISON(!=)
  FSAM_LANES_COMPARISON(<)
  FSAM_LANES_COMPARISON(>)
  FSAM_LANES_COMPARISON(>=)
#undef FSAM_LANES_COMPARISON
};

template <class E, class M>
FSAM_FN Lanes<E> select_lanes(const Mask<M>& mask, Lanes<E> a, Lanes<E> b) {
  Lanes<E> r;
  for (int k = 0; k < kParts; ++k) r.part[k] = mask.part[k] ? a.part[k] : b.part[k];
  return r;
}

// ---- What formulas.h asks of a value
// ---------------------------------------------------------------------------

template <class E>
FSAM_FN Mask<E> is_nan(Lanes<E> x) {
  return x != x;
}
template <class E>
FSAM_FN Mask<E> is_finite(Lanes<E> x) {
  return x - x == Lanes<E>(0);
}
template <class E>
FSAM_FN Lanes<E> select(const Mask<E>& mask, Lanes<E> a, Lanes<E> b) {
  return select_lanes(mask, a, b);
}
template <class E>
FSAM_FN Lanes<E> square_root(Lanes<E> x) {
  Lanes<E> r;
  for (int k = 0; k < kParts; ++k) {
    if constexpr (sizeof(E) == 4) {
#if defined(__AVX512F__)
      r.part[k] = _mm512_sqrt_ps(x.part[k]);
#elif defined(__AVX2__)
      r.part[k] = _mm256_sqrt_ps(x.part[k]);
#elif defined(__x86_64__)
      r.part[k] = _mm_sqrt_ps(x.part[k]);
#else
      for (int i = 0; i < 4; ++i) r.part[k][i] = __builtin_sqrtf(x.part[k][i]);
#endif
    } else {
#if defined(__AVX512F__)
      r.part[k] = _mm512_sqrt_pd(x.part[k]);
#elif defined(__AVX2__)
      r.part[k] = _mm256_sqrt_pd(x.part[k]);
#elif defined(__x86_64__)
      r.part[k] = _mm_sqrt_pd(x.part[k]);
#else
      for (int i = 0; i < 2; ++i) r.part[k][i] = __builtin_sqrt(x.part[k][i]);
#endif
    }
  }
  return r;
}

// The sum of all lanes, by halves: the order is fixed with the number of lanes.
template <class E>
FSAM_FN E sum(Lanes<E> x) {
  E lane[Lanes<E>::kCount];
  memcpy(lane, &x, sizeof lane);
  for (int half = Lanes<E>::kCount / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// ---- What storage.h asks of bit patterns
// -----------------------------------------------------------------------

template <class M>
FSAM_FN Lanes<uint32_t> choose(const Mask<M>& mask, Lanes<uint32_t> a, Lanes<uint32_t> b) {
  return select_lanes(mask, a, b);
}
FSAM_FN Lanes<uint32_t> bits_of(Lanes<float> x) {
  Lanes<uint32_t> r;
  for (int k = 0; k < kParts; ++k) r.part[k] = (Vector<uint32_t>::type)x.part[k];
  return r;
}
FSAM_FN Lanes<float> float_of(Lanes<uint32_t> bits) {
  Lanes<float> r;
  for (int k = 0; k < kParts; ++k) r.part[k] = (Vector<float>::type)bits.part[k];
  return r;
}
FSAM_FN Lanes<float> number(Lanes<uint32_t> integers) {
  Lanes<float> r;
  typedef int32_t Signed __attribute__((vector_size(kVectorBytes)));  // no ISA before AVX-512 converts unsigned
  for (int k = 0; k < kParts; ++k)
    r.part[k] = __builtin_convertvector((Signed)integers.part[k], typename Vector<float>::type);
  return r;
}

// Towards zero, for values in [0, 2^31).
FSAM_FN Lanes<uint32_t> integer(Lanes<float> x) {
  Lanes<uint32_t> r;
  typedef int32_t Signed __attribute__((vector_size(kVectorBytes)));
  for (int k = 0; k < kParts; ++k) r.part[k] = (Vector<uint32_t>::type) __builtin_convertvector(x.part[k], Signed);
  return r;
}

// start, start + 1, start + 2, ...
FSAM_FN Lanes<uint32_t> counting_from(uint32_t start) {
  alignas(kLaneBytes) static const uint32_t kFirst[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Lanes<uint32_t> r;
  for (int k = 0; k < kParts; ++k) memcpy(&r.part[k], kFirst + k * (kVectorBytes / 4), kVectorBytes);
  return r + start;
}

// What the averages of eight bits ask
FSAM_FN Lanes<float> largest_magnitude(Lanes<float> largest, Lanes<float> x) {
  const Lanes<float> magnitude = select(x < Lanes<float>(0), -x, x);
  return select(magnitude > largest, magnitude, largest);
}
FSAM_FN float largest_of(Lanes<float> x) {
  float lane[Lanes<float>::kCount];
  memcpy(lane, &x, sizeof lane);
  float largest = lane[0];
  for (const float value : lane) largest = value > largest ? value : largest;
  return largest;
}

// ---- Memory
// ----------------------------------------------------------------------------------------------------

// As many values of storage type T as there are lanes, as they lie in memory.
template <class T>
struct Packed {
  typename Vector<T>::type part[kParts];
};
template <>
struct Packed<bfloat16> {
  Vector<uint16_t>::packed part[kParts];
};
template <>
struct Packed<half> {
  Vector<uint16_t>::packed part[kParts];
};
template <>
struct Packed<int8_t> {
  Vector<int8_t>::packed part[kParts];
};

template <class T>
using lanes_t = Lanes<compute_t<T>>;
template <class T>
constexpr int kCount = lanes_t<T>::kCount;

FSAM_FN Lanes<uint32_t> zero_extend(const Vector<uint16_t>::packed (&packed)[kParts]) {
  Lanes<uint32_t> r;
  for (int k = 0; k < kParts; ++k) r.part[k] = __builtin_convertvector(packed[k], Vector<uint32_t>::type);
  return r;
}
template <class T>
FSAM_FN lanes_t<T> widen(const Packed<T>& x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return widen_bfloat16(zero_extend(x.part));
  } else if constexpr (std::is_same_v<T, half>) {
    return widen_half(zero_extend(x.part));
  } else if constexpr (std::is_same_v<T, int8_t>) {
    Lanes<float> r;
    for (int k = 0; k < kParts; ++k) r.part[k] = __builtin_convertvector(x.part[k], Vector<float>::type);
    return r;
  } else {
    lanes_t<T> r;
    for (int k = 0; k < kParts; ++k) r.part[k] = x.part[k];
    return r;
  }
}
template <class T>
FSAM_FN Packed<T> low_bits(Lanes<uint32_t> bits) {
  Packed<T> r;
  for (int k = 0; k < kParts; ++k)
    r.part[k] = __builtin_convertvector(bits.part[k], std::remove_reference_t<decltype(r.part[k])>);
  return r;
}
template <class T>
FSAM_FN Packed<T> narrow(lanes_t<T> x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return low_bits<T>(narrow_bfloat16(x));
  } else if constexpr (std::is_same_v<T, half>) {
    return low_bits<T>(narrow_half(x));
  } else {
    Packed<T> r;
    for (int k = 0; k < kParts; ++k) r.part[k] = x.part[k];
    return r;
  }
}
template <class T>
FSAM_FN Packed<T> narrow_stochastically(lanes_t<T> x, Lanes<uint32_t> random) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return low_bits<T>(narrow_bfloat16_stochastically(x, random));
  } else {
    return low_bits<T>(narrow_half_stochastically(x, random));
  }
}

// Whether two groups of integers are the same.
template <class T>
FSAM_FN bool same_bits(const Packed<T>& a, const Packed<T>& b) {
  auto different = a.part[0] ^ b.part[0];
  for (int k = 1; k < kParts; ++k) different |= a.part[k] ^ b.part[k];
  uint64_t words[sizeof different / 8], any = 0;
  memcpy(words, &different, sizeof different);
  for (const uint64_t word : words) any |= word;
  return any == 0;
}

// A store that does not read its line into the cache first. The caller fences once it is done.
template <class Part>
FSAM_FN void stream_part(void* to, const Part& part) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Part) == 64) {
    _mm512_stream_si512((__m512i*)to, (__m512i)part);
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(Part) == 32) {
    _mm256_stream_si256((__m256i*)to, (__m256i)part);
    return;
  }
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(Part) == 16) {
    _mm_stream_si128((__m128i*)to, (__m128i)part);
    return;
  }
#endif
  memcpy(to, &part, sizeof part);
}
FSAM_FN void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// How a loop reaches memory: all lanes at once, or only the first `count` where a row ends.
struct Whole {
  template <class T>
  FSAM_FN Packed<T> load(const T* p) const {
    Packed<T> x;
    for (int k = 0; k < kParts; ++k) memcpy(&x.part[k], (const char*)p + k * sizeof x.part[k], sizeof x.part[k]);
    return x;
  }
  template <class T>
  FSAM_FN void store(T* p, const Packed<T>& x) const {
    for (int k = 0; k < kParts; ++k) memcpy((char*)p + k * sizeof x.part[k], &x.part[k], sizeof x.part[k]);
  }
  template <class T>
  FSAM_FN void stream(T* p, const Packed<T>& x) const {
    for (int k = 0; k < kParts; ++k) stream_part((char*)p + k * sizeof x.part[k], x.part[k]);
  }
};
struct Part {
  int count;
  template <class T>
  FSAM_FN Packed<T> load(const T* p) const {
    Packed<T> x{};
    memcpy(&x, p, count * sizeof(T));
    return x;
  }
  template <class T>
  FSAM_FN void store(T* p, const Packed<T>& x) const {
    memcpy(p, &x, count * sizeof(T));
  }
  template <class T>
  FSAM_FN void stream(T* p, const Packed<T>& x) const {
    store(p, x);
  }
};

}  // namespace fsam::FSAM_ISA
