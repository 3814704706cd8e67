"""Lets torchvision be imported where its operators are not.

PyPI has torchvision linked against CUDA's libraries. Where torch is without CUDA they do not load, and then importing
torchvision fails at the two operators that it describes to torch. Declaring these two is enough to import it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

_DECLARED = []


def _declare() -> None:
    spec = find_spec("torchvision")
    for library in Path(spec.origin).parent.glob("_C*.so") if spec is not None else ():
        try:
            torch.ops.load_library(library)
        except OSError:
            operators = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _DECLARED.append(operators)


_declare()
