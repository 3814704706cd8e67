// The kernels for fp32 parameters: a source of their own, so that the storage types compile in parallel.

#include "launch.cuh"

namespace fsam::cuda {
FSAM_INSTANTIATE_LAUNCHES(float)
template cudaError_t launch_count_steps<float>(const CountArguments<float>&, cudaStream_t);
}  // namespace fsam::cuda
