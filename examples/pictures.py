"""The demo's picture: accuracy against passes, learning curves, top eigenvalues, and accuracy against several rhos."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import Estimate, Finished, by_label, without_changes
from training import Run

COLOURS = {
    "base": "#7f7f7f",
    "tuned": "#222222",
    "sam": "#d95f02",
    "fsam": "#1b6ca8",
    "every": "#35a02c",
    "reuse": "#c2187a",
    "last": "#a6761d",
    "average": "#17becf",
}
MARKERS = {"base": "v", "tuned": "^", "sam": "s", "fsam": "o", "every": "o", "reuse": "D", "last": "X"}
LINES = ("-", "--", ":", "-.")  # for several rhos, or several of a family


def family(run: Run) -> str:
    """What a run has its colour of: what is changed in it, or else its method."""
    if run.reuse is not None:
        return "reuse"
    if run.every != 1:
        return "every"
    if run.last != 1:
        return "last"
    return "average" if run.average != "float32" else run.method


def draw(finished: Finished, path: Path) -> None:
    """Accuracy against passes, learning curves and top eigenvalues; where rhos are several, accuracy too."""
    plt = _pyplot()
    panels = [accuracy_against_passes, _learning_curves, _top_eigenvalues]
    if len({run.rho for run, _ in finished if run.rho is not None}) > 1:
        panels.insert(1, _accuracy_against_rho)
    figure, axes = plt.subplots(1, len(panels), figsize=(5.4 * len(panels), 6.6), layout="constrained")
    for panel, ax in zip(panels, axes, strict=True):
        panel(ax, finished)
        _frame(ax)
    first = finished[0][0]
    figure.suptitle(f"{first.dataset}, {first.arch}, {first.epochs} epochs, {describe(finished)}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_side_by_side(regimes: Sequence[Finished], path: Path) -> None:
    """Accuracy against passes for several noises, each with an axis of accuracy of its own."""
    plt = _pyplot()
    plt.rcParams["font.size"] = 9
    panels = len(regimes)
    figure, axes = plt.subplots(1, panels, figsize=(0.4 + 3.1 * panels, 4.6), layout="constrained", squeeze=False)
    for ax, finished in zip(axes[0], regimes, strict=True):
        accuracy_against_passes(ax, finished, legend=False)
        ax.set_title(describe(finished), fontsize="medium")
        _frame(ax)
    for ax in axes[0, 1:]:
        ax.set_ylabel("")
    fullest_first = sorted(axes[0], key=lambda ax: len(ax.containers), reverse=True)
    labelled = [pair for ax in fullest_first for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in labelled}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=panels, frameon=False)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def describe(finished: Finished) -> str:
    """The noise and the seeds."""
    seeds = len({run.seed for run, _ in finished})
    return f"{noise_of(finished)}, " + (f"{seeds} seeds" if seeds > 1 else "one seed")


def noise_of(finished: Finished) -> str:
    noise = finished[0][0].noise
    return f"{noise:.0%} wrong labels" if noise else "clean labels"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, and the same figures give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fsam_ext"})
    import matplotlib.pyplot as plt

    return plt


def _frame(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def accuracy_against_passes(axes: Any, finished: Finished, legend: bool = True) -> None:
    """What a unit of compute buys: a line for each way of spending it, from the plain run on."""
    lines: dict[tuple[str, float | None], list[Finished]] = {}
    plain: dict[float | None, Finished] = {}
    for runs in by_label(finished).values():
        run = runs[0][0]
        if family(run) == "fsam":
            plain[run.rho] = runs
        if family(run) != "average":  # as many passes as without
            lines.setdefault((family(run), run.rho), []).append(runs)
    marks: list[tuple[float, float, Run]] = []
    for (kind, rho), members in sorted(lines.items(), key=lambda line: list(COLOURS).index(line[0][0])):
        if kind in ("every", "reuse") and rho in plain:  # where both begin
            members = [plain[rho], *members]
        rhos = rhos_of(finished, members[0][0][0].method)
        name = _name_of_line(kind, members) + (f", rho {rho:g}" if len(rhos) > 1 else "")
        style = LINES[rhos.index(rho) % len(LINES)] if rhos else "-"
        marks += _line(axes, kind, style, name, members)
    for passes, accuracy, run in marks:
        if run.every != 1:
            # Beside its error bar; below, where a point above or close to the right would be covered.
            below = any(passes <= x < passes + 0.15 and y > accuracy for x, y, _ in marks)
            axes.annotate(
                run.every,
                (passes, accuracy),
                xytext=(4, -3 if below else 3),
                textcoords="offset points",
                va="top" if below else "bottom",
                color=COLOURS[family(run)],
            )
    axes.set(xlabel="forward-backward passes a step", ylabel="final test accuracy (%)")
    axes.margins(0.1)
    if legend:
        axes.set_title("What a pass buys")
        _legend_below(axes)


def rhos_of(finished: Finished, method: str) -> list[float]:
    """The rhos that a method has been run with, in order."""
    return sorted({run.rho for run, _ in finished if run.method == method and run.rho is not None})


def _name_of_line(kind: str, members: list[Finished]) -> str:
    run = members[0][0][0]
    return {
        "sam": "SAM",
        "fsam": "F-SAM",
        "every": "F-SAM in every k-th step (k at the point)",
        "reuse": "the same, with reuse between",
        "last": f"F-SAM, {run.change}",
    }.get(kind, without_changes(run).label)


def _line(axes: Any, kind: str, style: str, name: str, members: list[Finished]) -> list[tuple[float, float, Run]]:
    """Draws one way of spending passes, and returns its points: passes, accuracy, and a run there."""
    points = sorted(
        (statistics.fmean(r.passes for _, r in runs), *Estimate.of(100 * r.test_accuracy for _, r in runs), runs[0][0])
        for runs in members
    )
    passes, accuracy, error, runs = zip(*points, strict=True)
    error = [0.0 if math.isnan(e) else e for e in error]
    look = {"marker": MARKERS[kind], "markersize": 5, "linewidth": 1.3, "capsize": 3}
    look["zorder"] = 3 if kind == "fsam" else 2  # the point that lines share
    axes.errorbar(passes, accuracy, error, linestyle=style, color=COLOURS[kind], label=name, **look)
    return list(zip(passes, accuracy, runs, strict=True))


def _legend_below(axes: Any) -> None:
    """Where it covers nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize="small", frameon=False)


