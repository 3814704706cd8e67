// The storage types (double, float, bfloat16, half) and their conversion to and from the type of
// the arithmetic.
//
// bfloat16 and half are bit patterns converted with integer operations, rounding to nearest even:
// the same bits on every compiler, ISA and device, whatever the floating-point mode of the thread
// (flush-to-zero included).
#pragma once

#include <cstdint>
#include <cstring>

#include "formulas.h"

namespace fsam {

struct bfloat16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

// Arithmetic is fp32 for every storage type but fp64.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

// What an integer vector and an integer must both offer to convert 16-bit floats; the scalar
// versions.
FSAM_FN uint32_t choose(bool condition, uint32_t a, uint32_t b) {
  return condition ? a : b;
}
FSAM_FN uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
FSAM_FN float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
FSAM_FN float number(uint32_t integer) {
  return float(integer);
}

// `U` is uint32_t or a vector of them, holding 16-bit patterns in their low halves.
template <class U>
FSAM_FN auto widen_bfloat16(U bits) {
  return float_of(bits << 16);
}

template <class V>
FSAM_FN auto narrow_bfloat16(V x) {
  const auto bits = bits_of(x);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return choose(x != x, rounded * 0u + 0x7fc0u, rounded);
}

template <class U>
FSAM_FN auto widen_half(U bits) {
  const U sign = (bits & 0x8000u) << 16;
  const U magnitude = bits & 0x7fffu;
  const U normal = (magnitude << 13) + (112u << 23);          // rebias the exponent from 15 to 127
  const U special = normal + (112u << 23);                    // inf and nan: exponent 31 becomes 255
  const U subnormal = bits_of(number(magnitude) * 0x1p-24f);  // exact: an integer times a power of two
  const U finite = choose(magnitude < 0x0400u, subnormal, normal);
  return float_of(sign | choose(magnitude >= 0x7c00u, special, finite));
}

template <class V>
FSAM_FN auto narrow_half(V x) {
  const auto bits = bits_of(x);
  const auto sign = (bits >> 16) & 0x8000u;
  const auto magnitude = bits & 0x7fffffffu;
  const auto rebased = magnitude - (112u << 23);
  const auto normal = (rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13;
  // Below 2^-14 the unit is 2^-24, which is the last bit of a float in [0.5, 1): adding 0.5 rounds
  // there.
  const auto subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const auto finite = choose(magnitude < 0x38800000u, subnormal, normal);
  const auto infinity = rebased * 0u + 0x7c00u;
  const auto overflowed = choose(magnitude >= 0x477ff000u, infinity, finite);  // 65520 and above
  return sign | choose(magnitude > 0x7f800000u, infinity | 0x200u, overflowed);
}

FSAM_FN float load(const float* p) {
  return *p;
}
FSAM_FN double load(const double* p) {
  return *p;
}
FSAM_FN float load(const bfloat16* p) {
  return widen_bfloat16(uint32_t(p->bits));
}
FSAM_FN float load(const half* p) {
  return widen_half(uint32_t(p->bits));
}

FSAM_FN void store(float* p, float x) {
  *p = x;
}
FSAM_FN void store(double* p, double x) {
  *p = x;
}
FSAM_FN void store(bfloat16* p, float x) {
  p->bits = uint16_t(narrow_bfloat16(x));
}
FSAM_FN void store(half* p, float x) {
  p->bits = uint16_t(narrow_half(x));
}

}  // namespace fsam
