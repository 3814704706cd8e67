// How what is kept of gradients between steps lies in memory: NOTE [reuse of the second gradient] in formulas.h.
#pragma once

#include <cstdint>

#include "average.h"

namespace fsam {

// A flat buffer in the type of the arithmetic or, where `narrow`, in bfloat16.
struct Kept {
  void* data = nullptr;  // null where there is none
  bool narrow = false;

  explicit operator bool() const { return data != nullptr; }
};

// What a step between two ascents makes its gradient of.
struct Reused {
  Kept v;
  const double* squares = nullptr;  // |g|^2, |v|^2; where v is
};

// Calls call(StoredAs<K>{}), on the host; with void where nothing is kept. Inlined for the reason of choose_average.
template <class S, class Call>
inline __attribute__((always_inline)) auto choose_kept(const Kept& kept, const Call& call) {
  if constexpr (sizeof(S) == 4) {
    if (kept && kept.narrow) return call(StoredAs<bfloat16>{});
  }
  if (kept) return call(StoredAs<S>{});
  return call(StoredAs<void>{});
}

}  // namespace fsam
