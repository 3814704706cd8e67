"""Scalars and rounded operations that every kernel uses."""

import triton
import triton.language as tl

# NOTE [scalars are fp64]
# Hyperparameters arrive as fp64, what depends on them is computed in fp64 and rounded once: as in
# the C++ backends, and so with the same bits. A parameter without that annotation would arrive as
# fp32. `double` is for the interpreter, which hands Python floats over as they are.

# What kernels call. The interpreter patches Triton's language anew for each call of a jitted
# function, and spends nine tenths of its time on that; for the kernel itself it has done so already.
helper = (lambda function: function) if triton.knobs.runtime.interpret else triton.jit


@helper
def double(x):
    """A Python or Triton scalar in fp64."""
    return tl.full((), x, tl.float64)


@helper
def is_finite(x):
    """Whether x is neither infinite nor NaN."""
    return x - x == 0


@helper
def number(pointer, otherwise):
    """The optional number that lives in a tensor of one element, in fp64."""
    if pointer is None:
        return double(otherwise)
    else:
        return tl.load(pointer).to(tl.float64)


@helper
def applies_to_step(stats, found_inf):
    """Whether a step updates: neither the ascent nor the scaler met a non-finite gradient."""
    return is_finite(number(stats, 0.0)) & (number(found_inf, 0.0) == 0)


# Triton's plain square root and division of fp32 are approximations.
@helper
def square_root(x):
    """Rounded as IEEE demands."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@helper
def divide(x, y):
    """Rounded as IEEE demands."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)
