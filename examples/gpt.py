"""Does F-SAM at the end of pre-training lessen forgetting, and the damage of rounding to 4 bits? Small GPTs tell.

    python examples/gpt.py                     every arm, one seed
    python examples/gpt.py --seeds 5           the tables, with standard errors
    python examples/gpt.py --arms short fsam reuse --rho 0.05 --out runs/gpt-005

A command that was interrupted goes on where it was when it is given again, and --seeds adds seeds to those that are
there. This file is the command line and the order of things; the other files gpt_*.py do the work. docs/gpt.md shows
the results and says what they mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that spin while they wait, its default, make a busy machine ten times slower.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"

import gpt_picture
import gpt_report
import gpt_texts
from data import Unavailable
from gpt_measure import measure
from gpt_model import parameters
from gpt_results import Results, Row
from gpt_tokens import Text, tokenized
from gpt_training import FINETUNE_LRS, OtherRecipe, Recipe, Stretch, Training, arms, build_optimizer, label, trunk
from tqdm import tqdm
from training import DeferredInterrupt, Interrupted

Texts = tuple[Text, Text]
ARMS = tuple(arms(Recipe()))
MOST_TOKENS = 4096  # with more, counting pairs in a square table would take minutes
RECIPE_HELP = {
    "vocabulary": "tokens: bytes, and byte pairs learnt on text 1",
    "layers": "of the model",
    "width": "of the model",
    "heads": "of attention",
    "context": "tokens in a window",
    "batch": "windows in a step",
    "lr": "learning rate of pre-training",
    "weight_decay": "of AdamW",
    "steps": "of the trunk; what forks from it has a fifth of them, two or four",
    "finetune": "steps of fine-tuning on text 2",
    "held_out": "windows of each text that losses are measured on",
    "rho": "radius of SAM's and F-SAM's perturbation",
    "sigma": "F-SAM: share of the gradients' EMA taken off the gradient",
    "lmbda": "F-SAM: decay of the EMA",
    "every": "steps from ascent to ascent, in the arms every and reuse",
    "reuse": "share of the second gradient that the arm reuse takes in between",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog="Ctrl-C leaves a checkpoint, and the same command goes on from it. Texts are kept in the folder "
        "FSAM_DATA, by default ~/.cache/fsam_ext.",
        usage="%(prog)s [options]",
    )
    parser.add_argument("--seeds", type=_positive, default=1, help="number of seeds (default: 1)")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=list(ARMS),
        metavar="NAME",
        help=f"how the trunk is brought to its end, of {', '.join(ARMS)} (default: all)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpt"), help="folder for the results (default: runs/gpt)")
    parser.add_argument(
        "--docs", type=Path, help="a document to put the tables into, with the picture beside it (.svg)"
    )
    recipe = parser.add_argument_group("the recipe")
    recipe.add_argument("--text1", type=Path, metavar="FILE", help="pre-training (default: Debian's python3.11-doc)")
    recipe.add_argument("--text2", type=Path, metavar="FILE", help="fine-tuning (default: Debian's bible-kjv-text)")
    for field in dataclasses.fields(Recipe):
        if field.name in RECIPE_HELP:
            recipe.add_argument(
                "--" + field.name.replace("_", "-"),
                type=_positive if isinstance(field.default, int) else float,
                default=field.default,
                help=f"{RECIPE_HELP[field.name]} (default: {field.default:g})",
            )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def recipe_of(options: argparse.Namespace, texts: tuple[bytes, bytes]) -> Recipe:
    """The options as a recipe; a user's own text is known by its content."""
    names = {}
    for name, text in zip(("text1", "text2"), texts, strict=True):
        own: Path | None = getattr(options, name)
        names[name] = getattr(Recipe, name) if own is None else f"{own.name} {hashlib.sha256(text).hexdigest()[:8]}"
    return Recipe(**names, **{name: getattr(options, name) for name in RECIPE_HELP})


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuses now, in one sentence, what would fail after minutes."""
    if options.width % options.heads:
        parser.error(f"--width {options.width} cannot be shared by --heads {options.heads}: give a multiple")
    if not 256 <= options.vocabulary <= MOST_TOKENS:
        parser.error(f"--vocabulary {options.vocabulary}: give 256, for the bytes, to {MOST_TOKENS}")
    if options.steps < 5:
        parser.error(f"--steps {options.steps}: a fork has a fifth of them, so it takes 5 or more")
    if options.docs and not gpt_report.has_place(options.docs):
        parser.error(
            f"--docs {options.docs}: not a document with the lines {gpt_report.BEGIN} and {gpt_report.END}, "
            "which tables are put between"
        )
    recipe = recipe_of(options, (b"", b""))
    for arm in options.arms:
        try:
            build_optimizer(arms(recipe)[arm], recipe, dataclasses.replace(recipe, layers=1).model(0))
        except (ValueError, TypeError) as error:
            parser.error(f"{label(arms(recipe)[arm])}: {error}")


def load_texts(options: argparse.Namespace) -> tuple[Recipe, Texts]:
    """Raises ``Unavailable`` where a text is missing, or too short."""
    packages = {"text1": gpt_texts.PYTHON_DOCS, "text2": gpt_texts.KING_JAMES}
    raw = tuple(gpt_texts.load(package, getattr(options, name)) for name, package in packages.items())
    recipe = recipe_of(options, raw)
    tokens = _named(recipe.text1, lambda: tokenized(raw, recipe.vocabulary))
    names = (recipe.text1, recipe.text2)
    return recipe, tuple(
        _named(name, partial(Text.of, of_text, recipe.context, recipe.held_out))
        for name, of_text in zip(names, tokens, strict=True)
    )


def _named(name: str, make: Callable[[], Any]) -> Any:
    """What ``make`` makes; ``Unavailable`` says of which text it speaks."""
    try:
        return make()
    except Unavailable as reason:
        raise Unavailable(f"the text {name} cannot be used: {reason}") from None


def passes_of(stretch: Stretch) -> int:
    """Forward-backward passes of a stretch, for the progress bar; results have those that were counted."""
    return stretch.steps + (0 if stretch.method == "adamw" else -(-stretch.steps // stretch.every))


class Seed:
    """One seed: its trunk, made once, and the arms that fork from it."""

    def __init__(self, number: int, recipe: Recipe, texts: Texts, folder: Path, interrupt: DeferredInterrupt) -> None:
        self.number, self.recipe, self.texts, self.folder, self.interrupt = number, recipe, texts, folder, interrupt
        self._end: dict | None = None

    def run(self, arm: str, bar: tqdm) -> Row:
        """Trains and measures an arm. Raises ``Interrupted``, with a checkpoint written."""
        if self._end is None:
            self._end = self._fit("trunk", self._training(trunk(self.recipe), first=0), bar)
        stretch = arms(self.recipe)[arm]
        training = self._training(stretch, first=self.recipe.steps)
        training.fork(self._end)
        self._fit(arm, training, bar)
        bar.set_description(f"seed {self.number}, {label(stretch)}: fine-tuning")
        figures = measure(training.model, self.recipe, self.number, self.texts, self.interrupt, bar.update)
        return Row(arm, self.number, training.passes, **figures)

    def _training(self, stretch: Stretch, first: int) -> Training:
        return Training(stretch, self.recipe, self.number, self.texts[0].train, first)

    def _fit(self, name: str, training: Training, bar: tqdm) -> dict:
        checkpoint = self.folder / f"{name}-seed{self.number}.pt"
        bar.set_description(f"seed {self.number}, {'trunk' if name == 'trunk' else label(training.stretch)}")
        before = training.passes
        if checkpoint.exists():
            training.load(checkpoint)
            bar.update(training.passes - before)
        seen = training.passes

        def after_step() -> None:
            nonlocal seen
            bar.update(training.passes - seen)
            seen = training.passes

        return training.fit(checkpoint, self.interrupt, after_step)


def train(options: argparse.Namespace, results: Results, texts: Texts) -> None:
    """Every arm that is not there yet, seed by seed, so that an unfinished table is a table of fewer seeds."""
    recipe = results.recipe
    plan = {seed: [a for a in options.arms if not results.has(a, seed)] for seed in range(options.seeds)}
    tuning = len(FINETUNE_LRS) * recipe.finetune
    passes = sum(passes_of(arms(recipe)[arm]) + tuning for todo in plan.values() for arm in todo)
    passes += sum(recipe.steps for todo in plan.values() if todo)
    with DeferredInterrupt() as interrupt, tqdm(total=passes, unit="pass", disable=None, smoothing=0.02) as bar:
        for number, todo in plan.items():
            seed = Seed(number, recipe, texts, options.out / "checkpoints", interrupt)
            for arm in todo:
                row = seed.run(arm, bar)
                results.add(row)
                tqdm.write(
                    f"seed {number}  {label(arms(recipe)[arm]):42} {row.passes:6,} passes  "
                    f"loss {row.loss:.3f}  4 bits {row.loss4:.3f}  3 bits {row.loss3:.3f}"
                )


def write(options: argparse.Namespace, results: Results) -> list[Path]:
    """Tables on the screen and in the document, and the picture: of all seeds and arms that are there."""
    text = gpt_report.report(results.rows, results.recipe)
    print(f"\n{text}\n")
    picture = options.out / "results.png"
    gpt_picture.draw(results.rows, results.recipe, picture)
    written = [results.path, picture]
    if options.docs:
        gpt_report.put_into(options.docs, text)
        gpt_picture.draw(results.rows, results.recipe, options.docs.with_suffix(".svg"))
        written += [options.docs, options.docs.with_suffix(".svg")]
    return written


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    check(options, parser)
    try:
        recipe, texts = load_texts(options)
    except Unavailable as reason:
        parser.exit(1, f"{reason}\n")
    try:
        results = Results(options.out, recipe)
        print(f"{recipe.text1}, {len(texts[0].train):,} tokens; {parameters(recipe.model(0)):,} parameters")
        train(options, results, texts)
        written = write(options, results)
    except Interrupted:
        print("\ninterrupted; the same command goes on from here")
        return 130
    except OtherRecipe as error:
        parser.error(str(error))
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        parser.error(f"--out {options.out}: no folder that can be written ({error.strerror}): name another")
    print("\n".join(f"wrote {path}" for path in written))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # outside the training, or the second one inside it
        sys.exit("interrupted")
