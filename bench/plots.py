"""Draws the results and writes tables, all from the rows: ``python bench/plots.py --write README.md docs/*.md``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

# This checkout's package, wherever the command is called from and whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.rows import Row, default_path, read
from bench.workloads import TRAININGS, WORKLOADS, scaling

# The order of importance, which is the order of bars and columns. Colours stay with a provider in all plots.
COLORS = {
    "official": "#7f7f7f",
    "pytorch_optimizer": "#c49c94",
    "pytorch_optimizer default": "#e0c9c4",
    "pytorch_optimizer graph": "#9c7a73",
    "foreach": "#ffbb78",
    "foreach graph": "#e377c2",
    "compiled": "#ff7f0e",
    "compiled graph": "#8c564b",
    "fsam_ext": "#1f77b4",
    "fsam_ext flat": "#08306b",
    "fsam_ext graph": "#2ca02c",
    "fsam_ext flat graph": "#145214",
    "fsam_ext triton": "#9467bd",
    "fsam_ext triton graph": "#5e3c99",
    "fsam_ext reference": "#c5b0d5",
    "fsam_ext int8": "#6baed6",
    "fsam_ext masters": "#41ab5d",
    "fsam_ext masters, bf16": "#78c679",
    "fsam_ext masters, int8": "#addd8e",
    "sam": "#98df8a",
    "sam by hand": "#b5cf6b",
    "base": "#d9d9d9",
    "plain": "#f0f0f0",
}
PEERS = ("official", "pytorch_optimizer", "foreach", "compiled")
OURS = ("fsam_ext", "fsam_ext flat")
# Beside them on a GPU.
PEERS_AS_GRAPHS = ("pytorch_optimizer graph", "foreach graph", "compiled graph")
OURS_AS_GRAPHS = ("fsam_ext graph", "fsam_ext flat graph")
# Not what is compared: other work, or the tests' own oracle.
UNPLOTTED = ("official", "base", "plain", "sam", "sam by hand", "fsam_ext reference")


class Figures:
    """Rows that can be asked for one figure; ``shown`` are those that were."""

    def __init__(self, rows: list[Row], device: str) -> None:
        self.rows = [row for row in rows if row.device == device]
        self._found = {(r.provider, r.workload, r.dtype, r.base, r.metric): r for r in self.rows}
        self.shown: list[Row] = []

    def get(self, provider: str, workload: str, metric: str, dtype: str = "fp32", base: str = "sgd") -> Row | None:
        """The row, or None where it was not measured."""
        row = self._found.get((provider, workload, dtype, base, metric))
        if row is None or row.median is None:
            return None
        self.shown.append(row)
        return row

    def cases(self, metric: str) -> list[tuple[str, str, str]]:
        """(workload, dtype, base) for which our package has this metric, in the order of the workloads."""
        order = {name: i for i, name in enumerate(WORKLOADS)}
        found = {
            (r.workload, r.dtype, r.base)
            for r in self.rows
            if r.provider == "fsam_ext" and r.metric == metric and r.workload in order
        }
        return sorted(found, key=lambda case: (case[1] != "fp32", case[2] != "sgd", order[case[0]]))


def _label(case: tuple[str, str, str]) -> str:
    workload, dtype, base = case
    return f"{WORKLOADS[workload].title}\n{dtype}, {base}"


# ---- Plots ---------------------------------------------------------------------------------------------------------


def draw(path: Path) -> list[Path]:
    """Draws every plot that the rows of a file allow, next to it; returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "svg.hashsalt": "fsam"})
    rows = read(path)
    written = []
    for device in dict.fromkeys(row.device for row in rows if row.median is not None):
        for name, plot in (("speedup", speedup), ("bus", bus), ("growth", growth)):
            figures = Figures(rows, device)
            figure = plot(figures, plt)
            if figure is None:
                continue
            figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
            figure.text(0.005, 0.005, _caption(figures), fontsize=6, color="#666666", va="bottom", wrap=True)
            target = path.with_name(f"{path.stem}-{device}-{name}.svg")
            figure.savefig(target, metadata={"Date": None})
            plt.close(figure)
            written.append(target)
    return written


def _caption(figures: Figures) -> str:
    shown = sorted(figures.shown, key=lambda row: row.date)
    first, last = shown[0], shown[-1]
    commits = ", ".join(dict.fromkeys(row.commit or "no commit" for row in shown))
    dates = last.date if first.date == last.date else f"{first.date} to {last.date}"
    return f"{last.machine}, {last.threads} threads; {last.versions}; {commits}, {dates}"


