// How the moving average of gradients lies in memory: which types may store it, and where an element of it is.
#pragma once

#include <cstdint>

#include "storage.h"

namespace fsam {

enum class AverageStorage : int {
  none,      // SAM, ASAM: there is no average
  full,      // the type of the arithmetic
  bfloat16,  // half of that
  int8,      // a quarter, and a scale for each block: NOTE [int8 averages]
};

struct Average {
  AverageStorage storage = AverageStorage::none;
  void* data = nullptr;
  float* scales = nullptr;  // int8 only, one for each kQuantized elements
};

// Loops are compiled for the type that stores the average, and void where there is none.
template <class M>
constexpr bool is_quantized = std::is_same_v<M, int8_t>;
template <class M>
constexpr bool has_average = !std::is_void_v<M>;

template <class M>
struct StoredAs {
  using type = M;
};

// Calls call(StoredAs<M>{}). Arithmetic in double goes with averages in double.
template <class S, class Call>
FSAM_FN auto choose_average(AverageStorage storage, const Call& call) {
  if constexpr (sizeof(S) == 4) {
    if (storage == AverageStorage::bfloat16) return call(StoredAs<bfloat16>{});
    if (storage == AverageStorage::int8) return call(StoredAs<int8_t>{});
  }
  if (storage == AverageStorage::full) return call(StoredAs<S>{});
  return call(StoredAs<void>{});
}

// The part of an average that starts at an element of the flat buffer.
template <class M>
struct AverageSlice {
  M* data = nullptr;
  float* scales = nullptr;
};
template <class M>
FSAM_FN AverageSlice<M> slice_of(const Average& average, int64_t element) {
  AverageSlice<M> slice;
  if constexpr (has_average<M>) slice.data = static_cast<M*>(average.data) + element;
  if constexpr (is_quantized<M>) slice.scales = average.scales + element / kQuantized;
  return slice;
}

}  // namespace fsam
