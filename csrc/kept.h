// How what is kept of gradients between steps lies in memory: NOTE [reuse of the second gradient] in formulas.h.
#pragma once

#include <cstdint>

#include "storage.h"

namespace fsam {

// A flat buffer in the type of the arithmetic or, where `narrow`, in bfloat16.
struct Kept {
  void* data = nullptr;  // null where there is none
  bool narrow = false;

  FSAM_FN explicit operator bool() const { return data != nullptr; }
};

// The part of it that starts at an element of the flat buffer. S is the type of the arithmetic.
template <class S>
FSAM_FN Kept part_of(const Kept& kept, int64_t element) {
  if (!kept) return {};
  const int64_t size = kept.narrow ? sizeof(bfloat16) : sizeof(S);
  return {static_cast<char*>(kept.data) + element * size, kept.narrow};
}

// What a step between two ascents makes its gradient of.
struct Reused {
  Kept v;
  const double* squares = nullptr;  // |g|^2, |v|^2; where v is
};

}  // namespace fsam
