"""The backends under test, the inputs they get, and how far their results may lie from the float64 reference.

A backend joins by adding its name to BACKENDS.

NOTE [where the tolerances come from]
Every result is a sum of a few products, computed with one rounding for each operation and each scalar: an operation
errs by at most u = 2^-24 (2^-53 in float64) of its result, and no intermediate result is larger than the `magnitude`
that the same formula gives with every term made positive. No formula chains more than ROUNDINGS operations. Storing a
16-bit float rounds once more, by half a unit in its last place. An int8 average is off by half a scale and by what two
roundings of a code (of at most 127) make of it. A sum over a chunk adds at most 256 values in a lane and then a tree
over the lanes; the chunks are added in float64.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from fsam_ext import backends
from fsam_ext.backends import ops
from fsam_ext.state.flat_state import aligned_numel

ROUNDINGS = 12
SUMMANDS = 256 + 16


def _installed(name: str, device: str) -> Callable[[], Any]:
    return lambda: backends.resolve(name, torch.device(device))


def _emulated() -> Any:
    return importlib.import_module("tests.cuda_emulation").load()


def _triton() -> Any:
    pytest.importorskip("triton", reason="triton is not installed")
    return backends.resolve("triton", torch.device(DEVICE["triton"]))


# name -> loader of the ops. `reference` is here too: in float32 against itself in float64.
BACKENDS: dict[str, Callable[[], Any]] = {
    "cpu": _installed("cpu", "cpu"),
    "reference": _installed("reference", "cpu"),
    "cuda_emulated": _emulated,
    "triton": _triton,  # in its interpreter where there is no GPU
}
DEVICE: dict[str, str] = dict.fromkeys(BACKENDS, "cpu")
if torch.cuda.is_available():
    BACKENDS["cuda"] = _installed("cuda", "cuda")
    DEVICE["cuda"] = DEVICE["triton"] = "cuda"

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
# How an average may be stored beside the dtype of the state (None). Not for float64 parameters.
COMPRESSED = (torch.bfloat16, torch.int8)


def load(name: str) -> tuple[Any, str]:
    """A backend under test, and the device of its tensors."""
    return BACKENDS[name](), DEVICE[name]


def dtype_id(dtype: torch.dtype | None) -> str:
    return "full" if dtype is None else str(dtype).removeprefix("torch.")


def unit(dtype: torch.dtype) -> float:
    """Half a unit in the last place of 1: what rounding a number to a dtype errs by, relative to it."""
    return torch.finfo(dtype).eps / 2


# ---- Shapes and memory layouts -------------------------------------------------------------------------------------


@dataclass
class Layout:
    """How to make the tensors of one call: `make(dtype)` gives one of the right shape and strides."""

    params: list[Callable[[torch.dtype], Tensor]]
    grads: list[Callable[[torch.dtype], Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.grads = self.grads or self.params


def plain(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.empty(shape, dtype=dtype)


def permuted(*shape: int) -> Callable[[torch.dtype], Tensor]:
    """Dense, with the dimensions in reverse order in memory."""
    return lambda dtype: torch.empty(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))


def shifted(elements: int, *shape: int) -> Callable[[torch.dtype], Tensor]:
    """A view that starts some elements into its storage: misaligned for vector accesses."""
    numel = torch.Size(shape).numel()
    return lambda dtype: torch.empty(numel + elements + 5, dtype=dtype)[elements : elements + numel].view(shape)


LAYOUTS = {
    "scalar": Layout([plain()]),
    "empty": Layout([plain(0), plain(3, 0), plain(7), plain(0)]),
    "odd": Layout([plain(1), plain(17), plain(5, 123), plain(31), plain(4095), plain(4097), plain(2, 4096)]),
    "tiny": Layout([plain(n) for n in (0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 69)]),
    "permuted": Layout([permuted(37, 53), permuted(4, 3, 5, 7), plain(9)]),
    "misaligned": Layout(
        [shifted(1, 4500), shifted(3, 129), shifted(2, 64), plain(4500)],
        [shifted(3, 4500), shifted(3, 129), shifted(1, 64), shifted(1, 4500)],
    ),
    "gradient_in_other_order": Layout(
        [plain(37, 53), permuted(21, 5, 3), plain(11)], [permuted(37, 53), plain(21, 5, 3), plain(11)]
    ),
}


# ---- Which combinations --------------------------------------------------------------------------------------------


def every_pair(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes with so many combinations that any two values of two axes meet in one; an axis may have several
    names (``dtype__stored``), and its values are tuples then. FSAM_EVERY_COMBINATION=1 has all combinations instead.
    """
    values = [list(axis) for axis in axes.values()]
    places = [list(range(len(axis))) for axis in values]
    left = {(i, a, j, b) for i, j in combinations(range(len(values)), 2) for a in places[i] for b in places[j]}
    met = {
        combination: {(i, a, j, b) for (i, a), (j, b) in combinations(enumerate(combination), 2)}
        for combination in product(*places)
    }
    everything = len(values) == 1 or os.environ.get("FSAM_EVERY_COMBINATION") == "1"
    chosen = list(met) if everything else []
    while left and not everything:
        chosen.append(max(met, key=lambda combination: len(met[combination] & left)))
        left -= met[chosen[-1]]
    rows, ids = [], []
    for combination in sorted(chosen):
        parts = [(name, axis[at]) for name, axis, at in zip(axes, values, combination)]
        row = [value for name, part in parts for value in (part if "__" in name else (part,))]
        rows.append(row)
        ids.append("-".join(map(_id, row)))
    names = ",".join(axes).replace("__", ",")
    return pytest.mark.parametrize(names, rows if "," in names else [row[0] for row in rows], ids=ids)


