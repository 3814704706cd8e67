// What to do about errors of the CUDA runtime that a user can mend.
#pragma once

#include <cuda_runtime.h>

namespace fsam::cuda {

// The end of a sentence about a launch that failed with `error`; empty where there is nothing to add.
const char* advice(cudaError_t error);

}  // namespace fsam::cuda
