"""Step counts, and the bias corrections that Adam takes from them: once a step for each row, not once a program."""

import triton
import triton.language as tl

from .arithmetic import applies_to_step, double, helper, number


@helper
def _product(a, a_low, b, b_low):
    """(a + a_low) (b + b_low) as a sum of two doubles, the second far below the first."""
    high = a * b
    low = tl.fma(a, b, -high) + (a * b_low + a_low * b)
    total = high + low
    return total, low - (total - high)


@helper
def _power(base, exponents):
    """base^exponents in fp64, by squaring in twice the precision: rounded once, as the C library's pow() does.

    1 - beta^t loses up to three digits to cancellation, so no digit of the power is to spare.
    """
    power = tl.zeros_like(exponents).to(tl.float64) + 1.0
    power_low = power - 1.0
    base_low = double(0.0)
    bits = tl.max(exponents, 0)
    while bits > 0:
        odd = exponents % 2 == 1
        next_power, next_low = _product(power, power_low, base, base_low)
        power = tl.where(odd, next_power, power)
        power_low = tl.where(odd, next_low, power_low)
        base, base_low = _product(base, base_low, base, base_low)
        exponents = exponents // 2
        bits = bits // 2
    return power


@triton.jit(do_not_specialize=["members", "rows"])
def count_steps(
    steps, index, members: tl.int64, corrections, rows: tl.int64, stats, found_inf, lr_tensor,
    lr: tl.float64, beta1: tl.float64, beta2: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """t = t + 1 for each member, where the step applies; for each row lr / (1 - beta1^t) and sqrt(1 - beta2^t).

    The members that start a row are the first ones, in the order of the rows. Source: torch.optim.Adam.
    """
    lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_member = lanes < members
    places = steps + tl.load(index + lanes, mask=is_member, other=0)
    counts = tl.load(places, mask=is_member, other=0.0)
    counts = counts + tl.where(applies_to_step(stats, found_inf), 1.0, 0.0)
    tl.store(places, counts, mask=is_member)
    is_row = lanes < rows
    exponents = tl.where(is_row, counts, 1.0).to(tl.int32)
    rate = number(lr_tensor, lr)
    to = corrections + lanes * 2
    tl.store(to, (rate / (1.0 - _power(double(beta1), exponents))).to(corrections.dtype.element_ty), mask=is_row)
    tl.store(to + 1, tl.sqrt(1.0 - _power(double(beta2), exponents)).to(corrections.dtype.element_ty), mask=is_row)
