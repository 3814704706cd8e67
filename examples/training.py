"""One training run of the demo: settings, model, loop, and checkpoints that resume bit for bit."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from data import Dataset, Split, noisy_subset
from models import ARCHITECTURES
from sharpness import top_hessian_eigenvalue
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fsam_ext import SAM, FriendlySAM, freeze_stats

BASES = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
AVERAGES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
METHODS = ("base", "tuned", "sam", "fsam")
TRAIN_SIZE = 10_000
EIGENVALUE_SIZE = 2_000  # of them, for the Hessian: with all of them it would take longer than the training
BATCH_SIZE = 128
MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings that decide a run's result; a checkpoint resumes under the same ones only."""

    dataset: str
    method: str  # of METHODS
    seed: int
    base: str  # of BASES
    lr: float
    weight_decay: float
    epochs: int  # of which a run with ``longer`` has several times as many
    noise: float  # fraction of the training labels that are wrong
    rho: float | None = None  # sam and fsam only
    sigma: float | None = None  # fsam only
    lmbda: float | None = None  # fsam only
    every: int = 1  # steps from ascent to ascent
    last: float = 1.0  # fraction of the training, at its end, in which there are ascents
    average: str = "float32"  # of AVERAGES: what stores the average of the gradients
    backend: str | None = None
    device: str = "cpu"
    reuse: float | None = None  # fsam only: share of an ascent's second gradient in the steps until the next one
    longer: int = 1  # times as many epochs
    arch: str = "mlp"  # of models.ARCHITECTURES

    @property
    def label(self) -> str:
        """What the run is called in tables and pictures; the same for every seed."""
        base = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}[self.base]
        names = {"base": base, "tuned": f"{base} tuned", "sam": "SAM", "fsam": "F-SAM"}
        label = names[self.method] + (f" rho {self.rho:g}" if self.rho is not None else "")
        return f"{label}, {self.change}" if self.change else label

    @property
    def change(self) -> str:
        """What sets the run apart from the plain one of its method and rho; empty for that one."""
        changes = [f"every {self.every}"] if self.every != 1 else []
        changes += [f"reuse {self.reuse:g}"] if self.reuse is not None else []
        changes += [f"last {self.last:.0%}"] if self.last != 1 else []
        changes += [f"{self.average} average"] if self.average != "float32" else []
        changes += [f"{self.longer} x epochs"] if self.longer != 1 else []
        return ", ".join(changes)

    @property
    def file_name(self) -> str:
        rho = "" if self.rho is None else f"-rho{self.rho:g}"
        change = "".join(f"-{word}" for word in self.change.replace(",", "").split())
        return f"{self.method}{rho}{change}-seed{self.seed}.pt"


@dataclasses.dataclass
class Result:
    """What a finished run leaves behind. Accuracies are fractions, on the clean test images."""

    test_accuracy: float  # after the last epoch
    curve: list[float]  # test accuracy after each epoch
    train_loss: float  # clean loss, mean over the last epoch's steps, on the noisy labels
    top_eigenvalue: float  # of the Hessian of the training loss, of EIGENVALUE_SIZE examples with their noisy labels
    passes: float  # forward-backward passes for each step of a run that is not longer: the cost that needs no clock
    seconds: float  # training only: no evaluation, no eigenvalue, no checkpoint


class OtherSettings(ValueError):
    """A checkpoint was written under other settings than the run that would continue from it."""


class Interrupted(Exception):
    """Ctrl-C came; the checkpoint named in the message is written."""


class DeferredInterrupt:
    """Holds Ctrl-C (and SIGTERM) back until the loop asks, so that it never lands inside a step.

    NOTE [no checkpoint while perturbed] Between the passes of a sharpness-aware step the model
    holds perturbed weights and the EMA has already moved. Undoing the ascent would restore the
    weights exactly but leave that EMA, and the step redone after a resume would move it twice. So
    the interrupt waits the few milliseconds to the end of the step, where the state is whole. A
    second Ctrl-C does not wait; the checkpoint on disk is then the one of the last epoch.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> DeferredInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint; a crash meanwhile leaves the previous one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    torch.save(state, part)
    os.replace(part, path)


def build_optimizer(run: Run, params: list[nn.Parameter], steps: int) -> torch.optim.Optimizer:
    """The optimizer of ``run``, which has ``steps`` steps. Bad values are the optimizer's to refuse, in its words."""
    options: dict[str, Any] = {"lr": run.lr, "weight_decay": run.weight_decay}
    if run.base == "sgd":
        options["momentum"] = MOMENTUM
    base = BASES[run.base]
    if run.method in ("sam", "fsam"):
        options |= {"rho": run.rho, "backend": run.backend, "every": run.every, "start": round((1 - run.last) * steps)}
    if run.method == "sam":
        return SAM(params, base, **options)
    if run.method == "fsam":
        if run.reuse is not None:
            options["reuse"] = run.reuse
        return FriendlySAM(params, base, sigma=run.sigma, lmbda=run.lmbda, ema_dtype=AVERAGES[run.average], **options)
    return base(params, **options)


