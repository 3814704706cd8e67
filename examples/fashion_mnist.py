"""SGD, SAM and Friendly SAM on Fashion-MNIST with noisy labels: the whole road, on real data.

    python examples/fashion_mnist.py               every method, one seed
    python examples/fashion_mnist.py --seeds 5     the table, with standard errors
    python examples/fashion_mnist.py --method fsam --rho 0.1 0.2 --base adamw
    python examples/fashion_mnist.py --method fsam --every 2 5 --reuse 5:0.3 --last 0.3 --average int8
    python examples/fashion_mnist.py --arch cnn --noise 0.2
    python examples/fashion_mnist.py --resume      after Ctrl-C

This file is the command line and the order of things; data.py, models.py, settings.py, training.py, sharpness.py,
report.py and pictures.py do the work. docs/demo.md shows the results and says what they mean.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that spin while they wait, its default, make a busy machine ten times slower.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"

import data
import pictures
import report
import torch
from models import ARCHITECTURES
from settings import Setting, settings
from tqdm import tqdm
from training import (
    AVERAGES,
    BASES,
    METHODS,
    DeferredInterrupt,
    Interrupted,
    OtherSettings,
    Result,
    Run,
    Trainer,
    build_optimizer,
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0],
        epilog="Ctrl-C leaves a checkpoint. Under --resume an option left out has the value of the "
        "run that is resumed. The data is kept in the folder FSAM_DATA, by default "
        "~/.cache/fsam_ext.",
        usage="%(prog)s [options]",
    )
    add_task(parser.add_argument_group("the task"))
    add_runs(parser.add_argument_group("what to run: every method, and SAM and F-SAM at every rho"))
    add_changes(parser.add_argument_group("runs more, each with one thing changed; an option without a value: none"))
    how = parser.add_argument_group("where and how")
    how.add_argument("--seeds", type=_positive, default=1, help="number of seeds (default: 1)")
    how.add_argument("--backend", help="backend of fsam_ext for sam and fsam (default: the best for the device)")
    how.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    how.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        help="folder for the results (default: runs/demo)",
    )
    how.add_argument("--resume", action="store_true", help="continue the run in --out")
    return parser


def add_task(group: Any) -> None:
    """What is learnt, and by which net."""
    group.add_argument(
        "--arch",
        choices=tuple(ARCHITECTURES),
        default="mlp",
        metavar="NAME",
        help="mlp; cnn: a small convolutional net with BatchNorm (default: mlp)",
    )
    group.add_argument(
        "--noise",
        type=_fraction,
        default=0.4,
        help="fraction of the training labels made wrong (default: 0.4)",
    )
    epochs = ", ".join(f"{net.epochs} for {name}" for name, net in ARCHITECTURES.items())
    group.add_argument("--epochs", type=_positive, help=f"(default: {epochs})")
    group.add_argument(
        "--dataset",
        choices=("auto", "fashion-mnist", "digits"),
        default="auto",
        metavar="NAME",
        help="fashion-mnist; digits; auto: Fashion-MNIST, or where it cannot be had the digits of "
        "scikit-learn (default: auto)",
    )


def add_runs(group: Any) -> None:
    """The methods and their settings."""
    group.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help="base: the base optimizer alone; tuned: SGD with an lr and weight decay that suit it "
        "alone; sam; fsam (default: all four)",
    )
    group.add_argument(
        "--rho",
        nargs="+",
        type=float,
        help="radius of the perturbation, of sam and fsam (default: each one's own for the net and the noise)",
    )
    group.add_argument(
        "--sigma",
        type=float,
        default=1.0,
        help="F-SAM: share of the gradients' EMA taken off the gradient (default: 1)",
    )
    group.add_argument("--lmbda", type=float, default=0.9, help="F-SAM: decay of the EMA (default: 0.9)")
    group.add_argument("--base", choices=list(BASES), default="sgd", help="base optimizer (default: sgd)")
    group.add_argument(
        "--lr",
        type=float,
        help="learning rate of all but tuned (default: 0.05 for base, 0.001 where it is not sgd; sam's and fsam's own)",
    )
    group.add_argument("--weight-decay", type=float, help="likewise (default: 5e-4, adamw 5e-2; sam's and fsam's own)")
    group.add_argument(
        "--tuned",
        nargs=2,
        type=float,
        metavar=("LR", "DECAY"),
        help="learning rate and weight decay of tuned (default: what a search found for the net and the noise)",
    )


def add_changes(group: Any) -> None:
    """What is changed in F-SAM, or for ``--longer`` in what has one pass a step."""
    group.add_argument(
        "--every",
        nargs="*",
        type=_positive,
        default=[2, 5],
        metavar="STEPS",
        help="F-SAM that ascends in each STEPSth step only (default: 2 5)",
    )
    group.add_argument(
        "--reuse",
        nargs="*",
        type=_reuse,
        default=[(2, 0.4), (5, 0.3), (10, 0.3)],
        metavar="STEPS:SHARE",
        help="the same, with SHARE of the second gradient reused in between (default: 2:0.4 5:0.3 10:0.3)",
    )
    group.add_argument(
        "--longer",
        nargs="*",
        type=_positive,
        default=[2],
        metavar="TIMES",
        help="base and tuned with TIMES as many epochs; 2 have the passes of SAM (default: 2)",
    )
    group.add_argument(
        "--last",
        nargs="*",
        type=_fraction,
        default=[],
        metavar="FRACTION",
        help="F-SAM that ascends in the last FRACTION of the training only",
    )
    group.add_argument(
        "--average",
        nargs="*",
        choices=AVERAGES,
        default=[],
        metavar="DTYPE",
        help=f"F-SAM whose average is stored as DTYPE, of {', '.join(AVERAGES)}",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number in [0, 1]") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def _reuse(text: str) -> tuple[int, float]:
    steps, _, share = text.partition(":")
    try:
        return _positive(steps), float(share)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text} is not STEPS:SHARE, as in 5:0.3") from None


def parse(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The options; under --resume those of the run in --out, wherever the command gives none."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.resume:
        saved = options.out / "options.json"
        try:
            parser.set_defaults(**json.loads(saved.read_text()))
        except FileNotFoundError:
            parser.error(f"--resume: there is no run in {options.out} (no {saved})")
        except ValueError:
            parser.error(f"--resume: {saved} is not what this demo writes: leave out --resume to start afresh")
        options = parser.parse_args(argv)
    return parser, options


def one_pass(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is set in the runs without ascents: the base optimizer, SGD that is tuned, and both with more epochs."""
    chosen = settings(options.base, options.arch, options.noise)
    base, tuned = given(options, chosen["base"]), chosen["tuned"][:2]
    tuned = tuple(options.tuned) if options.tuned else tuned
    pairs = {"base": base[:2]} if "base" in options.method else {}
    if "tuned" in options.method and options.base == "sgd" and tuned not in pairs.values():
        pairs["tuned"] = tuned
    variants = [{"method": method, "lr": lr, "weight_decay": decay} for method, (lr, decay) in pairs.items()]
    return variants + [{**variant, "longer": times} for times in options.longer for variant in variants]


