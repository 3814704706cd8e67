"""How far averages of fewer bits turn F-SAM's perturbation away from that of a float32 average, in a real run.

    python examples/averages.py --seeds 3

The demo's run at rho 0.2 goes on with a float32 average. Beside it, at each step, optimizers with other averages see
the same weights and gradients; the figures are the cosines of their perturbations with that of the float32 one.
"""

from __future__ import annotations

import argparse
import math

import data
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from tqdm import tqdm
from training import AVERAGES, Run, Trainer

from fsam_ext import FriendlySAM


class Shadow:
    """What an optimizer whose average has some dtype would do with a model's weights, step after step."""

    def __init__(self, params: list[Tensor], rho: float, lmbda: float, average: str) -> None:
        self.copies = [param.detach().clone().requires_grad_() for param in params]
        self.optimizer = FriendlySAM(self.copies, rho=rho, lmbda=lmbda, lr=0.0, ema_dtype=AVERAGES[average])

    @torch.no_grad()
    def perturbation(self, params: list[Tensor]) -> Tensor:
        """The perturbation of ``params`` with the gradients that they have, in one float64 vector."""
        torch._foreach_copy_(self.copies, params)
        for copy, param in zip(self.copies, params, strict=True):
            copy.grad = param.grad.clone()
        self.optimizer.first_step()
        moved = [(copy.double() - param.double()).flatten() for copy, param in zip(self.copies, params, strict=True)]
        self.optimizer.restore()
        return torch.cat(moved)


def cosines(run: Run, dataset: data.Dataset) -> dict[str, list[float]]:
    """For each average of fewer bits, the cosine with float32's perturbation in each step of a run."""
    trainer = Trainer(run, dataset)
    params = list(trainer.model.parameters())
    shadows = {average: Shadow(params, run.rho, run.lmbda, average) for average in AVERAGES}
    found: dict[str, list[float]] = {average: [] for average in AVERAGES if average != "float32"}
    for _ in tqdm(range(run.epochs * trainer.steps_per_epoch), desc=f"seed {run.seed}", unit="step", disable=None):
        images, labels = trainer.batch()
        trainer.optimizer.zero_grad()
        cross_entropy(trainer.model(images), labels).backward()
        moved = {average: shadow.perturbation(params) for average, shadow in shadows.items()}
        for average, values in found.items():
            values.append(float(cosine_similarity(moved[average], moved["float32"], dim=0)))
        trainer.train_step()
        if trainer.step == trainer.steps_per_epoch:
            trainer.end_epoch()
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: 1)")
    parser.add_argument("--epochs", type=int, default=5, help="of 79 steps with Fashion-MNIST (default: 5)")
    parser.add_argument("--lmbda", type=float, nargs="+", default=[0.9, 0.99], help="decay (default: 0.9 0.99)")
    parser.add_argument("--dataset", choices=("auto", "fashion-mnist", "digits"), default="auto", metavar="NAME")
    options = parser.parse_args(argv)
    dataset = data.load(options.dataset)
    print(f"{'':14}{'average':>10}{'steps':>8}{'mean cosine':>13}{'smallest':>10}")
    for lmbda in options.lmbda:
        found: dict[str, list[float]] = {}
        for seed in range(options.seeds):
            run = Run(dataset.name, "fsam", seed, "sgd", 0.05, 5e-4, options.epochs, 0.4, 0.2, 1.0, lmbda)
            for average, values in cosines(run, dataset).items():
                found.setdefault(average, []).extend(values)
        for average, values in found.items():
            mean = math.fsum(values) / len(values)
            print(f"{f'lmbda {lmbda:g}':14}{average:>10}{len(values):8}{mean:13.6f}{min(values):10.6f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
