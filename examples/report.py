"""What the demo leaves for a reader: results.csv, curves.csv, a table on the screen, a picture."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
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


def paired_differences(finished: Finished) -> dict[str, list[float]]:
    """ "a - b" -> differences of test accuracy, in points, one for each seed that has both.

    F-SAM is compared with SAM, and F-SAM with a change with F-SAM without. Paired, because a seed fixes subset, label
    noise, initial weights and batch order for both.
    """
    accuracy = {run: result.test_accuracy for run, result in finished}
    differences: dict[str, list[float]] = {}
    for run, value in accuracy.items():
        other = _compared_with(run)
        if other != run and other in accuracy:
            differences.setdefault(f"{run.label} - {other.label}", []).append(100 * (value - accuracy[other]))
    return differences


def _compared_with(run: Run) -> Run:
    plain = dataclasses.replace(run, every=1, last=1.0, average="float32")
    return plain if run.change else dataclasses.replace(run, method="sam", sigma=None, lmbda=None)


def table(finished: Finished) -> str:
    """The results as text; figures are means over seeds, with their standard errors."""
    heads = ("", "test accuracy %", "training loss", "top eigenvalue", "passes a step", "seconds")
    columns: list[tuple[str, Callable[[Result], float]]] = [
        (".2f", lambda result: 100 * result.test_accuracy),
        (".3f", lambda result: result.train_loss),
        (".2f", lambda result: result.top_eigenvalue),
        (".2f", lambda result: result.passes),
        (".1f", lambda result: result.seconds),
    ]
    rows = [heads]
    for label, runs in by_label(finished).items():
        cells = (Estimate.of(value(r) for _, r in runs).text(form) for form, value in columns)
        rows.append((label, *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, "-" * len(lines[0]))

    seeds = len({run.seed for run, _ in finished})
    differences = paired_differences(finished)
    if differences:
        lines.append("")
    for names, values in differences.items():
        lines.append(f"{names}, paired by seed: {Estimate.of(values).text('+.2f')} points")
    lines += ["", f"{seeds} seeds; mean ± standard error" if seeds > 1 else ONE_SEED]
    return "\n".join(lines)


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


def _write(path: Path, head: list[str], rows: Iterable[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


COLOURS = {"base": "#7f7f7f", "tuned": "#222222", "sam": "#d95f02", "fsam": "#1b6ca8"}
COLOURS_OF_CHANGES = ("#4daf4a", "#984ea3", "#e7298a", "#a6761d", "#66c2a5", "#e6ab02")
NAMES = {"sam": "SAM", "fsam": "F-SAM"}


def _colours(groups: dict[str, Finished]) -> dict[str, str]:
    """A colour for each label: that of the method, or of what is changed in it."""
    runs = {label: runs[0][0] for label, runs in groups.items()}
    changes = list(dict.fromkeys(run.change for run in runs.values() if run.change))
    of_change = dict(zip(changes, _cycled(COLOURS_OF_CHANGES, len(changes)), strict=True))
    return {label: of_change[run.change] if run.change else COLOURS[run.method] for label, run in runs.items()}


def draw(finished: Finished, path: Path) -> None:
    """Accuracy against rho, learning curves and top eigenvalues, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = by_label(finished)
    colours = _colours(groups)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    _accuracy_against_rho(left, groups, colours)
    _learning_curves(middle, groups, colours)
    _top_eigenvalues(right, groups, colours)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    first = finished[0][0]
    seeds = len({run.seed for run, _ in finished})
    figure.suptitle(
        f"{first.dataset}, {first.noise:.0%} of the training labels wrong, {first.epochs} epochs, "
        + (f"mean and standard error of {seeds} seeds" if seeds > 1 else "one seed")
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _accuracy_against_rho(axes: Any, groups: dict[str, Finished], colours: dict[str, str]) -> None:
    curves: dict[tuple[str, str], list[tuple[float, Estimate]]] = {}
    for label, runs in groups.items():
        run = runs[0][0]
        accuracy = Estimate.of(100 * result.test_accuracy for _, result in runs)
        if run.rho is None:
            style = {"color": colours[label], "label": label}
            axes.axhline(accuracy.mean, linestyle="--", **style)
            if not math.isnan(accuracy.error):
                low, high = accuracy.mean - accuracy.error, accuracy.mean + accuracy.error
                axes.axhspan(low, high, color=style["color"], alpha=0.12, linewidth=0)
        else:
            name = f"{NAMES[run.method]}, {run.change}" if run.change else NAMES[run.method]
            curves.setdefault((name, colours[label]), []).append((run.rho, accuracy))
    for (name, colour), points in curves.items():
        points.sort()
        axes.errorbar(
            [rho for rho, _ in points],
            [accuracy.mean for _, accuracy in points],
            [0.0 if math.isnan(accuracy.error) else accuracy.error for _, accuracy in points],
            marker="o",
            capsize=4,
            color=colour,
            label=name,
        )
    axes.set_xticks(sorted({rho for points in curves.values() for rho, _ in points}))
    axes.set(title="Accuracy against rho", xlabel="rho", ylabel="final test accuracy (%)")
    axes.legend(loc="lower left")


def _learning_curves(axes: Any, groups: dict[str, Finished], colours: dict[str, str]) -> None:
    rhos = sorted({run.rho for runs in groups.values() for run, _ in runs if run.rho is not None})
    styles = dict(zip(rhos, _cycled(("-", "--", ":", "-."), len(rhos)), strict=True))
    for label, runs in groups.items():
        run = runs[0][0]
        mean = [100 * statistics.fmean(v) for v in zip(*(r.curve for _, r in runs), strict=True)]
        axes.plot(
            range(1, len(mean) + 1),
            mean,
            color=colours[label],
            linestyle=styles.get(run.rho, "-"),
            linewidth=1.6,
            label=label,
        )
    axes.set(title="Learning curves", xlabel="epoch", ylabel="test accuracy (%)")
    axes.legend(fontsize="small", ncols=2, loc="lower center")


def _top_eigenvalues(axes: Any, groups: dict[str, Finished], colours: dict[str, str]) -> None:
    """On a log axis where all are positive: they span two decades."""
    values = {label: [result.top_eigenvalue for _, result in r] for label, r in groups.items()}
    for row, label in enumerate(groups):
        estimate, colour = Estimate.of(values[label]), colours[label]
        if not math.isfinite(estimate.mean):
            axes.annotate(" not finite", (0, row), xycoords=("axes fraction", "data"), va="center")
            continue
        axes.plot(values[label], [row] * len(values[label]), "o", color=colour, alpha=0.35)
        axes.plot(estimate.mean, row, "D", color=colour)
        axes.annotate(
            f"{estimate.mean:.3g}",
            (estimate.mean, row),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=colour,
        )
    if all(v > 0 for group in values.values() for v in group):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    axes.margins(x=0.12)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.7)
    axes.set(title="Sharpness", xlabel="top eigenvalue of the training loss's Hessian")


def _cycled(items: Sequence[str], count: int) -> list[str]:
    return [items[i % len(items)] for i in range(count)]
