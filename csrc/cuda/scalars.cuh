// Numbers that a kernel reads on the device: see NOTE [numbers on the device] in arguments.h.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../formulas.h"
#include "arguments.h"

namespace fsam::cuda {

__device__ __forceinline__ double value_of(const Number& number) {
  if (number.data == nullptr) return number.otherwise;
  return number.is_double ? *static_cast<const double*>(number.data) : *static_cast<const float*>(number.data);
}

// Whether an update is left out: the ascent or the scaler met a non-finite gradient.
template <class Arguments>
__device__ __forceinline__ bool skips(const Arguments& a) {
  return (a.stats != nullptr && !is_finite(a.stats[0])) || value_of(a.found_inf) != 0;
}

// Calls body(true_type) or body(false_type): one branch for a group of elements in the place of one for each.
template <class Body>
__device__ __forceinline__ void for_flag(bool flag, const Body& body) {
  if (flag) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

}  // namespace fsam::cuda
