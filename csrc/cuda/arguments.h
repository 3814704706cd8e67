// What the kernels are told beside the table of tensors: plain data, copied into the kernels' parameters.
#pragma once

#include "../average.h"
#include "../kept.h"

namespace fsam::cuda {

// NOTE [numbers on the device]
// The loss scale, a capturable learning rate, the norm: whatever lives in a tensor is read by the
// kernel that needs it and never by the host, so nothing waits and a CUDA graph replays with the
// values of the day. One thread computes what follows from them, in double, for its whole block.
struct Number {
  const void* data;  // of a tensor of one element, or null
  bool is_double;
  double otherwise;
};

// Pointers named after state are to flat buffers.
template <class S>
struct NoiseNormArguments {
  Average ema;
  Number grad_scale;
  double sigma, lmbda;
  bool updated;
  S* slots;  // [kStatistics][chunks]
  int64_t chunks;
};

template <class T>
struct PerturbArguments {
  Average ema;
  T* backup;  // null where there are masters
  compute_t<T>* master;
  const double* stats;
  Number grad_scale, rho;
  double sigma, lmbda, eps;
  bool adaptive, updated, feeds;
  Forward forward;
  compute_t<T>* effect;  // null, or [chunks][kEffect]
  Kept kept;             // gets the gradient, where there is one
};

template <class S>
struct UpdateEmaArguments {
  Average ema;
  const double* stats;  // or null
  Number grad_scale, found_inf;
  double lmbda;
  S* slots;  // null, or [chunks]
};

// <g, k> and <k, k>.
constexpr int kDots = 2;

template <class S>
struct DotsArguments {
  Kept kept;
  Number grad_scale;
  S* slots;  // [kDots][chunks]
  int64_t chunks;
};

template <class S>
struct ProjectArguments {
  Kept kept;
  const double* sums;   // kDots of them
  const double* stats;  // or null
  Number grad_scale, found_inf;
  S* slots;  // [chunks]
};

template <class T>
struct RestoreArguments {
  const T* backup;  // null where there are masters
  const compute_t<T>* master;
};

// What the two fused bases share.
template <class T>
struct UpdateArguments {
  const T* backup;       // null: the update starts from the masters, or else from the parameters as they are
  compute_t<T>* master;  // or null
  const double* stats;   // or null
  Number found_inf, grad_scale, lr;
  const int64_t* rounding;  // null, or a seed and the number of the step: NOTE [stochastic rounding]
  bool adopts;              // formulas.h, NOTE [masters adopt]
  Reused reused;            // kernels of their own
  double reuse, reuse_eps;
};

template <class T>
struct SgdArguments {
  UpdateArguments<T> update;
  compute_t<T>* momentum_buffer;  // null without momentum
  double momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

template <class S>
struct CountArguments {
  float* steps;
  const int64_t* index;
  int64_t members, rows;
  BiasCorrection<S>* corrections;
  const double* stats;  // or null
  Number found_inf, lr;
  double beta1, beta2;
};

template <class T>
struct AdamArguments {
  UpdateArguments<T> update;
  compute_t<T>* exp_avg;
  compute_t<T>* exp_avg_sq;
  const BiasCorrection<compute_t<T>>* corrections;  // of each row
  double beta1, beta2, eps, weight_decay;
  bool decoupled, maximize;
};

}  // namespace fsam::cuda
