"""Which backend serves a device, and why: see README.md in this folder for the contract that a backend signs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch

from .. import _cuda_matrix, _library
from . import ops, reference

logger = logging.getLogger("fsam_ext")

OLDEST_CAPABILITY = min(tuple(map(int, one.split("."))) for one in _cuda_matrix.ARCHITECTURES)

# NOTE [no silent fallback]
# What was asked for is what runs, or an error says why it cannot. Without a wish, the fastest backend that is there
# runs. The plain PyTorch reference stands in on a CPU only, with a warning that says why; on a GPU it would be many
# times slower than what the user came for, so there it has to be asked for.


def _dispatcher(namespace: str) -> SimpleNamespace:
    """The ops of a torch library, as overloads: an attribute less to resolve in each call."""
    packets = getattr(torch.ops, namespace)
    calls = {name: getattr(packets, name).default for name in ops.NAMES}
    return SimpleNamespace(**calls, takes_held=namespace == "fsam_ext")


def _compiled(device_type: str, reason: str | None, misfit: Callable[[torch.device], str | None] = lambda _: None):
    """A candidate that serves one type of device through the dispatcher, unless ``misfit`` has a reason."""

    def candidate(device: torch.device) -> tuple[Any, str | None]:
        if reason is not None:
            return None, reason
        if device.type != device_type:
            return None, f"it serves {device_type} tensors only"
        unfit = misfit(device)
        return (None, unfit) if unfit is not None else (_dispatcher("fsam_ext"), None)

    return candidate


def _misfit_of_cuda(device: torch.device) -> str | None:
    """Why the CUDA library cannot run on a device of type cuda, which AMD's are too."""
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA's GPUs, and this torch is for AMD's"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    problem = torch.ops.fsam_ext.cuda_driver_problem()  # csrc/cuda/driver.cpp, NOTE [a driver of its own age]
    if problem:
        return problem
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return "its kernels need compute capability {}.{}, and {} has {}.{}".format(
            *OLDEST_CAPABILITY, device, *capability
        )
    return None


def _triton(device: torch.device) -> tuple[Any, str | None]:
    """Triton's kernels. Their module is imported only here: importing triton takes a while."""
    if find_spec("triton") is None:
        return None, "triton is not installed: pip install triton"
    from . import triton

    reason = triton.unavailable(device)
    return (None, reason) if reason is not None else (_dispatcher(triton.NAMESPACE), None)


# name -> function from a device to (backend, None) or (None, the reason why it cannot serve). In order of preference.
CANDIDATES = {
    "cpu": _compiled("cpu", _library.CPU_REASON),
    "cuda": _compiled("cuda", _library.CUDA_REASON, _misfit_of_cuda),
    "triton": _triton,
    "reference": lambda device: (reference, None),
}
_logged: set[str] = set()


def resolve(name: str | None, device: torch.device) -> Any:
    """Returns the backend called ``name`` for ``device``; without a name, the best one: NOTE [no silent fallback].

    The environment variable ``FSAM_BACKEND`` stands in for a missing name.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend is not built, or does not serve the device, or none does; the message says why.
    """
    name = name or os.environ.get("FSAM_BACKEND") or None
    if name is not None:
        check_name(name)
        backend, reason = CANDIDATES[name](device)
        if backend is None:
            raise RuntimeError(f"backend '{name}' cannot serve {device}: {reason}; choose another backend or build it")
        return backend
    reasons = []
    for candidate_name, candidate in CANDIDATES.items():
        backend, reason = candidate(device)
        if backend is not None and serves_unasked(candidate_name, device):
            if backend is reference and device.type not in _logged:
                _logged.add(device.type)
                logger.warning(
                    "fsam_ext runs its plain PyTorch reference on %s: %s",
                    device.type,
                    "; ".join(reasons),
                )
            return backend
        reasons.append(f"backend '{candidate_name}': {reason or 'plain PyTorch, only where it is asked for'}")
    raise RuntimeError(
        f"no backend serves {device}: {'; '.join(reasons)}; build or install one (python -m fsam_ext.info tells "
        "more), or say backend='reference'"
    )


def serves_unasked(name: str, device: torch.device) -> bool:
    """Whether a backend may be taken for a device that no wish names it for."""
    return name != "reference" or device.type == "cpu"


def check_name(name: str) -> None:
    """Raises ValueError where no backend is called ``name``."""
    if name not in CANDIDATES:
        raise ValueError(f"backend must be one of {', '.join(CANDIDATES)}, not {name!r}")
