"""The README's example runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.filterwarnings("error")
def test_the_example_trains():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    optimizer, model = names["optimizer"], names["model"]
    assert {"fsam_ema", "momentum_buffer"} <= set(optimizer.state[model.weight])
    assert all(bool(torch.isfinite(param).all()) for param in model.parameters())


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_what_it_links_to_is_there(path):
    assert (Path(__file__).parent.parent / path).exists()
