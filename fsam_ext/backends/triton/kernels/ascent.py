"""The ascent's direction: the gradient's noise, from the gradient and the average."""

import triton.language as tl

from .arithmetic import double, helper, number
from .averages import known


@helper
def ascent_scalars(grad_scale, sigma, lmbda, S: tl.constexpr):
    """1 / loss scale, sigma, lambda and 1 - lambda."""
    inverse_scale = 1.0 / number(grad_scale, 1.0)
    one_minus_lmbda = 1.0 - double(lmbda)
    return inverse_scale.to(S), double(sigma).to(S), double(lmbda).to(S), one_minus_lmbda.to(S)


@helper
def next_average(ema, g, scalars):
    """m = lmbda m + (1 - lmbda) g; the first gradient becomes m itself."""
    inverse_scale, sigma, lmbda, one_minus_lmbda = scalars
    return tl.where(ema != ema, g, lmbda * ema + one_minus_lmbda * g)


@helper
def noise(g, ema, scalars, UPDATED: tl.constexpr):
    """d = g - sigma m_prev (the official code), or g - sigma m_new (the paper's Algorithm 1)."""
    inverse_scale, sigma, lmbda, one_minus_lmbda = scalars
    if ema is None:
        return g
    elif UPDATED:
        return g - sigma * next_average(ema, g, scalars)
    else:
        return g - sigma * known(ema)