def _id(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(map(_id, value))
    return dtype_id(value) if value is None or isinstance(value, torch.dtype) else str(value)


# ---- One call's worth of inputs ------------------------------------------------------------------------------------


@dataclass
class Average:
    """A flat average and, where it is int8, its scales."""

    ema: Tensor | None = None
    scale: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.ema, self.scale) if tensor is not None]

    def exact(self) -> Tensor | None:
        """The flat average in float64, NaN where it is unset."""
        if self.scale is None:
            return doubled(self.ema)
        scales = doubled(self.scale).repeat_interleave(ops.QUANTIZED)
        return self.ema.cpu().double() * scales[: self.ema.numel()]


class Inputs:
    """Random parameters, gradients and flat state of one layout; everything an op could write is poisoned."""

    def __init__(self, layout: str, dtype: torch.dtype, device: str = "cpu", alignment: int = 1) -> None:
        """``alignment``: what offsets are multiples of, beyond that of aligned memory."""
        self.dtype, self.state_dtype = dtype, ops.compute_dtype(dtype)
        spec = LAYOUTS[layout]
        self.params = [_moved(self._normal(make(dtype)), device) for make in spec.params]
        self.grads = [_moved(self._normal(make(dtype), 0.1), device) for make in spec.grads]
        for moved, make in zip(self.params + self.grads, spec.params + spec.grads, strict=True):
            made = make(dtype)
            assert moved.stride() == made.stride() and moved.storage_offset() == made.storage_offset()
        positions = [3 * 128]  # room before the first slice, whose contents must survive
        for param in self.params:
            end = positions[-1] + aligned_numel(param.numel(), dtype)
            positions.append(-(-end // alignment) * alignment)
        self.offsets = torch.tensor(positions[:-1], dtype=torch.int64)
        self.numel = positions[-1] + 64
        self.device = device
        self.chunks = ops.count_chunks(p.numel() for p in self.params)
        self.partials = torch.full(
            (self.chunks * ops.STATISTICS + 3,), torch.nan, dtype=self.state_dtype, device=device
        )
        self.stats = torch.full((ops.STATISTICS,), torch.nan, dtype=torch.float64, device=device)

    @staticmethod
    def _normal(tensor: Tensor, scale: float = 1.0) -> Tensor:
        return tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64) * scale)

    def flat(self, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """A flat state buffer of random numbers."""
        numbers = torch.randn(self.numel, dtype=torch.float64) * scale
        return numbers.to(self.state_dtype if dtype is None else dtype).to(self.device)

    def average(self, dtype: torch.dtype | None, unset: bool = False) -> Average:
        """A random average, in the dtype of the state where ``dtype`` is None.

        ``unset``: a part has seen no gradient yet. That is every other row; of an int8 average every other block.
        """
        if dtype == torch.int8:
            codes = torch.randint(-127, 128, (self.numel,), dtype=torch.int8).to(self.device)
            average = Average(codes, self.flat(1e-3, torch.float32)[: -(-self.numel // ops.QUANTIZED)].abs())
            if unset:
                average.scale[::2] = torch.nan
            return average
        average = Average(self.flat(0.1, dtype))
        if unset:
            for part in slices(average.ema, self)[::2]:
                part.fill_(torch.nan)
        return average

    def masters(self) -> Tensor:
        """Random float32 masters, of which the parameters become the rounded copies."""
        masters = self.flat(dtype=torch.float32)
        for param, part in zip(self.params, slices(masters, self), strict=True):
            param.copy_(part)
        return masters

    def poisoned_backup(self) -> Tensor:
        return torch.full((self.numel,), torch.nan, dtype=self.dtype, device=self.device)


def doubled(value: Any) -> Any:
    """A float64 copy, on the CPU, of all floating-point tensors in an argument list; everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().cpu().double().clone() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return [doubled(item) for item in value]
    return value


def copied(value: Any) -> Any:
    """A copy of all tensors in an argument list, memory order included."""
    if isinstance(value, Tensor):
        return value.clone() if value.dim() == 0 else _moved(value, value.device)
    if isinstance(value, list | tuple):
        return [copied(item) for item in value]
    return value


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy with the same strides and, on any device, the same misalignment."""
    storage = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    return storage.to(device, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def slices(flat: Tensor, inputs: Inputs) -> list[Tensor]:
    """Each row's part of a flat buffer, shaped and ordered like its parameter."""
    return [
        flat.as_strided(p.shape, p.stride(), flat.storage_offset() + o)
        for p, o in zip(inputs.params, inputs.offsets.tolist(), strict=True)
    ]


def outside(flat: Tensor, inputs: Inputs) -> Tensor:
    """The elements of a flat buffer that belong to no row."""
    mine = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    for param, offset in zip(inputs.params, inputs.offsets.tolist(), strict=True):
        mine[offset : offset + param.numel()] = True
    return flat[~mine]


def outside_scales(average: Average, inputs: Inputs) -> Tensor:
    """The scales of blocks that belong to no row."""
    mine = torch.zeros(average.scale.numel(), dtype=torch.bool, device=average.scale.device)
    for param, offset in zip(inputs.params, inputs.offsets.tolist(), strict=True):
        mine[offset // ops.QUANTIZED : -(-(offset + param.numel()) // ops.QUANTIZED)] = True
    return average.scale[~mine]


def assert_close(actual: Tensor, exact: Tensor, magnitude: Tensor, arithmetic: torch.dtype, what: str) -> None:
    """Compares with the float64 result: see NOTE [where the tolerances come from]."""
    stored = actual.dtype
    bound = ROUNDINGS * unit(arithmetic) * magnitude
    if stored != arithmetic:
        # Half a unit in the last place of the result, and of the smallest number that the dtype holds.
        bound = bound * 2 + unit(stored) * exact.abs() + torch.finfo(stored).smallest_normal * unit(stored)
    error = (actual.detach().cpu().double() - exact).abs()
    wrong = ~(error <= bound)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} elements off, worst {error[wrong].max():.3g} "
        f"where {bound[wrong].min():.3g} is allowed"
    )


def assert_average_close(average: Average, exact: Tensor, magnitudes: list[Tensor], inputs: Inputs) -> None:
    """Compares an average with its flat float64 value: see NOTE [where the tolerances come from]."""
    if average.scale is None:
        for i, (m, value, size) in enumerate(
            zip(slices(average.ema, inputs), slices(exact, inputs), magnitudes, strict=True)
        ):
            assert_close(m, value, size, inputs.state_dtype, f"average {i}")
        return
    scales = doubled(average.scale).repeat_interleave(ops.QUANTIZED)[: average.ema.numel()]
    rows = (slices(flat, inputs) for flat in (average.exact(), exact, scales))
    for i, (m, value, scale, size) in enumerate(zip(*rows, magnitudes, strict=True)):
        bound = scale * (0.5 + 127 * 2 * unit(torch.float32)) + ROUNDINGS * unit(torch.float32) * size
        error = (m - value).abs()
        wrong = ~(error <= bound)
        assert not wrong.any(), f"average {i}: {int(wrong.sum())} elements off, worst {error[wrong].max():.3g}"


def identical(a: Tensor, b: Tensor) -> bool:
    """The same bits (NaN included)."""
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
