"""Training steps that are interrupted at any of their lines, and what may be left of them then.

A case is a model, an optimizer and a way to write a step. :func:`inject` raises KeyboardInterrupt at one line of this
package that the step reaches, has ``restore()`` called, as a user would, and compares:

- weights and base state are those before the step, bit for bit, or those after it: never a part of it;
- an average may have seen the first gradient, parameter by parameter, as the documentation says;
- what is reused is what it was before or is after the step, or there is none any more (its norm is 0);
- from there, training goes on with the bits of a fresh optimizer that was given that state.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fsam_ext
from fsam_ext import FriendlySAM, flatten_parameters

PACKAGE = str(Path(fsam_ext.__file__).parent)
OWN = ("fsam_ema", "fsam_ema_scale")
REUSED = "fsam_reuse"


@dataclass
class Case:
    """How an optimizer is made and stepped."""

    base: type[torch.optim.Optimizer] = torch.optim.SGD
    options: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    flatten: bool = False
    scaler: bool = False
    style: str = "calls"  # or "closure", "perturbed"
    later: bool = False  # some gradients come in the second pass only

    def model(self) -> nn.ParameterList:
        """Three small parameters of each dtype, with the same values each time."""
        generator = torch.Generator().manual_seed(0)
        model = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for dtype in self.dtypes
            for shape in ((4, 3), (), (7,))
        )
        if self.flatten:
            flatten_parameters(model, grads=True)
        return model

    def optimizer(self, model: nn.ParameterList) -> FriendlySAM:
        """Two groups, so that there are several segments."""
        params = list(model)
        groups = [{"params": params[0::2]}, {"params": params[1::2], "lr": 0.03}]
        return FriendlySAM(groups, self.base, rho=0.5, **{"lr": 0.05, **self.options})

    def backward(self, model: nn.ParameterList, number: int) -> None:
        """Gradients that depend on the weights and on the number of the pass."""
        generator = torch.Generator().manual_seed(number)
        for i, param in enumerate(model):
            if self.later and i == 1 and number % 2 == 0:
                continue
            noise = torch.randn(param.shape, generator=generator).to(param.dtype)
            gradient = (param.detach() * 0.3 + noise) * (64.0 if self.scaler else 1.0)
            if param.grad is None:
                param.grad = gradient
            else:
                param.grad.add_(gradient)

    def step(self, model: nn.ParameterList, optimizer: FriendlySAM, number: int, scaler: Any) -> None:
        """One training step."""
        passes = iter((2 * number, 2 * number + 1))

        def closure() -> torch.Tensor:
            self.backward(model, next(passes))
            return torch.zeros(())

        if self.style == "closure":
            optimizer.step(closure)
            optimizer.zero_grad()
            return
        closure()
        if not optimizer.ascends:
            optimizer.step()
        elif self.style == "perturbed":
            with optimizer.perturbed():
                closure()
            optimizer.step()
        elif scaler is None:
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step()
        else:
            optimizer.first_step(zero_grad=True, grad_scaler=scaler)
            closure()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()

    def make(self) -> Run:
        """A model with its optimizer, before the first step."""
        model = self.model()
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10**6) if self.scaler else None
        if scaler is not None:
            scaler.scale(torch.ones(()))  # makes the scale, as the first loss does
        return Run(self, model, self.optimizer(model), scaler)


@dataclass
class Run:
    """A training run under way."""

    case: Case
    model: nn.ParameterList
    optimizer: FriendlySAM
    scaler: Any

    def step(self, number: int) -> None:
        """Step ``number``."""
        self.case.step(self.model, self.optimizer, number, self.scaler)

    def fork(self) -> Run:
        """A fresh optimizer over a copy of the weights, with this one's state."""
        made = self.case.make()
        with torch.no_grad():
            for mine, theirs in zip(made.model, self.model):
                mine.copy_(theirs)
        made.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return made

    def snapshot(self) -> dict[str, Any]:
        """Weights, and the state of each parameter, as copies; the number of the step."""
        state = [
            {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in self.optimizer.state[p].items()}
            if p in self.optimizer.state
            else {}
            for p in self.model
        ]
        for param, entry in zip(self.model, state):
            if self.optimizer.param_groups[0]["master_weights"]:
                entry.setdefault("fsam_master", param.detach().float())  # what the first step makes it
        return {
            "weights": [p.detach().clone() for p in self.model],
            "own": [{k: v for k, v in entry.items() if k in OWN} for entry in state],
            "base": [{k: v for k, v in entry.items() if k not in (*OWN, REUSED)} for entry in state],
            "reused": [entry.get(REUSED) for entry in state],
            "norm": float(self.optimizer.param_groups[0].get("fsam_reuse_sq", 0.0)),
            "step": [group["fsam_step"] for group in self.optimizer.param_groups],
        }


