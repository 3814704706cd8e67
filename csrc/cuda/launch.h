// From a table of tensors to kernel launches: the interface between the op bindings and the kernels.
//
// Each function queues its kernels on `stream` and returns at once. A table of any size is split into as many launches
// as it takes; the chunks keep their numbers. Instantiated for each storage type in a source of its own.
#pragma once

#include <cuda_runtime.h>

#include "../tensor_table.h"
#include "arguments.h"

namespace fsam::cuda {

// Pass A: fills the slots and sums them into stats[0:kStatistics].
template <class T>
cudaError_t launch_noise_norm(const TensorTable& rows, bool adaptive, const NoiseNormArguments<compute_t<T>>& arguments,
                              double* stats, cudaStream_t stream);

template <class T>
cudaError_t launch_perturb(const TensorTable& rows, const PerturbArguments<T>& arguments, cudaStream_t stream);

// Where there is a grad_sq it gets the sum of the slots.
template <class T>
cudaError_t launch_update_ema(const TensorTable& rows, const UpdateEmaArguments<compute_t<T>>& arguments,
                              double* grad_sq, cudaStream_t stream);

// Fills the slots and sums them into sums[0:kDots].
template <class T>
cudaError_t launch_dots(const TensorTable& rows, const DotsArguments<compute_t<T>>& arguments, double* sums,
                        cudaStream_t stream);

// Fills the slots and sums them into kept_sq[0].
template <class T>
cudaError_t launch_project(const TensorTable& rows, const ProjectArguments<compute_t<T>>& arguments, double* kept_sq,
                           cudaStream_t stream);

template <class T>
cudaError_t launch_restore(const TensorTable& rows, const RestoreArguments<T>& arguments, cudaStream_t stream);

template <class T>
cudaError_t launch_restore_sgd(const TensorTable& rows, const SgdArguments<T>& arguments, cudaStream_t stream);

// For the two types of arithmetic, not for each storage type.
template <class S>
cudaError_t launch_count_steps(const CountArguments<S>& arguments, cudaStream_t stream);

template <class T>
cudaError_t launch_restore_adam(const TensorTable& rows, const AdamArguments<T>& arguments, cudaStream_t stream);

}  // namespace fsam::cuda
