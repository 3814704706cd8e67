"""Puts the rows of a run on a GPU where readers look for them: bench/results, plots, README, docs/gpu-model.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench import plots, rows
from bench.gpu_run import tables
from bench.gpu_run.stages import ROOT

# page -> (name of its markers, what stands between them)
PAGES: dict[str, tuple[str, Callable[[list[rows.Row]], str]]] = {
    "README.md": ("gpu", tables.steps),
    "docs/gpu-model.md": ("gpu-measured", tables.model),
}


def read(folder: Path) -> tuple[dict, list[rows.Row]]:
    """A run's facts and its rows of the GPU, each with the commit that was measured.

    Raises:
        SystemExit: the folder holds no run, or one without rows.
    """
    facts = folder / "facts.json"
    if not facts.exists():
        sys.exit(f"--merge {folder}: there is no facts.json; give the folder that --out named")
    known = json.loads(facts.read_text())
    found = [row for row in rows.read(folder / "rows.csv") if row.device == known.get("device")]
    if not found:
        sys.exit(f"--merge {folder}: it holds no row of a {known.get('device', 'device')}; look into its log.txt")
    return known, [replace(row, commit=row.commit or known.get("commit", "")) for row in found]


def main(folder: Path, root: Path) -> int:
    """Merges a run into a repository; what the run left no rows for stays as it is, and is named."""
    known, new = read(folder)
    if known.get("dry_run") and root.resolve() == ROOT:
        sys.exit(f"--merge {folder}: it holds a dry run, whose figures say nothing of a GPU; name a copy with --root")
    path = root / "bench/results" / rows.file_name(known["machine"])
    every = rows.merge(rows.read(path), new)
    rows.write(path, every)
    print(f"{len(new)} rows into {path}")
    for plot in plots.draw(path):
        print(plot)
    for page, (name, make) in PAGES.items():
        target = root / page
        try:
            content = make([row for row in every if row.device == known["device"]])
        except ValueError as reason:
            print(f"{page} stays as it is: {reason}")
            continue
        target.write_text(plots.put_between_markers(target.read_text(), name, content))
        print(target)
    return 0