class Trainer:
    """The whole state of a run: ``load`` continues, bit for bit, from what ``save`` wrote."""

    def __init__(self, run: Run, data: Dataset) -> None:
        self.run = run
        self.train = noisy_subset(data.train, TRAIN_SIZE, run.noise, run.seed).to(run.device)
        self.test = data.test.to(run.device)
        torch.manual_seed(run.seed)  # the initial weights; nothing later draws from this generator
        self.model = ARCHITECTURES[run.arch].build(self.train.images.shape[1]).to(run.device)
        self.steps_per_epoch = math.ceil(len(self.train.labels) / BATCH_SIZE)
        self.epochs = run.epochs * run.longer
        steps = self.epochs * self.steps_per_epoch
        self.optimizer = build_optimizer(run, list(self.model.parameters()), steps)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)
        self.shuffle = torch.Generator().manual_seed(run.seed)
        self.epoch = 0
        self.step = 0  # within the epoch
        self.loss_sum = torch.zeros((), device=run.device)  # of the epoch; on the device: no sync
        self.curve: list[float] = []
        self.train_loss = float("nan")
        self.top_eigenvalue: float | None = None
        self.passes = 0
        self.seconds = 0.0
        self._start_epoch()

    def _start_epoch(self) -> None:
        # Kept so that a resume in mid-epoch draws the same order again.
        self.shuffle_state = self.shuffle.get_state()
        order = torch.randperm(len(self.train.labels), generator=self.shuffle)
        self.order = order.to(self.run.device)

    def save(self, path: Path) -> None:
        """Writes the checkpoint."""
        state = {
            "run": dataclasses.asdict(self.run),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "shuffle_state": self.shuffle_state,
            "loss_sum": self.loss_sum,
            **{name: getattr(self, name) for name in self._PLAIN},
        }
        save_whole(state, path)

    _PLAIN = ("epoch", "step", "curve", "train_loss", "top_eigenvalue", "passes", "seconds")

    def load(self, path: Path) -> None:
        """Continues from a checkpoint; ``OtherSettings`` where it was written under other ones."""
        state = torch.load(path, map_location=self.run.device, weights_only=True)
        asked, written = dataclasses.asdict(self.run), dataclasses.asdict(Run(**state["run"]))
        others = [name for name in asked if asked[name] != written[name]]
        if others:
            was, now = (", ".join(f"{name}={run[name]}" for name in others) for run in (written, asked))
            raise OtherSettings(
                f"{path} was written with {was}, but this command says {now}: leave out --resume, or give the options "
                "of the first run"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.shuffle.set_state(state["shuffle_state"].cpu())
        self._start_epoch()
        self.loss_sum = state["loss_sum"]
        for name in self._PLAIN:
            setattr(self, name, state[name])

    def fit(
        self,
        checkpoint: Path,
        interrupt: DeferredInterrupt,
        after_step: Callable[[], None] = lambda: None,
    ) -> Result:
        """Trains to the end, with a checkpoint per epoch; ``Interrupted`` once Ctrl-C has come."""

        def stop_if_asked() -> None:
            if interrupt.requested:
                self.save(checkpoint)
                raise Interrupted(str(checkpoint))

        while self.epoch < self.epochs:
            self.model.train()
            while self.step < self.steps_per_epoch:
                started = time.perf_counter()
                self.train_step()
                self.seconds += time.perf_counter() - started
                after_step()
                stop_if_asked()
            self.end_epoch()
            self.save(checkpoint)
            stop_if_asked()
        if self.top_eigenvalue is None:
            self.top_eigenvalue = self._top_eigenvalue(stop_if_asked)
            self.save(checkpoint)
        passes = self.passes / (self.run.epochs * self.steps_per_epoch)
        return Result(self.curve[-1], self.curve, self.train_loss, self.top_eigenvalue, passes, self.seconds)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the step that is next."""
        batch = self.order[self.step * BATCH_SIZE : (self.step + 1) * BATCH_SIZE]
        return self.train.images[batch], self.train.labels[batch]

    def train_step(self) -> None:
        """One step of the optimizer, on :meth:`batch`."""
        images, labels = self.batch()
        before = self.passes

        def closure() -> Tensor:
            self.passes += 1
            self.optimizer.zero_grad()
            # BatchNorm's running statistics see each batch once, at the weights that are kept.
            with freeze_stats(self.model) if self.passes - before > 1 else nullcontext():
                loss = cross_entropy(self.model(images), labels)
            loss.backward()
            return loss

        # A base optimizer evaluates the closure once; SAM and F-SAM twice where they ascend, at w and at w'. All
        # return the loss at w, so nothing else in this file knows which optimizer it trains with.
        self.loss_sum += self.optimizer.step(closure).detach()
        self.scheduler.step()
        self.step += 1

    def end_epoch(self) -> None:
        """Notes the figures of the epoch and draws the order of the next one."""
        self.curve.append(accuracy(self.model, self.test))
        self.train_loss = float(self.loss_sum) / self.steps_per_epoch
        self.loss_sum = torch.zeros_like(self.loss_sum)
        self.epoch, self.step = self.epoch + 1, 0
        self._start_epoch()

    def _top_eigenvalue(self, after_iteration: Callable[[], None]) -> float:
        self.model.eval()  # one loss for all images, not one for each batch's statistics
        images, labels = self.train.images[:EIGENVALUE_SIZE], self.train.labels[:EIGENVALUE_SIZE]
        return top_hessian_eigenvalue(
            lambda: cross_entropy(self.model(images), labels),
            list(self.model.parameters()),
            after_iteration=after_iteration,
        )


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Fraction of ``split`` that ``model`` classifies rightly."""
    model.eval()
    return float((model(split.images).argmax(1) == split.labels).float().mean())
