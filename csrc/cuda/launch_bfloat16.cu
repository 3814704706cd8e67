// The kernels for bf16 parameters: a source of their own, so that the storage types compile in parallel.

#include "launch.cuh"

namespace fsam::cuda {
FSAM_INSTANTIATE_LAUNCHES(bfloat16)
}  // namespace fsam::cuda
