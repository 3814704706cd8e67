// The kernels for fp64 parameters: a source of their own, so that the storage types compile in parallel.

#include "launch.cuh"

namespace fsam::cuda {
FSAM_INSTANTIATE_LAUNCHES(double)
template cudaError_t launch_count_steps<double>(const CountArguments<double>&, cudaStream_t);
}  // namespace fsam::cuda