def _unset(value: Any) -> bool:
    """Whether state has seen nothing: what a parameter has before its first step is as good as none."""
    return isinstance(value, torch.Tensor) and bool((value.isnan() | (value == 0)).all())


def same(a: Any, b: Any) -> bool:
    """Equal to the bit; state that has seen nothing equals state that is not there."""
    if isinstance(a, dict):
        return all(same(a[k], b[k]) if k in a and k in b else _unset(a.get(k, b.get(k))) for k in a.keys() | b.keys())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))
    return a == b


def verdict(found: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """What is wrong with a state that an interrupt left, or None."""
    for expected in (before, after):
        if all(same(found[part], expected[part]) for part in ("weights", "base", "step")):
            break
    else:
        return (
            f"a part of a step: {[part for part in ('weights', 'base', 'step') if not same(found[part], before[part])]}"
        )
    for mine, *choices in zip(found["own"], before["own"], after["own"]):
        if not any(same(mine, choice) for choice in choices):
            return "an average that is neither that before the step nor that after it"
    if found["norm"] and not any(
        found["norm"] == choice["norm"] and same(found["reused"], choice["reused"]) for choice in (before, after)
    ):
        return "what is reused is neither that before the step nor that after it"
    return None


@contextmanager
def interrupted_at(number: int, lines: list[tuple[str, int]] | None = None) -> Iterator[None]:
    """Raises KeyboardInterrupt at the ``number``-th line of this package that is reached; notes them in ``lines``."""
    count = -1

    def local(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if lines is not None:
                lines.append((frame.f_code.co_filename, frame.f_lineno))
            if count == number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return local

    def enter(frame: Any, event: str, arg: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(None)


def lines_of(case: Case, warm: int) -> list[tuple[str, int]]:
    """The lines of this package that step ``warm`` reaches, in order."""
    run = case.make()
    for number in range(warm):
        run.step(number)
    lines: list[tuple[str, int]] = []
    with interrupted_at(-1, lines):
        run.step(warm)
    return lines


class Injector:
    """Interrupts step ``warm`` of a case, again and again."""

    def __init__(self, case: Case, warm: int) -> None:
        self.case, self.warm = case, warm
        run = self._started()
        self.before = run.snapshot()
        run.step(warm)
        self.after = run.snapshot()

    def _started(self) -> Run:
        run = self.case.make()
        for number in range(self.warm):
            run.step(number)
        return run

    def at(self, number: int) -> str | None:
        """What is wrong after an interrupt at the ``number``-th line and restore(), or None."""
        run = self._started()
        with suppress(KeyboardInterrupt), interrupted_at(number):
            run.step(self.warm)
        return self.judge(run)

    def judge(self, run: Run) -> str | None:
        """Restores and compares."""
        if self.case.style in ("closure", "perturbed") and run.optimizer.is_perturbed:
            return "the weights are perturbed although the step restores them itself"
        run.optimizer.restore()
        if run.scaler is not None:
            with suppress(AssertionError):  # nothing to update where the interrupt came before the scaler's turn
                run.scaler.update()
        run.optimizer.zero_grad()
        wrong = verdict(run.snapshot(), self.before, self.after)
        if wrong is not None:
            return wrong
        try:
            fresh = run.fork()
            for number in (50, 51):
                run.step(number)
                fresh.step(number)
        except Exception as error:
            return f"afterwards: {type(error).__name__}: {error}"
        if not same(run.snapshot(), fresh.snapshot()):
            return "training goes on with other numbers"
        return None


def failures(case: Case, warm: int, choose: Callable[[list[tuple[str, int]]], list[int]]) -> tuple[int, list[str]]:
    """(number of injections, what went wrong) at those lines of a step that ``choose`` picks from all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = lines_of(case, warm)
        injector = Injector(case, warm)
        chosen = choose(lines)
        found = []
        for number in chosen:
            wrong = injector.at(number)
            if wrong is not None:
                file, line = lines[number]
                found.append(f"{Path(file).name}:{line} (line {number} of {len(lines)}): {wrong}")
    return len(chosen), found


def every_line(lines: list[tuple[str, int]]) -> list[int]:
    """All that is reached, as often as it is."""
    return list(range(len(lines)))


def each_line_once(lines: list[tuple[str, int]]) -> list[int]:
    """Each line of the source, at one of the times that it is reached."""
    turns: dict[tuple[str, int], list[int]] = {}
    for number, line in enumerate(lines):
        turns.setdefault(line, []).append(number)
    choice = random.Random(len(lines))
    return [choice.choice(numbers) for numbers in turns.values()]


def a_third_of_them(lines: list[tuple[str, int]]) -> list[int]:
    """Another third of those in each run."""
    once = each_line_once(lines)
    return [once[i] for i in torch.randperm(len(once))[: -(-len(once) // 3)]]


BF16 = torch.bfloat16
CASES: dict[str, Case] = {
    "SGD": Case(options={"momentum": 0.9}),
    "SGD closure": Case(options={"momentum": 0.9}, style="closure"),
    "AdamW": Case(torch.optim.AdamW),
    "AdamW closure": Case(torch.optim.AdamW, style="closure"),
    "AdamW perturbed": Case(torch.optim.AdamW, style="perturbed"),
    "two dtypes": Case(options={"momentum": 0.9}, dtypes=(torch.float32, torch.float64)),
    "other base": Case(torch.optim.RMSprop, {"momentum": 0.9}),
    "other base closure": Case(torch.optim.NAdam, style="closure"),
    "masters": Case(torch.optim.AdamW, {"master_weights": True}, dtypes=(BF16,)),
    "stochastic rounding": Case(options={"momentum": 0.9, "stochastic_rounding": True}, dtypes=(BF16,)),
    "int8 average": Case(options={"momentum": 0.9, "ema_dtype": torch.int8}),
    "flattened": Case(torch.optim.AdamW, flatten=True),
    "flattened closure": Case(options={"momentum": 0.9}, flatten=True, style="closure"),
    "plain step of a schedule": Case(torch.optim.AdamW, {"every": 2, "start": 1}),
    "reuse": Case(options={"momentum": 0.9, "every": 2, "reuse": 0.3}),
    "reuse closure": Case(torch.optim.AdamW, {"every": 2, "reuse": 0.3, "reuse_dtype": BF16}, style="closure"),
    "reuse without an average": Case(options={"every": 2, "start": 1, "reuse": 0.3, "sigma": 0.0}),
    "average of the descent": Case(options={"momentum": 0.9, "ema_source": "descent"}),
    "scaler": Case(options={"momentum": 0.9}, scaler=True),
    "scaler, other base": Case(torch.optim.RMSprop, scaler=True),
    "a gradient that comes later": Case(torch.optim.AdamW, later=True),
    "reference": Case(options={"momentum": 0.9, "backend": "reference"}),
    "SAM": Case(options={"momentum": 0.9, "sigma": 0.0}),
}


def main() -> None:
    """Injects at every line of every case, cold and warm, and prints the counts."""
    total = wrong = 0
    for name, case in CASES.items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        for warm in (0, 1):
            tried, found = failures(case, warm, every_line)
            total, wrong = total + tried, wrong + len(found)
            print(f"{name}, {'warm' if warm else 'cold'}: {tried} injections, {len(found)} failures", flush=True)
            for line in found[:8]:
                print(f"    {line}")
    print(f"injections tried: {total}, failures: {wrong}")


if __name__ == "__main__":
    main()
