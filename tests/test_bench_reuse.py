"""bench/reuse.py: its three ways make the same steps, and its command prints a line for each."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("bench.reuse")


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_all_ways_make_the_same_steps(bench, base):
    made = []
    for way in (bench.Fused, bench.Horizontal, bench.TensorByTensor):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape).double()) for shape in ((5, 7), (3,), (11, 2))]
        one = way(params, bench.BASES[base])
        for number in range(6):
            torch.manual_seed(number)
            gradients = [torch.randn(p.shape).double() for p in params]
            calls = (one.ascend, one.descend) if number % 2 == 0 else (one.between,)
            for call in calls:
                for p, gradient in zip(params, gradients):
                    p.grad = gradient + 0.1 * p.detach().square()
                call()
        made.append(torch.cat([p.detach().flatten() for p in params]))
    for other in made[1:]:
        torch.testing.assert_close(made[0], other, rtol=1e-12, atol=1e-12)


def test_its_command_prints_a_line_for_each_way():
    command = [sys.executable, str(ROOT / "bench" / "reuse.py"), "--works", "tensors_1000", "--seconds", "0"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("| tensors_1000 | sgd | ")]
    names = [line.split(" | ")[2] for line in lines]
    assert names[-4:] == ["fsam_ext", "fsam_ext, reuse_dtype=bfloat16", "foreach", "tensor by tensor"]
