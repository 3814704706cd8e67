// The name under which a library registers the schema and its kernels.
//
// Another library may hold the same kernels for another target (the tests compile the CUDA source for the CPU): it
// takes a namespace of its own.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef FSAM_NAMESPACE
#define FSAM_NAMESPACE fsam_ext
#endif

// torch's macros paste their arguments, so these need one more expansion.
#define FSAM_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define FSAM_LIBRARY_FRAGMENT(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)
#define FSAM_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
