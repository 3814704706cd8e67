// Quotients and square roots of a group of floats at once, without a branch for each.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../storage.h"

namespace fsam::cuda {

// NOTE [division of a group]
// Where nvcc divides or takes a root, it emits a check of the operands, a short sequence that is exact where the check
// lets it through, a call for the rest and a branch around it: three times an element in Adam. Elements then wait for
// one another, since nothing moves across the branches. Here the operands of a whole group are checked first, against a
// range inside that of nvcc's checks, and then take the short sequences, which are operation by operation those that
// nvcc 13 emits (the same from sm_75 to sm_120), so the bits are those of IEEE division. A group with an operand
// outside is divided as ever.
//
// That they are nvcc's matters: they are exact for each approximation that is rounded to nearest (every mantissa was
// tried: tests/cuda_emulation/division.cu), but of those that are off by one unit in the last place, which a GPU may
// give, a handful in 10^8 lead to a result that is off, too. nvcc vouches for those that a GPU does give.
//
// The range: no product or remainder below underflows or overflows. A zero is inside, because moments of parameters
// that have no gradient yet are zero; the remainders are negated, or -0 / b would be +0.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float approximate_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float approximate_reciprocal_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
// Where a GPU's approximation is off by one unit in the last place, the emulation's is rounded to nearest.
inline float approximate_reciprocal(float x) {
  return float(1.0 / double(x));
}
inline float approximate_reciprocal_root(float x) {
  return float(1.0 / ::sqrt(double(x)));
}
#endif

// The division of adam_step, for operands in range: to be asked for a call's scalars and for each pair of moments.
struct GroupDivision {
  bool usable;          // whether the scalars are in range
  float of_correction;  // the reciprocal of the bias correction

  GroupDivision() = default;
  __device__ __forceinline__ GroupDivision(float eps, float sqrt_second)
      : usable(0x1p-60f <= eps && eps <= 0x1p20f && 0x1p-20f <= sqrt_second && sqrt_second <= 2.0f),
        of_correction(reciprocal(sqrt_second)) {}

  // Zeros, or 2^-80 <= |exp_avg| <= 2^40 and 2^-100 <= exp_avg_sq <= 2^40.
  __device__ __forceinline__ bool fits(float exp_avg, float exp_avg_sq) const {
    const uint32_t twice = bits_of(exp_avg) << 1, square = bits_of(exp_avg_sq);  // twice: without its sign
    return (twice - 1u >= 2 * kBits<-80> - 1u) & (twice <= 2 * kBits<40>)&(square - 1u >= kBits<-100> - 1u) &
           (square <= kBits<40>);
  }

  __device__ __forceinline__ float root(float x) const {
    const float y = approximate_reciprocal_root(::fmaxf(x, 0x1p-100f));  // finite for zero, too
    const float s = x * y;
    return ::fmaf(::fmaf(-s, s, x), y * 0.5f, s);
  }
  __device__ __forceinline__ float corrected(float root, float sqrt_second) const {
    return quotient(root, sqrt_second, of_correction);
  }
  __device__ __forceinline__ float quotient(float a, float b) const { return quotient(a, b, reciprocal(b)); }

 private:
  template <int kExponent>
  static constexpr uint32_t kBits = uint32_t(kExponent + 127) << 23;  // of 2^kExponent

  static __device__ __forceinline__ float reciprocal(float b) {
    const float y = approximate_reciprocal(b);
    return ::fmaf(y, ::fmaf(-b, y, 1.0f), y);
  }
  static __device__ __forceinline__ float quotient(float a, float b, float reciprocal_of_b) {
    const float q = a * reciprocal_of_b;
    return ::fmaf(-::fmaf(b, q, -a), reciprocal_of_b, q);
  }
};

// Arithmetic in double divides as ever.
struct DoubleDivision : PlainDivision {
  static constexpr bool usable = true;

  DoubleDivision() = default;
  __device__ __forceinline__ DoubleDivision(double, double) {}
  __device__ __forceinline__ bool fits(double, double) const { return true; }
};
template <class S>
using DivisionFor = std::conditional_t<std::is_same_v<S, float>, GroupDivision, DoubleDivision>;

}  // namespace fsam::cuda