def ascending(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What is set in the runs of SAM and F-SAM, rho by rho."""
    chosen = settings(options.base, options.arch, options.noise)
    variants: list[dict[str, Any]] = []
    rhos = dict.fromkeys(options.rho) if options.rho else [None]
    for rho, method in product(rhos, [method for method in ("sam", "fsam") if method in options.method]):
        lr, weight_decay, own_rho = given(options, chosen[method])
        plain = {"method": method, "lr": lr, "weight_decay": weight_decay, "backend": options.backend}
        plain["rho"] = own_rho if rho is None else rho
        changes: list[dict[str, Any]] = [{}]
        if method == "fsam":
            plain |= {"sigma": options.sigma, "lmbda": options.lmbda}
            changes += [{name: value} for name in ("every", "last", "average") for value in getattr(options, name)]
            changes += [{"every": steps, "reuse": share} for steps, share in options.reuse]
        variants += [{**plain, **change} for change in changes]
    return variants


def given(options: argparse.Namespace, setting: Setting) -> Setting:
    """The setting, but where the command says otherwise."""
    lr = setting.lr if options.lr is None else options.lr
    weight_decay = setting.weight_decay if options.weight_decay is None else options.weight_decay
    return setting._replace(lr=lr, weight_decay=weight_decay)


def plan(options: argparse.Namespace, dataset: str) -> list[Run]:
    """Every run asked for, seed by seed, so that an unfinished table is a table of fewer seeds."""
    epochs = options.epochs or ARCHITECTURES[options.arch].epochs
    runs = [
        Run(
            dataset=dataset,
            seed=seed,
            arch=options.arch,
            base=options.base,
            epochs=epochs,
            noise=options.noise,
            device=options.device,
            **variant,
        )
        for seed in range(options.seeds)
        for variant in one_pass(options) + ascending(options)
    ]
    return list(dict.fromkeys(runs))  # --every 1 asks for the plain run again


def check(runs: list[Run], parser: argparse.ArgumentParser) -> None:
    """Lets each optimizer refuse its options now, before minutes of training, in one sentence."""
    if not runs:
        parser.error("--method tuned is for --base sgd only: nothing is left to run")
    for run in runs:
        try:
            build_optimizer(run, list(ARCHITECTURES[run.arch].build(1).to(run.device).parameters()), steps=1)
        except (ValueError, TypeError, RuntimeError, AssertionError) as error:
            parser.error(f"{run.label}: {error}")


def train(run: Run, dataset: data.Dataset, checkpoint: Path, resume: bool, interrupt: DeferredInterrupt) -> Result:
    """One run with its progress bar; with ``resume`` from its checkpoint, where there is one."""
    trainer = Trainer(run, dataset)
    if resume and checkpoint.exists():
        trainer.load(checkpoint)
    per_epoch = trainer.steps_per_epoch
    with tqdm(
        total=trainer.epochs * per_epoch,
        initial=trainer.epoch * per_epoch + trainer.step,
        desc=f"{run.label} seed {run.seed}",
        unit="step",
        leave=False,
        disable=None,  # where the output is not a terminal
    ) as bar:
        return trainer.fit(checkpoint, interrupt, after_step=bar.update)


def start_afresh(options: argparse.Namespace, checkpoints: Path) -> None:
    """Notes the options for a later --resume, and moves an earlier run's checkpoints aside."""
    if checkpoints.exists():
        aside = checkpoints.with_name("checkpoints.previous")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoints.rename(aside)
        print(f"starting afresh: the checkpoints of the run before are now in {aside}")
    options.out.mkdir(parents=True, exist_ok=True)
    kept = {k: v for k, v in vars(options).items() if k not in ("out", "resume")}
    (options.out / "options.json").write_text(json.dumps(kept, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser, options = parse(argv)
    check(plan(options, "?"), parser)
    try:
        dataset = data.load(options.dataset)
    except data.Unavailable as reason:
        parser.exit(1, f"{options.dataset} cannot be had here:\n  {reason}\n")
    runs = plan(options, dataset.name)
    checkpoints = options.out / "checkpoints"
    if not options.resume:
        start_afresh(options, checkpoints)

    finished: report.Finished = []
    with DeferredInterrupt() as interrupt:
        bar = tqdm(runs, desc="runs", unit="run", disable=None)
        for run in bar:
            checkpoint = checkpoints / run.file_name
            try:
                result = train(run, dataset, checkpoint, options.resume, interrupt)
            except Interrupted:
                bar.close()
                command = [sys.executable, sys.argv[0], "--resume", "--out", str(options.out)]
                print(f"\ninterrupted; {checkpoint} is written. Continue with:")
                print(f"  {shlex.join(command)}")
                return 130
            except OtherSettings as error:
                bar.close()
                parser.error(str(error))
            finished.append((run, result))
            files = report.write_csv(finished, options.out)
            tqdm.write(
                f"{run.label:14} seed {run.seed}  test accuracy {result.test_accuracy:7.2%}  "
                f"top eigenvalue {result.top_eigenvalue:8.2f}  {result.seconds:5.1f} s"
            )
    picture = options.out / "results.png"
    where = options.device if options.device != "cpu" else f"cpu, {torch.get_num_threads()} threads"
    pictures.draw(finished, picture)
    task = f"{dataset.name}, {options.arch}, {runs[0].epochs} epochs, {pictures.noise_of(finished)}"
    print(f"\n{task}, torch {torch.__version__}, {where}\n")
    print(report.table(finished))
    print("\n" + "\n".join(f"wrote {path}" for path in [*files, picture, checkpoints]))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # outside the training, or the second one inside it
        sys.exit("interrupted")
