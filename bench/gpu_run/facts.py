"""What machine a run was on, and which backends serve there: ``python -m bench.gpu_run.facts --out facts.json``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench import gpu, rows
from bench.gpu_run.passes import Passes, serving
from fsam_ext import info

LIBRARIES = ("_C.abi3.so", "_C_cuda.abi3.so")
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"


def nvidia_smi() -> str:
    """What the driver says of the GPU and its clocks, or why it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"


def missing_backends(device: torch.device) -> dict[str, str]:
    """name -> why that backend does not serve the device, of those that do not.

    On a CPU that includes an interpreter that cannot run; on a GPU a kernel that cannot is a failure, not an absence.
    """
    found = {}
    for name in ("cuda", "triton"):
        try:
            backend = serving(name, device)
            if device.type == "cpu":
                Passes(backend, device, torch.float32, 512, "flat").noise_norm()
        except SystemExit as reason:
            found[name] = str(reason)
        except Exception as error:
            found[name] = f"what stands in for '{name}' here cannot run: {str(error).splitlines()[0]}"
    return found


def of_gpu(device: torch.device) -> dict[str, Any]:
    """The GPU's own numbers; none of a CPU."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": gpu.cache_bytes(device),
        "memory_bytes": properties.total_memory,
        "free_bytes": gpu.free_bytes(device),
    }


def gather(device: torch.device) -> dict[str, Any]:
    """Everything that a reader of the rows may want to know of the machine."""
    folder = Path(info.__file__).parent
    found: dict[str, Any] = {
        "device": device.type,
        "machine": rows.machine(device),
        "gpu": of_gpu(device),
        "nvidia_smi": nvidia_smi(),
        "versions": rows.versions(),
        "cuda_of_torch": torch.version.cuda,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "libraries": {name: (folder / name).stat().st_size for name in LIBRARIES if (folder / name).exists()},
    }
    found["missing_backends"] = missing_backends(device)
    return found


def main(argv: list[str] | None = None) -> None:
    """Adds the facts to a file of them, and prints them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    known = {}
    with contextlib.suppress(FileNotFoundError):
        known = json.loads(args.out.read_text())
    if device.type == "cuda" and not torch.cuda.is_available():
        reason = f"torch {torch.__version__} sees no GPU here"
        args.out.write_text(json.dumps({**known, "no_device": reason}, indent=2) + "\n")
        raise SystemExit(f"{nvidia_smi()}\n{reason}")
    facts = {**known, **gather(device)}
    facts.pop("no_device", None)
    args.out.write_text(json.dumps(facts, indent=2) + "\n")
    print(info.describe(device))
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
