"""Lets torchvision be imported where its operators are not: import this first.

The registries have torchvision linked against CUDA. Where torch is without CUDA its operators do not load, and then
importing torchvision fails at the two that it describes to torch. Declaring these is enough; nothing here calls them.
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
            if not hasattr(torch.ops.torchvision, "nms"):
                operators = torch.library.Library("torchvision", "FRAGMENT")
                for name in ("nms", "qnms"):
                    operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                _DECLARED.append(operators)


_declare()
