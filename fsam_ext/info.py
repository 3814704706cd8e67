"""Which backend serves a device, and why the others do not: ``python -m fsam_ext.info [--device cuda]``."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys

import torch

from . import _cuda_matrix, _library, backends
from ._version import __version__
from .step import held


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    return f"instruction set {torch.ops.fsam_ext.cpu_isa()}" if _library.CPU_REASON is None else "not built"


def _cuda() -> str:
    if _library.CUDA_REASON is not None:
        return "not built"
    architectures = getattr(torch.ops.fsam_ext, "cuda_architectures", None)
    return "built" if architectures is None else f"architectures {architectures()}"


def _triton() -> str:
    version = _version("triton")
    return "not installed" if version is None else f"triton {version}"


# What there is to tell about a backend apart from whether it serves.
_DETAILS = {"cpu": _cpu, "cuda": _cuda, "triton": _triton, "reference": lambda: "plain PyTorch"}


def default_device() -> torch.device:
    """The accelerator of this machine, or its CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def _missing(device: torch.device) -> str | None:
    """Why this machine has no such device, or None where it has."""
    if device.type == "cpu":
        return None
    try:
        module = torch.get_device_module(device)
        count = module.device_count() if module.is_available() else 0
    except (RuntimeError, AttributeError) as error:
        return f"torch {torch.__version__} knows no device '{device.type}': {str(error).splitlines()[0]}"
    if count <= (device.index or 0):
        return f"torch {torch.__version__} sees {count} devices of type '{device.type}' here"
    return None


def _advice(device: torch.device) -> list[str]:
    """How to get the libraries that are not there and that ``device`` would use, one sentence each."""
    again = "and install fsam_ext from its source again, or install its wheel."
    needed = []
    if not _library.path_of("_C").exists():
        needed.append(f"The compiled kernels are missing: install g++ 11 or clang++ 14 or later {again}")
    if device.type == "cuda" and torch.version.hip is None and not _library.path_of("_C_cuda").exists():
        oldest = ".".join(map(str, _cuda_matrix.OLDEST_NVCC))
        needed.append(f"The CUDA library is missing: install a CUDA toolkit with nvcc {oldest} or later {again}")
    return needed


def report(device: torch.device) -> tuple[str, bool]:
    """Returns the table of backends for ``device``, and whether one of them serves it."""
    wish = os.environ.get("FSAM_BACKEND") or None
    missing = _missing(device)
    serving, rows = None, []
    for name, candidate in backends.CANDIDATES.items():
        reason = missing
        if reason is None:
            _, reason = candidate(device)
        if reason is not None:
            status, why = "no", reason
        elif wish is not None and name != wish:
            status, why = "can", f"FSAM_BACKEND={wish} asks for another"
        elif wish is None and not backends.serves_unasked(name, device):
            status, why = "can", f"where it is asked for: backend='{name}'"
        elif serving is not None:
            status, why = "can", f"'{serving}' comes before it"
        else:
            serving = name
            status, why = "in use", "FSAM_BACKEND asks for it" if wish else "the first that serves the device"
        rows.append((name, _DETAILS.get(name, lambda: "")(), status, why))
    header = ("backend", "version", "serves", "why")
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(3)]
    listed = held.unavailable()
    lines = [
        f"fsam_ext {__version__}, torch {torch.__version__}, device {device}",
        f"Parameters are {'held in C++' if listed is None else f'listed in each call: {listed}'}.",
        "",
        *("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in [header, *rows]),
        "",
    ]
    if wish is not None and wish not in backends.CANDIDATES:
        lines.append(f"FSAM_BACKEND={wish} names no backend; choose one of {', '.join(backends.CANDIDATES)}.")
    if serving is None:
        lines.append(f"No backend serves {device}.")
    else:
        lines.append(f"{device} is served by '{serving}'.")
    lines += _advice(device)
    return "\n".join(lines), serving is not None


def describe(device: torch.device | str) -> str:
    """The table of backends for ``device``: versions, which one is in use, and why each of the others is not.

    Raises:
        RuntimeError: ``device`` is no name of a device.
    """
    return report(torch.device(device))[0]


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns 1 where no backend serves the device, 2 where its name means nothing."""
    parser = argparse.ArgumentParser(prog="python -m fsam_ext.info", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("--device", help="such as cpu, cuda, cuda:1, xpu; this machine's accelerator by default")
    name = parser.parse_args(arguments).device
    try:
        device = default_device() if name is None else torch.device(name)
    except RuntimeError as error:
        parser.error(f"--device {name} is no device: {str(error).splitlines()[0]}")
    text, serves = report(device)
    print(text)
    return 0 if serves else 1


if __name__ == "__main__":
    sys.exit(main())