def _accuracy_against_rho(axes: Any, finished: Finished) -> None:
    groups = by_label(finished)
    looks = _looks(groups)
    curves: dict[tuple[str, str, str], list[tuple[float, Estimate]]] = {}
    for label, runs in groups.items():
        run = runs[0][0]
        accuracy = Estimate.of(100 * result.test_accuracy for _, result in runs)
        colour, style = looks[label]
        if run.rho is None:
            axes.axhline(accuracy.mean, color=colour, linestyle=style, label=label)
            if not math.isnan(accuracy.error):
                low, high = accuracy.mean - accuracy.error, accuracy.mean + accuracy.error
                axes.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
        else:
            name = label.replace(f" rho {run.rho:g}", "")
            curves.setdefault((name, colour, style), []).append((run.rho, accuracy))
    for (name, colour, style), points in curves.items():
        points.sort()
        axes.errorbar(
            [rho for rho, _ in points],
            [accuracy.mean for _, accuracy in points],
            [0.0 if math.isnan(accuracy.error) else accuracy.error for _, accuracy in points],
            marker="o",
            capsize=4,
            color=colour,
            linestyle=style,
            label=name,
        )
    axes.set_xticks(sorted({rho for points in curves.values() for rho, _ in points}))
    axes.set(title="Accuracy against rho", xlabel="rho", ylabel="final test accuracy (%)")
    _legend_below(axes)


def _looks(groups: dict[str, Finished]) -> dict[str, tuple[str, str]]:
    """Colour and line of each label: the colour is the family's, lines tell its members apart."""
    members: dict[str, list[str]] = {}
    looks = {}
    for label, runs in groups.items():
        run = runs[0][0]
        kind = family(run)
        of_kind = members.setdefault(kind, [])
        if run.change not in of_kind:
            of_kind.append(run.change)
        looks[label] = (COLOURS[kind], LINES[of_kind.index(run.change) % len(LINES)])
    return looks


def _learning_curves(axes: Any, finished: Finished) -> None:
    groups = by_label(finished)
    looks = _looks(groups)
    for label, runs in groups.items():
        mean = [100 * statistics.fmean(v) for v in zip(*(r.curve for _, r in runs), strict=True)]
        colour, style = looks[label]
        axes.plot(range(1, len(mean) + 1), mean, color=colour, linestyle=style, linewidth=1.6, label=label)
    axes.set(title="Learning curves", xlabel="epoch", ylabel="test accuracy (%)")
    _legend_below(axes)


def _top_eigenvalues(axes: Any, finished: Finished) -> None:
    """On a log axis where all are positive and far apart: they can span two decades."""
    groups = by_label(finished)
    values = {label: [result.top_eigenvalue for _, result in r] for label, r in groups.items()}
    for row, label in enumerate(groups):
        estimate, colour = Estimate.of(values[label]), COLOURS[family(groups[label][0][0])]
        if not math.isfinite(estimate.mean):
            axes.annotate(" not finite", (0, row), xycoords=("axes fraction", "data"), va="center")
            continue
        axes.plot(values[label], [row] * len(values[label]), "o", color=colour, alpha=0.35)
        axes.plot(estimate.mean, row, "D", color=colour)
        axes.annotate(
            f"{estimate.mean:.3g}",
            (estimate.mean, row),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize="small",
            color=colour,
        )
    axes.margins(x=0.12)
    every = [v for group in values.values() for v in group if math.isfinite(v)]
    if every and 0 < 4 * min(every) < max(every):
        axes.set_xscale("log")
        axes.set_xticks(_log_ticks(*axes.get_xlim()), minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.7)
    axes.set(title="Sharpness", xlabel="top eigenvalue of the training loss's Hessian")


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends of a log axis, six at most: labels of more run into each other."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) <= 6:
            break
    return ticks[:: math.ceil(len(ticks) / 6)]
