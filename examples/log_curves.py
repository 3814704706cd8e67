"""Draws the curves of a CSV log of Lightning's: the loss, an accuracy, and what F-SAM measured in its ascents.

pip install matplotlib
python examples/log_curves.py runs/lightning_digits/version_0/metrics.csv curves.svg
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

# A panel: its title, and each column of the log with its label, colour and width.
PANELS = (
    ("loss of the first pass", {"loss": ("loss", "#444444", 1.4)}),
    ("accuracy", {"accuracy": ("accuracy", "#444444", 1.4)}),
    (
        "norms",
        {
            "fsam/grad_norm": ("fsam/grad_norm: the first gradient", "#9ecae1", 3.5),
            "fsam/noise_norm": ("fsam/noise_norm: less its average", "#d62728", 1.0),
        },
    ),
    (
        "cosines",
        {
            "fsam/cosine": ("fsam/cosine: gradient and average", "#1f77b4", 1.4),
            "fsam/effective_cosine": ("fsam/effective_cosine", "#d62728", 1.4),
        },
    ),
)


def column(rows: list[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    """The steps in which a value was logged, and the values."""
    found = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    return [step for step, _ in found], [value for _, value in found]


def draw(log: Path, picture: Path) -> None:
    """Draws a log into a picture, 800 pixels wide."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "fsam"})
    with open(log) as file:
        rows = list(csv.DictReader(file))
    figure, panels = plt.subplots(2, 2, figsize=(8, 5), sharex=True, layout="constrained")
    for axes, (title, curves) in zip(panels.flat, PANELS, strict=True):
        _panel(axes, title, {label: (*column(rows, name), *style) for name, (label, *style) in curves.items()})
    for axes in panels[1]:
        axes.set_xlabel("step")
    panels[0, 0].set_yscale("log")
    panels[1, 1].axhline(0, color="#999999", linewidth=0.8)
    _, overflows = column(rows, "fsam/found_inf")
    figure.suptitle(f"fsam/found_inf in {sum(map(bool, overflows))} of {len(overflows)} logged steps", fontsize=10)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100, metadata={"Date": None} if picture.suffix == ".svg" else None)
    plt.close(figure)


def _panel(axes: Any, title: str, curves: dict[str, tuple[list[int], list[float], str, float]]) -> None:
    drawn = {label: curve for label, curve in curves.items() if curve[0]}
    for label, (steps, values, colour, width) in drawn.items():
        axes.plot(steps, values, color=colour, linewidth=width, label=label)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    if any(label.startswith("fsam/") for label in drawn):
        axes.legend(fontsize=9, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("log", type=Path, help="metrics.csv, as Lightning's CSVLogger writes it")
    parser.add_argument("picture", type=Path, help="where the picture goes: .svg or .png")
    options = parser.parse_args()
    draw(options.log, options.picture)


if __name__ == "__main__":
    main()
