// The kernels for fp16 parameters: a source of their own, so that the storage types compile in parallel.

#include "launch.cuh"

namespace fsam::cuda {
FSAM_INSTANTIATE_LAUNCHES(half)
}  // namespace fsam::cuda
