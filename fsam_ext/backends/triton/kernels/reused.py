"""The gradient of a step between two ascents: NOTE [reuse of the second gradient] in formulas.h."""

import triton.language as tl

from .arithmetic import double, helper, is_finite
from .memory import load, widen


@helper
def reuse_length(reuse_sq, reuse, eps, S: tl.constexpr):
    """reuse |g| / (|v| + eps), from |g|^2 and |v|^2; 0 where there is no v, or one of them is not finite."""
    grad_sq = tl.load(reuse_sq)
    reused_sq = tl.load(reuse_sq + 1)
    exists = is_finite(grad_sq) & is_finite(reused_sq) & (reused_sq > 0)
    length = double(reuse) * tl.sqrt(grad_sq) / (tl.sqrt(reused_sq) + double(eps))
    return tl.where(exists, length, 0.0).to(S)


@helper
def with_reused(gradient, r, length, lanes, count, K: tl.constexpr, WHOLE: tl.constexpr):
    """g + length v, and g itself where the length is 0: v may hold anything then."""
    if K is None:
        return gradient
    else:
        direction = widen(load(r, lanes, count, K, WHOLE), K)
        return tl.where(length != 0, gradient + length * direction, gradient)
