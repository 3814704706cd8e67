"""Where NVIDIA's command-line tools are."""

from __future__ import annotations

import os
import shutil

PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute")


def find(name: str, path: str | None = None) -> str | None:
    """A tool from PATH (or ``path``), or from where CUDA's installers put it; None where it is nowhere."""
    found = shutil.which(name, path=path)
    return found or shutil.which(name, path=os.pathsep.join(PLACES))
