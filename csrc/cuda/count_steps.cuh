// The step counts of Adam and each row's bias corrections.
#pragma once

#include "scalars.cuh"

namespace fsam::cuda {

// NOTE [steps are counted once]
// A thread for each parameter of a segment: one more step unless the update is left out, and for those that start a row
// the two powers of its bias corrections. Here they cost two powers a row; in pass C every block would wait for them.
constexpr int kCountThreads = 128;

template <class S>
__global__ void __launch_bounds__(kCountThreads) count_steps_kernel(const CountArguments<S> a) {
  const int64_t i = int64_t(blockIdx.x) * kCountThreads + threadIdx.x;
  if (i >= a.members) return;
  float* step = a.steps + a.index[i];
  const float count = skips(a) ? *step : *step + 1.0f;
  *step = count;
  if (i < a.rows) a.corrections[i] = bias_correction<S>(value_of(a.lr), a.beta1, a.beta2, double(count));
}

}  // namespace fsam::cuda
