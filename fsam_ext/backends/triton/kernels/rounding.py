"""Stochastic rounding of 16-bit weights, by random numbers that all backends draw."""

import triton.language as tl

from .arithmetic import helper
from .memory import narrow


# NOTE [stochastic rounding] in storage.h has the reasons, and the random numbers that all backends draw.
@helper
def rounding_key(rounding):
    """32 bits from [seed, number of the step]."""
    x = tl.load(rounding).to(tl.uint64) + tl.load(rounding + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)).to(tl.uint32)


@helper
def random_bits(positions, key):
    """32 random bits for each position (int64) in the flat state."""
    x = positions.to(tl.uint32) ^ (key + (positions >> 32).to(tl.uint32) * 0x9E3779B9)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@helper
def narrow_stochastically(x, random, T: tl.constexpr):
    """x as T is stored, rounded up or down by chance: up where `random` reaches over what is cut off."""
    bits = x.to(tl.uint32, bitcast=True)
    if T.is_bf16():
        cut = (bits + (random & 0xFFFF)) >> 16
        return tl.where((bits & 0x7F800000) == 0x7F800000, narrow(x, T), cut.to(tl.uint16))
    else:
        sign = (bits >> 16) & 0x8000
        magnitude = bits & 0x7FFFFFFF
        normal = (magnitude - (112 << 23) + (random & 0x1FFF)) >> 13
        # Below 2^-14 the unit is 2^-24: what is cut off of a multiple of it, plus a fraction below one.
        is_small = magnitude < 0x38800000
        small = tl.where(is_small, magnitude, 0).to(tl.float32, bitcast=True) * 16777216.0
        fraction = (random & 0x1FFF).to(tl.int32).to(tl.float32) * 0.0001220703125
        subnormal = (small + fraction).to(tl.int32).to(tl.uint32)
        finite = (sign | tl.where(is_small, subnormal, normal)).to(tl.uint16)
        return tl.where(magnitude >= 0x477FE000, narrow(x, T), finite)  # 65504 and above, inf, nan
