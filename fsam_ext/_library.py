"""Finds and loads the compiled libraries; remembers why one could not be loaded."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# A directory to take the libraries from instead of the package's own: a sanitizer build, for example.
LIBRARY_DIR = Path(os.environ.get("FSAM_LIBRARY_DIR") or Path(__file__).parent)


def path_of(name: str) -> Path:
    """Where ``{name}.abi3.so`` lies if it was built."""
    return LIBRARY_DIR / f"{name}.abi3.so"


def load(name: str) -> str | None:
    """Loads ``{name}.abi3.so``; returns None, or the reason why it cannot be used."""
    path = path_of(name)
    if not path.exists():
        return f"{path} does not exist: it was not built"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"{path} does not load: {error}"
    return None


# csrc/threads.h, NOTE [a forked child], for what torch does for this package.
TORCHS_GRAIN = 32768
_forked = False


def _fork_seen() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_fork_seen)


def unshared_parts(flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A flat tensor; in a forked child its parts, each too small for torch to share it among threads."""
    return flat.split(TORCHS_GRAIN) if _forked else (flat,)


# Order matters: the CUDA library adds kernels to the ops that the first one defines.
CPU_REASON = load("_C")
CUDA_REASON = CPU_REASON or load("_C_cuda")
