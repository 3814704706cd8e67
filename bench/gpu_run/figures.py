"""The one figure of each stage that matters, in a few words, read from what the stage printed and from the rows.

Nothing here imports torch: the command that makes the table has to work where torch does not.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

Rows = list[dict[str, str]]


def read_rows(path: Path) -> Rows:
    """The rows of a run as text; none where there is no file yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def select(rows: Rows, **wanted: str) -> Rows:
    """Those with a figure that have these values in these columns."""
    return [row for row in rows if row["median"] and all(row[key] == value for key, value in wanted.items())]


def last_line(rows: Rows, output: str) -> str:
    """What a program says last."""
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


def facts(rows: Rows, output: str) -> str:
    """The machine and torch."""
    start = output.find("\n{")
    try:
        found = json.loads(output[start:])
    except ValueError:
        return last_line(rows, output)
    capability = found["gpu"].get("capability")
    torch = next(part for part in found["versions"].split("; ") if part.startswith("torch "))
    return ", ".join(filter(None, [found["machine"], capability and f"sm_{capability.replace('.', '')}", torch]))


# "3 failed, 412 passed in 12.3s (0:00:12)", with "=" around it or not; "5/45 tests collected (40 deselected) in 1.2s".
_SUMMARY = re.compile(r"^=*\s*((?:\d|no tests).* in \d[\d.]*s(?: \([\d:]+\))?)\s*=*$", re.M)
_PROGRESS = re.compile(r"^([.FEsxX]+)(?:\s+\[\s*\d+%\])?$", re.M)


def tests(rows: Rows, output: str) -> str:
    """pytest's own summary; of a run that was ended, how far it had come."""
    found = _SUMMARY.findall(output)
    if found:
        return found[-1]
    done = "".join(_PROGRESS.findall(output))
    if not done:
        return last_line(rows, output)
    bad = sum(done.count(letter) for letter in "FE")
    return f"{done.count('.')} passed and {bad} failed until then"


def _provider(backend: str, op: str) -> str:
    return f"fsam_ext {op}" if backend == "cuda" else f"fsam_ext {backend} {op}"


OPS = {"noise_norm": "A", "perturb": "B", "restore_sgd": "C sgd", "restore_adam": "C adam"}


def bandwidth(backend: str) -> Callable[[Rows, str], str]:
    """Each pass's share of a copy's bandwidth in the first case."""

    def figure(rows: Rows, output: str) -> str:
        found = {op: select(rows, provider=_provider(backend, op), metric="share of a copy's bandwidth") for op in OPS}
        if not all(found.values()):
            return last_line(rows, output)
        first = found["noise_norm"][0]
        shares = ", ".join(f"{OPS[op]} {float(records[0]['median']):.0f} %" for op, records in found.items())
        return f"{shares} of a copy ({first['dtype']}, {first['workload']})"

    return figure


def _times(rows: Rows, metric: str, workloads: Callable[[str], bool], names: tuple[str, ...]) -> str:
    found = [row for row in select(rows, metric=metric) if workloads(row["workload"])]
    parts = [
        f"{row['provider']} {float(row['median']):.3g}x"
        for name in names
        for row in found
        if (row["provider"], row["workload"], row["base"]) == (name, found[0]["workload"], found[0]["base"])
    ]
    return f"{found[0]['workload']} {found[0]['dtype']} {found[0]['base']}: {', '.join(parts)}" if parts else ""


def steps(rows: Rows, output: str) -> str:
    """How many times faster than the official sequence we are, and the best of the others, in the first workload."""
    names = ("fsam_ext", "fsam_ext graph", "fsam_ext triton", "foreach", "compiled")
    found = _times(rows, "speedup_over official", lambda name: not name.startswith("train_"), names)
    return f"{found} official" if found else last_line(rows, output)


def training_steps(rows: Rows, output: str) -> str:
    """What a step of F-SAM costs over two forward-backwards and the fused base alone."""
    found = _times(rows, "cost_over_base", lambda name: name.startswith("train_"), ("fsam_ext", "official", "foreach"))
    return f"{found} base" if found else last_line(rows, output)


def ncu(backend: str) -> Callable[[Rows, str], str]:
    """Instructions executed for each parameter by the passes of the first case."""

    def figure(rows: Rows, output: str) -> str:
        found = {op: select(rows, provider=_provider(backend, op), metric="ncu instructions") for op in OPS}
        if not all(found.values()):
            return last_line(rows, output)
        counts = ", ".join(f"{OPS[op]} {float(records[0]['median']):.0f}" for op, records in found.items())
        return f"{counts} instructions a parameter ({found['noise_norm'][0]['dtype']})"

    return figure


def sanitizer(rows: Rows, output: str) -> str:
    """The sanitizer's own summary, and that of the tests under it."""
    found = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
    return "; ".join([*found[-1:], tests(rows, output)])
