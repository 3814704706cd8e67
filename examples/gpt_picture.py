"""The picture of the language models: loss after quantization against passes, and forgetting against learning."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from gpt_report import LRS, Values, values
from gpt_results import Row
from gpt_training import Recipe, arms, label
from report import Estimate

LOOKS = {  # colour and marker
    "short": ("#222222", "v"),
    "middle": ("#222222", "o"),
    "long": ("#222222", "^"),
    "late": ("#7f7f7f", "X"),
    "sam": ("#d95f02", "s"),
    "fsam": ("#1b6ca8", "o"),
    "every": ("#35a02c", "P"),
    "reuse": ("#c2187a", "D"),
}
FRONTIER = ("short", "middle", "long")  # what passes buy without a second one


def draw(rows: list[Row], recipe: Recipe, path: Path) -> None:
    """Three panels into ``path``, a .png or .svg; error bars are standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, and the same figures give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fsam_ext"})
    import matplotlib.pyplot as plt

    figures = values(rows)
    passes = {row.arm: [float(row.passes)] for row in rows}
    present = [arm for arm in arms(recipe) if arm in figures]
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.6), layout="constrained")
    for ax, bits in zip(axes, (4, 3), strict=False):
        places = {arm: (Estimate.of(passes[arm]), _estimate(figures, arm, f"{bits}-bit loss")) for arm in present}
        _points(ax, places, recipe)
        ax.set(title=f"Matrices of {bits} bits", xlabel="forward-backward passes", ylabel="loss on text 1")
    for number, lr in enumerate(LRS):
        names = (f"text 2 at {lr}", f"forgets at {lr}")
        places = {arm: tuple(_estimate(figures, arm, name) for name in names) for arm in present}
        _points(axes[2], places, recipe, hollow=number > 0)
    axes[2].set(
        title=f"Fine-tuned at {LRS[0]}, and at {LRS[1]} (hollow)",
        xlabel="loss on text 2, learnt",
        ylabel="loss added on text 1, forgotten",
    )
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.margins(0.1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    seeds = len({row.seed for row in rows})
    figure.suptitle(f"{recipe.text1}, then {recipe.text2}: {seeds} seed{'s' if seeds > 1 else ''}")
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _estimate(figures: Values, arm: str, name: str) -> Estimate:
    return Estimate.of(of_seed[name] for of_seed in figures[arm].values())


def _points(ax: Any, places: dict[str, tuple[Estimate, Estimate]], recipe: Recipe, hollow: bool = False) -> None:
    """A point for each arm, and a line through what plain AdamW does with more passes."""
    frontier = [places[arm] for arm in FRONTIER if arm in places]
    ax.plot([x.mean for x, _ in frontier], [y.mean for _, y in frontier], color="#222222", linewidth=1, zorder=1)
    for arm, (x, y) in places.items():
        colour, marker = LOOKS[arm]
        ax.errorbar(
            x.mean,
            y.mean,
            0.0 if math.isnan(y.error) else y.error,
            0.0 if math.isnan(x.error) else x.error,
            color=colour,
            marker=marker,
            markerfacecolor="white" if hollow else colour,
            linestyle="",
            capsize=3,
            label=label(arms(recipe)[arm]),
        )