def speedup(figures: Figures, plt):
    """Bars: how many times faster than the official sequence, for each workload. Below 1 is slower."""
    cases = [case for case in figures.cases("step") if figures.get("official", case[0], "step", *case[1:])]
    found = {
        case: [(n, row) for n in COLORS if n not in UNPLOTTED and (row := _speedup(figures, n, case))] for case in cases
    }
    if not cases:
        return None
    bars = sum(len(rows) + 1 for rows in found.values())
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.14 * bars), layout="constrained")
    y, ticks = 0, []
    for rows in found.values():
        ticks.append(y + (len(rows) - 1) / 2)
        for name, row in rows:
            label = name if name not in axes.get_legend_handles_labels()[1] else None
            error = [[row.median - row.q20], [row.q80 - row.median]]
            axes.barh(y, row.median, 1, color=COLORS[name], label=label, xerr=error, error_kw={"lw": 0.8})
            axes.text(row.q80 * 1.04, y, f"{row.median:.3g}x", va="center", fontsize=7)
            y += 1
        y += 1
    axes.axvline(1, color=COLORS["official"], lw=1)
    axes.set_xscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * 1.3)
    axes.set_yticks(ticks, [_label(case) for case in cases])
    axes.set_ylim(y - 0.5, -1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("optimizer part of a step: times faster than the official sequence (median, 20-80 %)")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def _speedup(figures: Figures, name: str, case: tuple[str, str, str]) -> Row | None:
    return figures.get(name, case[0], "speedup_over official", *case[1:])


def bus(figures: Figures, plt):
    """Roofline: each implementation's rate over the bytes that F-SAM must move, under what a triad reaches there."""
    cases = figures.cases("achieved")
    if not cases:
        return None
    figure, axes = plt.subplots(figsize=(max(9, 2 + 0.6 * len(cases)), 4.6), layout="constrained")
    for j, case in enumerate(cases):
        triad = figures.get("triad", case[0], "bus", *case[1:])
        if triad is not None:
            label = "triad of the same size: the limit" if j == 0 else None
            axes.plot([j - 0.42, j + 0.42], [triad.median] * 2, color="black", lw=2, label=label)
            axes.fill_between([j - 0.42, j + 0.42], triad.q20, triad.q80, color="black", alpha=0.12, lw=0)
        names = [n for n in COLORS if n != "fsam_ext reference" and figures.get(n, case[0], "achieved", *case[1:])]
        for i, name in enumerate(names):
            row = figures.get(name, case[0], "achieved", *case[1:])
            label = name if name not in axes.get_legend_handles_labels()[1] else None
            x = j - 0.36 + 0.72 * i / max(1, len(names) - 1)
            error = [[row.median - row.q20], [row.q80 - row.median]]
            axes.errorbar(x, row.median, error, fmt="o", ms=5, lw=0.8, color=COLORS[name], label=label)
    axes.set_yscale("log")
    axes.set_ylabel("bytes that F-SAM must move / time, GB/s")
    axes.set_xticks(range(len(cases)), [_label(case) for case in cases], rotation=40, ha="right", fontsize=7)
    axes.set_xlim(-0.6, len(cases) - 0.4)
    axes.grid(axis="y", which="both", lw=0.3)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def growth(figures: Figures, plt):
    """Cost of the optimizer part against the number of parameters, both logarithmic."""
    works = [work for work in scaling(3e8) + scaling(1e8) if figures.get("fsam_ext", work.name, "step")]
    works = sorted({work.name: work for work in works}.values(), key=lambda work: work.numel)
    if len(works) < 2:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for name, color in COLORS.items():
        points = [(w.numel, r) for w in works if (r := figures.get(name, w.name, "step"))]
        if not points:
            continue
        x, found = zip(*points)
        axes.plot(x, [r.median for r in found], "o-", color=color, label=name, ms=4)
        axes.fill_between(x, [r.q20 for r in found], [r.q80 for r in found], color=color, alpha=0.15, lw=0)
    limit = [(w.numel, _limit(figures, w.name, w.numel)) for w in works]
    limit = [point for point in limit if point[1]]
    if limit:
        axes.plot(*zip(*limit), "k--", lw=1, label="the bytes at the triad's rate")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters (97 tensors, as in a transformer of 12 layers)")
    axes.set_ylabel("optimizer part of a step, ms (median, 20-80 %)")
    axes.grid(which="major", lw=0.3)
    axes.legend(frameon=False)
    return figure


def _limit(figures: Figures, workload: str, numel: int) -> float | None:
    from bench.peers import bytes_per_parameter

    triad = figures.get("triad", workload, "bus")
    return numel * bytes_per_parameter(torch.float32, "sgd") / triad.median / 1e6 if triad else None


# ---- The README's table --------------------------------------------------------------------------------------------


def _duration(milliseconds: float) -> str:
    return f"{milliseconds:.3g} ms" if milliseconds < 999.5 else f"{milliseconds / 1e3:.3g} s"


def table(rows: list[Row]) -> str:
    """Markdown: a line for each optimizer workload in fp32 with SGD, ours against every peer."""
    device = "cuda" if any(row.device == "cuda" and row.median is not None for row in rows) else "cpu"
    figures = Figures(rows, device)
    others = (*PEERS[1:], *OURS)
    if device == "cuda":
        others = (*PEERS[1:], *PEERS_AS_GRAPHS, *OURS, *OURS_AS_GRAPHS)
    head = ["workload", "official", *others, "of the memory bus"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    measured = [case for case in figures.cases("step") if case[1:] == ("fp32", "sgd")]
    for workload, dtype, base in measured:
        official = figures.get("official", workload, "step", dtype, base)
        cells = [WORKLOADS[workload].title, _duration(official.median) if official else "-"]
        for name in others:
            row = figures.get(name, workload, "speedup_over official", dtype, base)
            text = f"{row.median:.3g}x" if row else "-"
            cells.append(f"**{text}**" if row and name in (*OURS, *OURS_AS_GRAPHS) else text)
        fractions = [figures.get(name, workload, "bus_fraction", dtype, base) for name in OURS]
        known = [f"{row.median:.2f}" if row else "-" for row in fractions]
        cells.append(" / ".join(known))
        lines.append("| " + " | ".join(cells) + " |")
    if not measured:
        raise ValueError("there are no rows of an optimizer workload in fp32 with SGD; run bench/run.py first")
    caption = (
        "Time of the official sequence, and how many times faster each one is (median over alternating rounds; SGD "
        "with momentum, fp32, the optimizer part of a step). Last column: the bytes that F-SAM must move over the "
        f"time, as a fraction of a triad's rate, not flattened / flattened. {GPU_TIMES if device == 'cuda' else ''}"
        f"{_caption(figures)}."
    )
    return "\n".join([*lines, "", caption])


GPU_TIMES = (
    "Time of the device: everything was queued ahead, and the L2 overwritten before each half of a step. The official "
    "sequence cannot be captured as a graph, since each step gives the weights another memory. "
)


def training_table(rows: list[Row]) -> str:
    """Markdown: a line for each training workload, everyone's whole step over plain training's."""
    device = "cuda" if any(row.device == "cuda" and row.metric == "cost_over_plain" for row in rows) else "cpu"
    figures = Figures(rows, device)
    names = ("base", "sam by hand", *PEERS, *OURS, "fsam_ext triton")
    lines = ["| workload | plain | " + " | ".join(names) + " |", "|---|---:" + "|---:" * len(names) + "|"]
    for work in TRAININGS.values():
        plain = figures.get("plain", work.name, "step", work.dtype, work.base)
        if plain is None:
            continue
        cells = [work.title, _duration(plain.median)]
        for name in names:
            row = figures.get(name, work.name, "cost_over_plain", work.dtype, work.base)
            cells.append((f"**{row.median:.3g}x**" if name in OURS else f"{row.median:.3g}x") if row else "-")
        lines.append("| " + " | ".join(cells) + " |")
    if len(lines) == 2:
        raise ValueError("there are no rows of plain training; run bench/run.py --workloads train_gpt first")
    caption = (
        "Whole training steps: the time of plain training, which makes one forward-backward, and everyone's over it "
        "(median over alternating rounds). `base` makes two forward-backwards and perturbs nothing."
    )
    return "\n".join([*lines, "", f"{caption} {_caption(figures)}."])


def footprint_table(rows: list[Row]) -> str:
    """Markdown: bytes of state for each parameter, between steps and at most within one."""
    device = "cuda" if any(row.device == "cuda" and row.metric == "state" for row in rows) else "cpu"
    figures = Figures([row for row in rows if row.metric in ("state", "state_peak")], device)
    workload = next((row.workload for row in figures.rows), None)
    if workload is None:
        raise ValueError("there are no rows of state; run bench/run.py --workloads resnet18 first")
    kinds = [(dtype, base) for dtype in ("fp32", "bf16") for base in ("sgd", "adamw")]
    names = {"sgd": "SGD with momentum", "adamw": "AdamW"}
    lines = ["| | " + " | ".join(f"{dtype}, {names[base]}" for dtype, base in kinds) + " |", "|---" + "|---:" * 4 + "|"]
    for provider in COLORS:
        cells = []
        for kind in kinds:
            kept, peak = (figures.get(provider, workload, metric, *kind) for metric in ("state", "state_peak"))
            cells.append(f"{kept.median:.2f} / {peak.median:.2f}" if kept and peak else "-")
        if set(cells) != {"-"}:
            lines.append(f"| {provider} | " + " | ".join(cells) + " |")
    title = WORKLOADS[workload].title
    return "\n".join([*lines, "", f"Between steps / at most within a step; {title}. {_caption(figures)}."])


# What can stand between two marker lines of a page, by the name in the markers.
TABLES = {"bench": table, "training": training_table, "footprint": footprint_table}


def put_between_markers(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between the two marker lines of a name.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    begin, end = (f"<!-- {name}:{which} -->" for which in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the file must hold {begin} and after it {end}, once each, around the table")
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    return f"{before}\n{content}\n{after}"


def fill(text: str, rows: list[Row]) -> str:
    """A page with every table that it has markers for made anew."""
    for name, make in TABLES.items():
        if f"<!-- {name}:" in text:
            text = put_between_markers(text, name, make(rows))
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=Path, default=default_path(device), help="the CSV file (this machine's)")
    parser.add_argument("--write", type=Path, nargs="+", default=[], help="pages whose tables are made anew")
    args = parser.parse_args(argv)
    rows = read(args.rows)
    if not rows:
        raise SystemExit(f"--rows {args.rows}: there are no rows; run bench/run.py first")
    for path in draw(args.rows):
        print(path)
    for page in args.write:
        page.write_text(fill(page.read_text(), rows))
    if not args.write:
        print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
