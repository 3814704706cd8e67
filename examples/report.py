"""What the demo leaves for a reader in figures: a table on the screen, results.csv and curves.csv, read back too."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from training import Result, Run

Finished = list[tuple[Run, Result]]


class Estimate(NamedTuple):
    """Mean over seeds and its standard error (nan for one seed)."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        values = list(values)
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(statistics.fmean(values), error)

    def text(self, form: str) -> str:
        error = "" if math.isnan(self.error) else f" ± {self.error:{form.lstrip('+')}}"
        return f"{self.mean:{form}}{error}"


def by_label(finished: Finished) -> dict[str, Finished]:
    """The runs that differ only in their seed, together, in the order of the plan."""
    groups: dict[str, Finished] = {}
    for run, result in finished:
        groups.setdefault(run.label, []).append((run, result))
    return groups


def complete(finished: Finished) -> Finished:
    """The runs of those seeds that every row has: of a run that was interrupted, what can be compared."""
    seeds = [{run.seed for run, _ in runs} for runs in by_label(finished).values()]
    of_all = set.intersection(*seeds) if seeds else set()
    return [(run, result) for run, result in finished if run.seed in of_all]


def paired_differences(finished: Finished) -> dict[str, list[float]]:
    """ "a - b" -> differences of test accuracy, in points, one for each seed that has both.

    F-SAM is compared with SAM (of the same rho; where both have one only, whatever it is), what has a change with the
    same without, and what reuses a gradient also with what has as few passes and does not. Paired, because a seed fixes
    subset, label noise, initial weights and batch order for both.
    """
    accuracy = {run: result.test_accuracy for run, result in finished}
    differences: dict[str, list[float]] = {}
    for run, value in accuracy.items():
        for other in _compared_with(run, accuracy):
            if other in accuracy:
                differences.setdefault(f"{run.label} - {other.label}", []).append(100 * (value - accuracy[other]))
    return differences


def _compared_with(run: Run, runs: Collection[Run]) -> list[Run]:
    if run.reuse is not None:
        return [without_changes(run), dataclasses.replace(run, reuse=None)]
    if run.change:
        return [without_changes(run)]
    return _sam_beside(run, runs) if run.method == "fsam" else []


def _sam_beside(run: Run, runs: Collection[Run]) -> list[Run]:
    """The SAM that a plain F-SAM has beside it."""
    beside = [other for other in runs if other.seed == run.seed and not other.change]
    sams = [other for other in beside if other.method == "sam"]
    alone = len(sams) == 1 == sum(other.method == "fsam" for other in beside)
    return sams if alone else [other for other in sams if other.rho == run.rho]


def without_changes(run: Run) -> Run:
    """The plain run of the same method and rho."""
    return dataclasses.replace(run, every=1, last=1.0, average="float32", reuse=None, longer=1)


def table(finished: Finished) -> str:
    """The results as text; figures are means over seeds, with their standard errors."""
    heads = ("", "passes a step", "test accuracy %", "training loss", "top eigenvalue", "seconds")
    columns: list[tuple[str, Callable[[Result], float]]] = [
        (".2f", lambda result: 100 * result.test_accuracy),
        (".3f", lambda result: result.train_loss),
        (".2f", lambda result: result.top_eigenvalue),
        (".1f", lambda result: result.seconds),
    ]
    rows = [heads]
    for label, runs in by_label(finished).items():
        cells = (Estimate.of(value(r) for _, r in runs).text(form) for form, value in columns)
        rows.append((label, passes(runs), *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "-" * len(lines[0]))

    seeds = len({run.seed for run, _ in finished})
    differences = paired_differences(finished)
    if differences:
        lines += ["", "differences of accuracy in points, paired by seed:"]
    width = max(map(len, differences), default=0)
    lines += [f"  {names:{width}}  {Estimate.of(values).text('+.2f')}" for names, values in differences.items()]
    lines += ["", f"{seeds} seeds; mean ± standard error" if seeds > 1 else ONE_SEED]
    return "\n".join(lines)


def passes(runs: Finished) -> str:
    """Passes a step, the same for every seed."""
    return f"{statistics.fmean(result.passes for _, result in runs):.2f}"


ONE_SEED = "1 seed, so no standard errors: --seeds 5 gives them"


def write_csv(finished: Finished, folder: Path) -> list[Path]:
    """``results.csv``, a row per run, and ``curves.csv``, a row per run and epoch."""
    results, curves = folder / "results.csv", folder / "curves.csv"
    settings = [field.name for field in dataclasses.fields(Run)]
    figures = [field.name for field in dataclasses.fields(Result) if field.name != "curve"]
    _write(
        results,
        ["label", *settings, *figures],
        (
            [
                run.label,
                *(getattr(run, s) for s in settings),
                *(getattr(result, f) for f in figures),
            ]
            for run, result in finished
        ),
    )
    _write(
        curves,
        ["label", "seed", "epoch", "test_accuracy"],
        (
            [run.label, run.seed, epoch, value]
            for run, result in finished
            for epoch, value in enumerate(result.curve, 1)
        ),
    )
    return [results, curves]


def read_csv(folder: Path) -> Finished:
    """What :func:`write_csv` wrote into ``folder``; FileNotFoundError where there is nothing."""
    with (folder / "curves.csv").open(encoding="utf-8") as file:
        curves: dict[tuple[str, str], list[float]] = {}
        for row in csv.DictReader(file):
            curves.setdefault((row["label"], row["seed"]), []).append(float(row["test_accuracy"]))
    with (folder / "results.csv").open(encoding="utf-8") as file:
        return [
            (_parsed(Run, row), _parsed(Result, row, curve=curves[row["label"], row["seed"]]))
            for row in csv.DictReader(file)
        ]


def _parsed(kind: type, row: dict[str, str], **given: Any) -> Any:
    """A ``kind`` of a row's cells, each of its field's type; an empty one is None."""
    types = {"int": int, "float": float, "str": str}
    cells = {
        field.name: types[field.type.partition(" ")[0]](row[field.name]) if row[field.name] else None
        for field in dataclasses.fields(kind)
        if field.name not in given
    }
    return kind(**cells, **given)


def _write(path: Path, head: list[str], rows: Iterable[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)
