"""How the language models are trained: the recipe, its arms, and stretches of steps that resume bit for bit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpt_model import GPT, fresh
from torch import Tensor
from training import DeferredInterrupt, Interrupted, save_whole

from fsam_ext import SAM, FriendlySAM

SAVE_EVERY = 1000  # steps


class OtherRecipe(ValueError):
    """A file was written under another recipe than the one asked for; the message says where they differ."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all arms and seeds share. Figures of two recipes do not belong into one table."""

    text1: str = "python3.11-doc"
    text2: str = "bible-kjv-text"
    vocabulary: int = 512
    layers: int = 4
    width: int = 32
    heads: int = 2
    context: int = 128
    batch: int = 8
    lr: float = 3e-3
    weight_decay: float = 0.1
    steps: int = 5000  # of the trunk; a fork has a fifth, two or four
    finetune: int = 300
    held_out: int = 256  # windows of each text
    rho: float = 0.1
    sigma: float = 1.0
    lmbda: float = 0.9
    every: int = 5
    reuse: float = 0.3

    def model(self, seed: int) -> GPT:
        return fresh(seed, self.vocabulary, self.layers, self.width, self.heads, self.context)

    def check_same(self, written: dict[str, Any], path: Path) -> None:
        """Raises ``OtherRecipe`` where ``path`` was ``written`` under another one."""
        for name, now in dataclasses.asdict(self).items():
            if written.get(name) != now:
                raise OtherRecipe(
                    f"{path} was made with --{name.replace('_', '-')} {written.get(name)}, and this command says "
                    f"{now}: name another --out, or give the options of that run"
                )


FINETUNE_LRS = (1e-4, 3e-4)
BETAS = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Steps at a constant learning rate, then steps in which it falls linearly to 0."""

    method: str  # adamw, sam, fsam
    constant: int
    decay: int
    lr: float
    rho: float = 0.0
    every: int = 1
    reuse: float = 0.0

    @property
    def steps(self) -> int:
        return self.constant + self.decay

    def lr_at(self, step: int) -> float:
        return self.lr * min(1.0, (self.steps - step) / self.decay) if self.decay else self.lr


def trunk(recipe: Recipe) -> Stretch:
    return Stretch("adamw", recipe.steps, 0, recipe.lr)


def arms(recipe: Recipe) -> dict[str, Stretch]:
    """How a trunk may be brought to its end."""
    fifth = recipe.steps // 5
    sharp = {"constant": 0, "decay": 2 * fifth, "lr": recipe.lr, "rho": recipe.rho}
    return {
        "short": Stretch("adamw", 0, fifth, recipe.lr),
        "middle": Stretch("adamw", 0, 2 * fifth, recipe.lr),
        "long": Stretch("adamw", 0, 4 * fifth, recipe.lr),
        "late": Stretch("adamw", 3 * fifth, fifth, recipe.lr),
        "sam": Stretch("sam", **sharp),
        "fsam": Stretch("fsam", **sharp),
        "every": Stretch("fsam", **sharp, every=recipe.every),
        "reuse": Stretch("fsam", **sharp, every=recipe.every, reuse=recipe.reuse),
    }


def label(arm: Stretch) -> str:
    """What an arm is called in tables."""
    if arm.method == "adamw" and arm.constant:
        return f"AdamW, {arm.constant:,} constant and {arm.decay:,}"
    if arm.method == "adamw":
        return f"AdamW, {arm.decay:,} steps of decay"
    name = f"{'SAM' if arm.method == 'sam' else 'F-SAM'} {arm.rho:g} in {arm.decay:,}"
    name += f", every {arm.every}" if arm.every != 1 else ""
    return name + (f", reuse {arm.reuse:g}" if arm.reuse else "")


def build_optimizer(stretch: Stretch, recipe: Recipe, model: GPT) -> torch.optim.Optimizer:
    """Bad values are the optimizer's to refuse, in its words."""
    params, base = list(model.parameters()), torch.optim.AdamW
    options: dict[str, Any] = {"lr": stretch.lr, "betas": BETAS, "weight_decay": recipe.weight_decay}
    if stretch.method == "adamw":
        return base(params, fused=True, **options)
    options |= {"rho": stretch.rho, "every": stretch.every}
    if stretch.method == "sam":
        return SAM(params, base, **options)
    return FriendlySAM(params, base, sigma=recipe.sigma, lmbda=recipe.lmbda, reuse=stretch.reuse, **options)


def batch(tokens: Tensor, recipe: Recipe, seed: int, step: int) -> Tensor:
    """The windows of a step, [batch, context + 1]: they depend on the seed and the step's number alone.

    So all arms of a seed see the same ones, and a resumed run needs no generator's state.
    """
    random = np.random.default_rng([seed, step])
    begins = torch.from_numpy(random.integers(len(tokens) - recipe.context, size=recipe.batch))
    return tokens[begins[:, None] + torch.arange(recipe.context + 1)]


class Training:
    """One stretch of one seed: ``load`` goes on, bit for bit, from what ``save`` wrote."""

    def __init__(self, stretch: Stretch, recipe: Recipe, seed: int, tokens: Tensor, first: int = 0) -> None:
        self.stretch, self.recipe, self.seed, self.tokens = stretch, recipe, seed, tokens
        self.first = first  # the number of its first step, which decides its batches
        self.model = recipe.model(seed)
        self.optimizer = build_optimizer(stretch, recipe, self.model)
        self.step = 0
        self.passes = 0

    def fork(self, end: dict[str, Any]) -> None:
        """Begins at the ``end`` of a trunk, with its weights and moments; options are the stretch's own."""
        self.model.load_state_dict(end["model"])
        groups = self.optimizer.state_dict()["param_groups"]
        moments = copy.deepcopy(end["optimizer"]["state"])  # AdamW would train the very tensors that it loads
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.passes = end["passes"]

    def save(self, path: Path) -> dict[str, Any]:
        """Writes the checkpoint and returns it."""
        state = {
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "passes": self.passes,
        }
        save_whole(state, path)
        return state

    def load(self, path: Path) -> None:
        """Raises ``OtherRecipe`` where it was written under another one."""
        state = torch.load(path, weights_only=True)
        self.recipe.check_same(state["recipe"], path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.passes = state["step"], state["passes"]

    def fit(self, path: Path, interrupt: DeferredInterrupt, after_step: Callable[[], Any]) -> dict[str, Any]:
        """Trains to the end, which it returns; ``Interrupted`` once Ctrl-C has come."""
        while self.step < self.stretch.steps:
            self.train_step()
            after_step()
            if interrupt.requested:
                self.save(path)
                raise Interrupted(str(path))
            if self.step % SAVE_EVERY == 0:
                self.save(path)
        return self.save(path)

    def train_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.stretch.lr_at(self.step)
        windows = batch(self.tokens, self.recipe, self.seed, self.first + self.step)

        def closure() -> Tensor:
            self.passes += 1
            self.optimizer.zero_grad()
            loss = self.model.loss(windows)
            loss.backward()
            return loss

        self.optimizer.step(closure)
        self.step += 1
