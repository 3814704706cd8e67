"""Runs of the demo side by side, one folder for each noise: tables in Markdown, and one picture.

    python examples/regimes.py runs/clean runs/noise20 runs/noise40 --picture passes.svg

Accuracy, its difference from F-SAM in each step with the same seed, the top eigenvalue, and the settings; figures are
means over the seeds that have every row, with their standard errors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import pictures
import report
from report import Estimate, Finished, by_label


def rows(finished: Finished) -> dict[str, Finished]:
    """The runs by label; without a method's rho where it has one only, so that regimes with other rhos share rows."""
    groups = {}
    for label, runs in by_label(finished).items():
        run = runs[0][0]
        alone = len(pictures.rhos_of(finished, run.method)) == 1
        groups[label.replace(f" rho {run.rho:g}", "") if alone else label] = runs
    return groups


def setting(label: str, regime: dict[str, Finished]) -> str:
    """Learning rate, weight decay and rho; those of what has a change are its method's."""
    run = regime[label][0][0]
    rho = "" if run.rho is None else f", {run.rho:g}"
    return "" if run.change else f"{run.lr:g}, {run.weight_decay:g}{rho}"


def from_fsam(label: str, regime: dict[str, Finished]) -> str:
    """The difference of accuracy from F-SAM without changes, in points, paired by seed."""
    plain = {run.seed: result.test_accuracy for run, result in regime.get("F-SAM", [])}
    pairs = [100 * (result.test_accuracy - plain[run.seed]) for run, result in regime[label] if run.seed in plain]
    return Estimate.of(pairs).text("+.2f") if pairs and label != "F-SAM" else ""


def mean(form: str, value: Callable[[report.Result], float]) -> Callable[[str, dict[str, Finished]], str]:
    return lambda label, regime: Estimate.of(value(result) for _, result in regime[label]).text(form)


TABLES = {
    "test accuracy %": mean(".2f", lambda result: 100 * result.test_accuracy),
    "points more than F-SAM in each step, paired by seed": from_fsam,
    "top eigenvalue": mean(".2f", lambda result: result.top_eigenvalue),
    "learning rate, weight decay, rho": setting,
}


def table(title: str, cell: Callable[[str, dict[str, Finished]], str], regimes: Sequence[Finished]) -> str:
    """One figure for every row that has any, in Markdown; passes are those of the first regime that has the row."""
    columns = [rows(finished) for finished in regimes]
    longest_first = sorted(columns, key=len, reverse=True)
    labels = list(dict.fromkeys(label for column in longest_first for label in column))
    lines = [[title, "passes a step", *map(pictures.describe, regimes)]]
    for label in labels:
        first = next(column[label] for column in columns if label in column)
        cells = [cell(label, column) if label in column else "" for column in columns]
        if any(cells):
            lines.append([label, report.passes(first), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in lines
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="what --out of the demo's runs named")
    parser.add_argument("--picture", type=Path, help="where to draw accuracy against passes (.svg, .png)")
    options = parser.parse_args(argv)
    regimes = []
    for folder in options.folders:
        try:
            regimes.append(report.complete(report.read_csv(folder)))
        except FileNotFoundError as error:
            parser.error(f"{folder} is no folder of a run of the demo: {error.filename} is missing")
        if not regimes[-1]:
            parser.error(f"{folder} has no seed with every row: continue that run with --resume")
    print("\n\n".join(table(title, cell, regimes) for title, cell in TABLES.items()))
    if options.picture:
        pictures.draw_side_by_side(regimes, options.picture)
        print(f"\nwrote {options.picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
