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

// What the forward pass rounds weights to, beyond how they are stored: autocast or a mixed-precision policy may.
enum class Forward : int { as_stored, bfloat16, half };

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
FSAM_FN uint32_t integer(float x) {  // towards zero, x in [0, 2^31)
  return uint32_t(x);
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

// ---- Stochastic rounding
// -----------------------------------------------------------------------------------------------

// NOTE [stochastic rounding]
// A 16-bit weight is lost to small updates: rounding to nearest gives the old weight back. Rounding up with the
// probability that the cut-off part says keeps the update in the mean. The random bits come from a counter, not from a
// generator with state: a hash of the seed, the number of the step and the element's position in the flat state, so
// every backend and every number of threads draw the same ones.
// The high half of a position is taken once for a group of lanes: slices start at multiples of 16, so no group crosses
// 2^32.
FSAM_FN uint32_t rounding_key(uint64_t seed, uint64_t step) {
  uint64_t x = seed + step * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return uint32_t(x ^ (x >> 31));
}

// `element`: the low 32 bits of positions, `key` from rounding_key and the high bits (see rounding_key_of).
template <class U>
FSAM_FN U random_bits(U element, uint32_t key) {
  U x = element ^ U(key);
  x = (x ^ (x >> 16)) * U(0x85ebca6bu);
  x = (x ^ (x >> 13)) * U(0xc2b2ae35u);
  return x ^ (x >> 16);
}

// The key for elements whose positions share their high bits with `position`.
FSAM_FN uint32_t rounding_key_of(uint32_t key, int64_t position) {
  return key + uint32_t(uint64_t(position) >> 32) * 0x9e3779b9u;
}

template <class V, class U>
FSAM_FN auto narrow_bfloat16_stochastically(V x, U random) {
  const auto bits = bits_of(x);
  const auto cut = (bits + (random & 0xffffu)) >> 16;
  return choose((bits & 0x7f800000u) == 0x7f800000u, narrow_bfloat16(x), cut);
}

template <class V, class U>
FSAM_FN auto narrow_half_stochastically(V x, U random) {
  const auto bits = bits_of(x);
  const auto sign = (bits >> 16) & 0x8000u;
  const auto magnitude = bits & 0x7fffffffu;
  const auto normal = (magnitude - (112u << 23) + (random & 0x1fffu)) >> 13;
  // Below 2^-14 the unit is 2^-24: what is cut off of a multiple of it, plus a fraction below one.
  const auto small = choose(magnitude < 0x38800000u, magnitude, magnitude * 0u);
  const auto subnormal = integer(float_of(small) * 0x1p24f + number(random & 0x1fffu) * 0x1p-13f);
  const auto finite = choose(magnitude < 0x38800000u, subnormal, normal);
  return choose(magnitude >= 0x477fe000u, narrow_half(x), sign | finite);  // 65504 and above, inf and nan
}

// ---- Averages of eight bits
// --------------------------------------------------------------------------------------------

// NOTE [int8 averages]
// 128 consecutive elements of a row share one scale: their largest magnitude over 127, rounded up to 17 significant
// bits. An element is then off by at most half a scale; and as 127 times such a scale is exact in a float, what was
// read back and is stored again gives the same integers and the same scale. A block that has seen no gradient has a
// scale of NaN, so every element reads as unset: NOTE [an unset state is NaN]. Magnitudes below 2^-100 count as zero,
// or the inverse of their scale would overflow.
constexpr int64_t kQuantized = 128;

FSAM_FN float quantization_scale(float largest) {
  return largest >= 0x1p-100f ? float_of((bits_of(largest / 127.0f) + 0x7fu) & ~0x7fu) : 0.0f;
}
FSAM_FN float inverse_quantization_scale(float scale) {
  return scale > 0 ? 1.0f / scale : 0.0f;
}

// The nearest integer (to even) of x times the inverse scale, in the low eight bits: adding 1.5 * 2^23 leaves a float
// whose last bit counts ones.
template <class V>
FSAM_FN auto quantized(V x, float inverse_scale) {
  return bits_of(x * inverse_scale + 12582912.0f) & 0xffu;
}

}  // namespace fsam
