// The division of csrc/cuda/divide.cuh against IEEE division: every mantissa where that is feasible, and the edges.
//
// Prints how many results differ, and exits with 1 where any does.

#include <cuda_runtime.h>

#include <cstdio>
#include <random>

#include "../../csrc/cuda/divide.cuh"

namespace {

using fsam::bits_of;
using fsam::float_of;
using fsam::cuda::GroupDivision;

int64_t differences = 0;

void expect(bool same, const char* what, float a, float b) {
  if (same) return;
  if (differences++ < 5) printf("%s of %a and %a has other bits\n", what, a, b);
}
void check_root(const GroupDivision& division, float x) {
  expect(bits_of(division.root(x)) == bits_of(sqrtf(x)), "the root", x, x);
}
void check_quotient(const GroupDivision& division, float a, float b) {
  expect(bits_of(division.quotient(a, b)) == bits_of(a / b), "the quotient", a, b);
}
void check_corrected(float root, float correction) {
  const GroupDivision division(1e-8f, correction);
  expect(bits_of(division.corrected(root, correction)) == bits_of(root / correction), "the correction", root,
         correction);
}

}  // namespace

int main() {
  const GroupDivision division(1e-8f, 0.5f);
  std::mt19937_64 random(1);
  const auto mantissa = [&] { return uint32_t(random()) & 0x7fffff; };

  // Every mantissa of both parities of the exponent, and every magnitude in range.
  for (uint32_t m = 0; m < 1u << 24; ++m) check_root(division, float_of(0x3f800000u + m));
  for (int exponent = -100; exponent < 40; ++exponent) {
    for (int i = 0; i < 1000; ++i) check_root(division, float_of(uint32_t(exponent + 127) << 23 | mantissa()));
  }
  // Every mantissa of a divisor, and magnitudes to the edges of the range.
  for (uint32_t m = 0; m < 1u << 23; ++m) {
    check_quotient(division, float_of(0x3f800000u | mantissa()), float_of(0x3f800000u | m));
    if (m % 4 == 0) check_corrected(float_of(0x3f800000u | mantissa()), float_of(0x3f000000u | m));
  }
  for (int i = 0; i < 4000000; ++i) {
    const float a = float_of(uint32_t(int(random() % 120) - 80 + 127) << 23 | mantissa());  // [2^-80, 2^40)
    const float b = float_of(uint32_t(int(random() % 101) - 60 + 127) << 23 | mantissa());  // [2^-60, 2^41)
    check_quotient(division, random() % 2 ? a : -a, b);
    const float root = float_of(uint32_t(int(random() % 70) - 50 + 127) << 23 | mantissa());        // [2^-50, 2^20)
    const float correction = float_of(uint32_t(int(random() % 21) - 20 + 127) << 23 | mantissa());  // [2^-20, 2)
    check_corrected(root, correction);
  }
  // Quotients next to the middle between two floats, where a rounding may go either way.
  for (int i = 0; i < 4000000; ++i) {
    const uint64_t b = 0x800000 | mantissa(), middle = 2 * (0x800000 | uint64_t(mantissa())) + 1;
    uint64_t a = (b * middle >> 24) + random() % 3 - 1;
    if (a >= 1 << 24) a >>= 1;
    check_quotient(division, float(a), float(b));
  }
  // Zeros keep their signs, and the edges belong to the range.
  for (const float a : {0.0f, -0.0f, 0x1p-80f, -0x1p-80f, 0x1p40f, -0x1p40f}) {
    for (const float b : {0x1p-60f, 0x1.fffffep-60f, 1e-8f, 1.0f, 0x1.fffffep0f, 0x1p41f})
      check_quotient(division, a, b);
    for (const float v : {0.0f, 0x1p-100f, 1.0f, 0x1p40f}) expect(division.fits(a, v), "the range", a, v);
  }
  for (const float v : {0.0f, 0x1p-100f, 0x1.fffffep-100f, 0x1p40f}) check_root(division, v);
  for (const float correction : {0x1p-20f, 1.0f, 2.0f}) check_corrected(0.0f, correction);
  // What lies outside is refused.
  for (const float a : {0x1.fffffep-81f, -0x1p-81f, 0x1p-149f, -0x1p-149f, 0x1.000002p40f, INFINITY, -INFINITY, NAN}) {
    expect(!division.fits(a, 1.0f), "the range", a, 1.0f);
  }
  for (const float v : {-0.0f, -1.0f, 0x1.fffffep-101f, 0x1p-149f, 0x1.000002p40f, INFINITY, -INFINITY, NAN, -NAN}) {
    expect(!division.fits(1.0f, v), "the range", 1.0f, v);
  }
  for (const float eps : {0.0f, 0x1p-61f, -1e-8f, 0x1p21f, INFINITY, NAN}) {
    expect(!GroupDivision(eps, 1.0f).usable, "the range", eps, 1.0f);
  }
  for (const float correction : {0.0f, 0x1p-21f, -0.5f, 2.5f, INFINITY, NAN}) {
    expect(!GroupDivision(1e-8f, correction).usable, "the range", 1e-8f, correction);
  }
  printf("%ld differences\n", long(differences));
  return differences != 0;
}
