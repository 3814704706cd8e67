"""Which learning rate, weight decay and rho each method likes best: the small search behind the demo's settings.

    python examples/search.py --arch cnn --noise 0.2
    python examples/search.py --arch cnn --noise 0.2 --method fsam --rho 0.4

Every method gets the same learning rates and weight decays, SAM and F-SAM the same rhos. One seed that no table uses;
judged by the accuracy after the last epoch on training images that are not trained on, with their true labels.
"""

from __future__ import annotations

import argparse
from itertools import product

import data
from fashion_mnist import add_task, check
from models import ARCHITECTURES
from tqdm import tqdm
from training import TRAIN_SIZE, Run, Trainer

SEED = 100
LEARNING_RATES = (0.01, 0.05)
WEIGHT_DECAYS = (5e-4, 5e-3, 2e-2)
RHOS = (0.1, 0.2)


def plan(options: argparse.Namespace, dataset: str) -> list[Run]:
    """The search, method by method."""
    epochs = options.epochs or ARCHITECTURES[options.arch].epochs
    runs = []
    for method in options.method:
        fsam = {"sigma": 1.0, "lmbda": 0.9} if method == "fsam" else {}
        rhos = (None,) if method == "base" else options.rho
        runs += [
            Run(dataset, method, SEED, "sgd", lr, weight_decay, epochs, options.noise, rho, arch=options.arch, **fsam)
            for rho, lr, weight_decay in product(rhos, options.lr, options.weight_decay)
        ]
    return runs


def final_accuracy(run: Run, dataset: data.Dataset) -> float:
    """Test accuracy after the last epoch."""
    trainer = Trainer(run, dataset)
    while trainer.epoch < trainer.epochs:
        trainer.model.train()
        while trainer.step < trainer.steps_per_epoch:
            trainer.train_step()
        trainer.end_epoch()
    return trainer.curve[-1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    add_task(parser)
    methods = ("base", "sam", "fsam")
    parser.add_argument("--method", nargs="+", choices=methods, default=methods, metavar="NAME", help="(default: all)")
    for name, values in (("--lr", LEARNING_RATES), ("--weight-decay", WEIGHT_DECAYS), ("--rho", RHOS)):
        default = " ".join(f"{value:g}" for value in values)
        parser.add_argument(name, nargs="+", type=float, default=values, help=f"(default: {default})")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    options = parser.parse_args(argv)
    check(plan(options, "?"), parser)
    try:
        found = data.load(options.dataset)
        dataset = found._replace(test=data.held_out(found.train, TRAIN_SIZE, SEED))
    except data.Unavailable as reason:
        parser.exit(1, f"{options.dataset} cannot be searched with:\n  {reason}\n")
    best: dict[str, tuple[float, Run]] = {}
    print(f"{'':8}{'rho':>6}{'lr':>8}{'weight decay':>14}{'accuracy %':>12}")
    for run in tqdm(plan(options, found.name), unit="run", disable=None):
        accuracy = final_accuracy(run, dataset)
        rho = "" if run.rho is None else f"{run.rho:g}"
        tqdm.write(f"{run.method:8}{rho:>6}{run.lr:8g}{run.weight_decay:14g}{100 * accuracy:12.2f}")
        best[run.method] = max(best.get(run.method, (0.0, run)), (accuracy, run), key=lambda pair: pair[0])
    for method, (accuracy, run) in best.items():
        rho = "" if run.rho is None else f" rho {run.rho:g}"
        print(f"best for {method}:{rho} lr {run.lr:g} weight decay {run.weight_decay:g} ({100 * accuracy:.2f} %)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
