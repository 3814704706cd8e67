"""The CPU backend's own promises: the same bits for any number of threads and for every ISA."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
from itertools import chain

import pytest
import torch

from fsam_ext.backends import ops

from .conformance import BACKENDS, DTYPES, LAYOUTS, Inputs
from .test_ops import calls, mixed_calls, reusing_calls

PROGRAM = "from tests.test_cpu import digest; print(digest())"


@functools.cache
def digest(threads: int = 1) -> str:
    """A hash of everything that all ops write, over all dtypes, and over enough elements to make threads share them."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    result = hashlib.sha256()
    backend = BACKENDS["cpu"]()
    large = LAYOUTS["odd"].params + [lambda dtype: torch.empty(300_003, dtype=dtype)]
    LAYOUTS["large"] = type(LAYOUTS["odd"])(large)
    compressed = zip(DTYPES[1:], (torch.int8, torch.bfloat16, torch.int8), strict=True)
    kept = (None, torch.bfloat16, None, torch.bfloat16)
    for call_of_each_op in chain(
        (calls(Inputs("large", dtype)) for dtype in DTYPES),
        (mixed_calls(Inputs("large", dtype, alignment=ops.QUANTIZED), stored) for dtype, stored in compressed),
        (reusing_calls(Inputs("large", dtype), stored) for dtype, stored in zip(DTYPES, kept, strict=True)),
    ):
        for op, call in call_of_each_op.items():
            getattr(backend, op)(*call)
            for argument in call:
                for tensor in argument if isinstance(argument, list) else [argument]:
                    if isinstance(tensor, torch.Tensor):
                        result.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    torch.set_num_threads(1)
    return result.hexdigest()


def available_isas() -> list[str]:
    """From the sentence that refuses an unknown one."""
    result = run("made_up", "import torch, fsam_ext; torch.ops.fsam_ext.cpu_isa()")
    assert (
        result.returncode != 0 and "FSAM_CPU_ISA=made_up is not available on this machine; use one of" in result.stderr
    )
    return result.stderr.split("use one of ")[1].split("\n")[0].split(", ")


def run(isa: str, program: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "FSAM_CPU_ISA": isa},
        cwd=os.path.dirname(os.path.dirname(__file__)),
        capture_output=True,
        text=True,
    )


def test_same_bits_on_every_isa():
    isas = available_isas()
    assert "baseline" in isas
    digests = {}
    for isa in isas:
        result = run(isa, f"import torch, fsam_ext; assert torch.ops.fsam_ext.cpu_isa() == {isa!r}; {PROGRAM}")
        assert result.returncode == 0, result.stderr
        digests[isa] = result.stdout.strip()
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_same_bits_for_any_number_of_threads(threads):
    assert digest(threads) == digest(1)


def test_small_numbers_survive_conversion():
    """Every bfloat16 and float16 value, subnormals included, comes through a restore by way of the update unchanged."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        param = every[every.isfinite()].clone()
        expected = param.clone()
        inputs = Inputs("scalar", dtype)
        inputs.params, inputs.grads, inputs.offsets = (
            [param],
            [torch.zeros_like(param)],
            torch.zeros(1, dtype=torch.int64),
        )
        ops.restore_sgd(
            BACKENDS["cpu"](), inputs.params, inputs.grads, inputs.offsets, None, None, None, None, None,
            0.1, None, 0.0, 0.0, 0.0, False, False, None,
        )  # fmt: skip
        assert torch.equal(param, expected)


def test_rounding_is_to_nearest_even():
    """0 - lr * 1 is the exact float32 -lr, so the one rounding left is that of the store: it must be torch's."""
    grad, offsets = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    lrs = torch.randn(1000) * torch.exp2(torch.randint(-30, 17, (1000,)).float())
    for dtype in (torch.bfloat16, torch.float16):
        results = torch.zeros(1000, dtype=dtype)
        for i, lr in enumerate(lrs.tolist()):
            call = ([results[i : i + 1]], [grad.to(dtype)], offsets, None, None, None, None, None, -lr, None)
            ops.restore_sgd(BACKENDS["cpu"](), *call, 0.0, 0.0, 0.0, False, False, None)
        assert torch.equal(results, lrs.to(dtype))
