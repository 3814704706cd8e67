"""What the language models leave for a reader: tables in Markdown, paired differences, and where to put them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from gpt_measure import forgetting, forgetting_at
from gpt_results import Row
from gpt_training import FINETUNE_LRS, Recipe, arms, label
from report import Estimate

BEGIN, END = "<!-- make demo-gpt: begin -->", "<!-- make demo-gpt: end -->"
LRS = tuple(f"{lr:.0e}".replace("e-0", "e-") for lr in FINETUNE_LRS)
QUANTIZATION = ("loss", "4 bits add", "3 bits add", "4-bit loss", "3-bit loss")
FORGETTING = tuple(f"{name} {lr}" for lr in LRS for name in ("forgets at", "text 2 at", "matched at"))
READING = (
    "Loss is that of what is held out of text 1. An arm forgets what fine-tuning on text 2 adds to it, at either "
    "learning rate; matched, what it had forgotten when its loss on text 2 came down to the one that the worst arm of "
    "the seed ends with."
)

# What is told from what.
PAIRS = (
    *((sharp, plain) for plain in ("middle", "short") for sharp in ("sam", "fsam", "every", "reuse")),
    *((sharp, plain) for plain in ("long", "late") for sharp in ("sam", "fsam")),
    ("fsam", "sam"),
    ("every", "fsam"),
    ("reuse", "fsam"),
    ("reuse", "every"),
)

Values = dict[str, dict[int, dict[str, float]]]  # arm -> seed -> figure -> value


def values(rows: Iterable[Row]) -> Values:
    """Every figure of the tables."""
    rows = list(rows)
    found: Values = {}
    for row in rows:
        figures = {"loss": row.loss, "4-bit loss": row.loss4, "3-bit loss": row.loss3}
        figures |= {"4 bits add": row.loss4 - row.loss, "3 bits add": row.loss3 - row.loss}
        for number, (lr, curve) in enumerate(zip(LRS, row.finetune, strict=True)):
            reached_by_all = max(other.finetune[number][-1].loss2 for other in rows if other.seed == row.seed)
            figures[f"forgets at {lr}"] = forgetting(curve)
            figures[f"text 2 at {lr}"] = curve[-1].loss2
            figures[f"matched at {lr}"] = forgetting_at(curve, reached_by_all)
        found.setdefault(row.arm, {})[row.seed] = figures
    return found


def report(rows: list[Row], recipe: Recipe) -> str:
    """All tables, with what their figures are."""
    figures = values(rows)
    seeds = len({row.seed for row in rows})
    told = "mean ± standard error" if seeds > 1 else "so no standard errors: --seeds 5 gives them"
    parts = [
        f"{seeds} seed{'s' if seeds > 1 else ''}, {told}; nats a token. {READING}",
        arm_table(figures, rows, recipe, QUANTIZATION),
        arm_table(figures, rows, recipe, FORGETTING),
        "Differences, paired by seed:",
        difference_table(figures, rows, recipe, QUANTIZATION),
        difference_table(figures, rows, recipe, FORGETTING),
    ]
    return "\n\n".join(part for part in parts if part)


def arm_table(figures: Values, rows: list[Row], recipe: Recipe, columns: tuple[str, ...]) -> str:
    passes = {row.arm: row.passes for row in rows}
    lines = [["arm", "passes", *columns]]
    for arm, stretch in arms(recipe).items():
        if arm in figures:
            cells = (cell((of_seed[c] for of_seed in figures[arm].values()), ".3f") for c in columns)
            lines.append([label(stretch), f"{passes[arm]:,}", *cells])
    return markdown(lines)


def difference_table(figures: Values, rows: list[Row], recipe: Recipe, columns: tuple[str, ...]) -> str:
    """Empty where no two arms that are compared have a seed in common."""
    known, passes = arms(recipe), {row.arm: row.passes for row in rows}
    lines = [["", "passes", *columns]]
    for arm, other in PAIRS:
        both = sorted(figures.get(arm, {}).keys() & figures.get(other, {}).keys())
        if both:
            names, spent = (label(known[a]) for a in (arm, other)), (f"{passes[a]:,}" for a in (arm, other))
            cells = (cell((figures[arm][s][c] - figures[other][s][c] for s in both), "+.3f") for c in columns)
            lines.append([" - ".join(names), " - ".join(spent), *cells])
    return markdown(lines) if len(lines) > 1 else ""


def cell(of_seeds: Iterable[float], form: str) -> str:
    """Mean and standard error; a dash where a seed has no figure."""
    values = list(of_seeds)
    return "-" if any(map(math.isnan, values)) else Estimate.of(values).text(form)


def markdown(lines: list[list[str]]) -> str:
    """The first of ``lines`` is the head; all columns but the first are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in (lines[0], rule, *lines[1:])
    )


def has_place(path: Path) -> bool:
    """Whether ``path`` is a document with the markers that tables are put between."""
    try:
        _, begin, rest = path.read_text().partition(BEGIN)
    except OSError:
        return False
    return bool(begin) and END in rest


def put_into(path: Path, text: str) -> None:
    """Replaces what is between the markers of a document that has them."""
    before, _, rest = path.read_text().partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
