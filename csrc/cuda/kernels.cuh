// The three passes as CUDA kernels over a table of tensors, one file a pass: plain pointers in, no torch.
//
// nvcc compiles them for GPUs; the tests compile them, unmodified, with a host compiler against an emulation of CUDA
// (tests/cuda_emulation) and run them on the CPU.
#pragma once

#include "count_steps.cuh"
#include "dots.cuh"
#include "noise_norm.cuh"
#include "perturb.cuh"
#include "project.cuh"
#include "restore.cuh"
#include "restore_adam.cuh"
#include "restore_sgd.cuh"
#include "update_ema.cuh"
