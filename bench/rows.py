"""Results are rows in a CSV file: the one place that plots, tables and comparisons read."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import fsam_ext

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure: the median and the 20 % and 80 % quantiles of a metric.

    They are empty where something was not run; ``note`` says why. ``load`` is the machine's load average, all jobs
    together: above the number of cores the figures are noisy.
    """

    provider: str
    backend: str
    workload: str
    dtype: str
    base: str
    metric: str
    unit: str
    median: float | None
    q20: float | None
    q80: float | None
    samples: int
    note: str = ""
    device: str = ""
    threads: int = 0
    load: float = 0.0
    machine: str = ""
    versions: str = ""
    commit: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[str | int, ...]:
        """What the figure is of: a later row with the same key replaces an earlier one."""
        return (self.provider, self.workload, self.dtype, self.base, self.metric, self.device)


COLUMNS = [field.name for field in fields(Row)]


@cache
def machine(device: torch.device) -> str:
    """The processor and its number of cores, or the name of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"model name\s*:\s*(.+)", info.read_text())
        model = names[0] if names else model
    isa = torch.ops.fsam_ext.cpu_isa() if hasattr(torch.ops.fsam_ext, "cpu_isa") else "no kernels"
    return f"{model}, {os.cpu_count()} cores, {isa}"


@cache
def versions() -> str:
    """Of this package, Python, torch and the compared package."""
    found = [f"fsam_ext {fsam_ext.__version__}", f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("pytorch_optimizer", "triton"):
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


@cache
def commit() -> str:
    """The commit that is measured, marked where files differ from it; empty outside a repository."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def stamp(device: torch.device) -> dict[str, str | int]:
    """The columns that say where and when a row was measured."""
    return {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
    }


def default_path(device: torch.device) -> Path:
    """One file for each machine, so that results of different machines stand side by side."""
    return RESULTS / file_name(machine(device))


def file_name(machine: str) -> str:
    """What the file of a machine is called."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    return f"{slug}.csv"


def read(path: Path) -> list[Row]:
    """The rows of a file; none where it does not exist.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(
                f"{path} has the columns {reader.fieldnames}, not {COLUMNS}; move it away and measure anew"
            )
        return [_typed(record) for record in reader]


def _typed(record: dict[str, str]) -> Row:
    def number(name: str) -> float | None:
        return float(record[name]) if record[name] else None

    return Row(
        **{
            **record,
            "median": number("median"),
            "q20": number("q20"),
            "q80": number("q80"),
            "samples": int(record["samples"]),
            "threads": int(record["threads"]),
            "load": float(record["load"]),
        }
    )


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows, the new ones in the place of old ones of the same key."""
    return list({row.key: row for rows in (old, new) for row in rows}.values())


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replaces the file by ``rows``, at once: an interrupted run leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            record = {name: "" if value is None else value for name, value in asdict(row).items()}
            for name in ("median", "q20", "q80"):
                if record[name] != "":
                    record[name] = f"{record[name]:.5g}"
            writer.writerow(record)
    unfinished.replace(path)
