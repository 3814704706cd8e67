"""Differential fuzz: FriendlySAM at rho = 0 is its base, whatever is done to state and when, and its average is one.

Thousands of small random programs (state_programs.py), each on ours and on torch's optimizer alone. What fails prints
the program; ``--seed`` and its number repeat it.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from fsam_ext import flatten_parameters
from fsam_ext.step import held

from . import state_programs as programs
from .conformance import identical
from .state_programs import EMA, NUMBERS, SHAPED, Side

BASES: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": 0.05}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5, "dampening": 0.25, "weight_decay": 0.1}),
    (torch.optim.NAdam, {"lr": 0.05}),
]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
MOMENTS = ("before", "between", "in the first closure", "in the second closure", "in the block", "after the block")
# Between the two passes of a step.
WITHIN = ("between", "in the second closure", "in the block", "after the block", "in a hook between")
WAYS = ("by hand", "block", "closure")
STEPS = 24  # of one program


class Program:
    """One random program: two sides, and what has been done to them."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng, self.log = seed, random.Random(seed), []
        rng = self.rng
        base, kwargs = rng.choice(BASES)
        self.dtype = rng.choice((torch.float32, torch.float64))
        own = {"sigma": rng.choice((0.0, 1.0)), "lmbda": 0.8, "every": rng.choice((1, 1, 2))}
        generator = torch.Generator().manual_seed(seed)
        shapes = [rng.choice(programs.SHAPES) for _ in range(rng.randrange(1, 5))]
        weights = [torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype) for shape in shapes]
        self.generator = generator
        self.ours = Side(True, [Parameter(w.clone()) for w in weights], base, kwargs, own)
        self.theirs = Side(False, [Parameter(w.clone()) for w in weights], base, kwargs, own)
        self.ours.twin = self.theirs
        # Parameters may be held by C++, and lie one after the other with their gradients.
        self.fewest, self.ours.in_place = rng.choice((1, sys.maxsize)), rng.random() < 0.5
        self.flatten = flatten = rng.random() < 0.25
        if flatten:
            flatten_parameters(nn.ParameterList(self.ours.params), grads=True)
        self.log.append(f"{base.__name__} {kwargs} {own} {self.dtype} {shapes} {flatten=}")

    # ---- Edits -------------------------------------------------------------------------------------------------------

    def choose(self, moment: str) -> Any:
        """An edit that may be made at that moment, as a function of a side."""
        rng, at_rest = self.rng, moment in ("before", "after the block")
        seed = rng.randrange(2**31)
        if rng.random() < 0.5:
            edit = rng.choice(programs.TENSOR_EDITS)
            while moment in WITHIN and edit in programs.SEEN_BY_THE_NEXT_STEP:
                edit = rng.choice(programs.TENSOR_EDITS)
            base = self.ours.base
            i = rng.randrange(len(self.ours.params))
            name = rng.choice((*SHAPED[base], *NUMBERS.get(base, ()), EMA))
            if self.flatten and name == "step" and "written" in edit.__name__:  # docs/design.md: rows share a count
                edit = programs.replaced
            self.log.append(f"  {moment}: {edit.__name__} {i} {name}")
            return lambda side: edit(side, i, name, random.Random(seed)), (i, name)
        edits = programs.STATE_EDITS
        edits += programs.REST_EDITS if at_rest else ()
        edits += programs.BETWEEN_EDITS if moment == "before" else ()
        edit = rng.choice(edits)
        self.log.append(f"  {moment}: {edit.__name__}")
        return lambda side: edit(side, random.Random(seed)), None

    def edits(self, moment: str, probability: float) -> list[Any]:
        return [self.choose(moment)] if self.rng.random() < probability else []

    # ---- A step ------------------------------------------------------------------------------------------------------

    def grads(self) -> list[torch.Tensor | None]:
        drop = self.rng.random() < 0.3
        return [
            None
            if not p.requires_grad or drop and self.rng.random() < 0.4
            else torch.randn(p.shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
            for p in self.theirs.params
        ]

    def both(self, edits: list[Any]) -> None:
        for edit, tensor in edits:
            if tensor is None or self.ours.has(*tensor):
                edit(self.ours)
                edit(self.theirs)

    def step(self) -> None:
        rng, ours, theirs = self.rng, self.ours, self.theirs
        way = rng.choice(WAYS) if ours.optimizer.ascends else rng.choice(("plain", "plain closure"))
        self.log.append(way)
        self.both(self.edits("before", 0.5))
        first, second = self.grads(), self.grads()
        while all(grad is None for grad in second) and any(grad is not None for grad in first):
            second = self.grads()  # a step without a second gradient is refused
        if way == "closure" and all(grad is None for grad in first):
            way = "by hand"  # a closure that makes no gradient is one that does nothing: closures.py
        poisoned = [g for g in first if g is not None and g.numel()]
        skipped = way in WAYS and rng.random() < 0.05 and poisoned != []
        if skipped:
            rng.choice(poisoned).fill_(rng.choice((torch.inf, torch.nan)))
            self.log.append("  first gradient not finite")
        hooked = self.hook("in a hook between" if way in ("by hand", "block") else "in a hook")
        if way in WAYS:
            getattr(self, way.replace(" ", "_"))(first, second, skipped)
        else:
            ours.set_grads(second)
            ours.optimizer.step(None if way == "plain" else lambda: ours.set_grads(second))
            theirs.average(second)
            self.finish(second, False)
        hooked.remove()
        self.compare()

    def hook(self, moment: str) -> Any:
        """A step pre-hook that may edit; torch's side makes the same edit before its step."""
        self.in_hook = self.edits(moment, 0.2)

        def pre_hook(optimizer, args, kwargs):
            self.both(self.in_hook)

        return self.ours.optimizer.register_step_pre_hook(pre_hook)

    def ascend(self, first: Any, skipped: bool) -> None:
        if not skipped:
            self.theirs.average(first)

    def finish(self, second: Any, skipped: bool) -> None:
        self.theirs.set_grads(second)
        if not skipped:
            with self.theirs.only_torchs():
                self.theirs.optimizer.step()

    def by_hand(self, first: Any, second: Any, skipped: bool) -> None:
        self.ours.set_grads(first)
        self.ours.optimizer.first_step(zero_grad=True)
        self.ascend(first, skipped)
        self.both(self.edits("between", 0.4))
        self.ours.set_grads(second)
        if self.rng.random() < 0.5:
            self.ours.optimizer.second_step()
        else:
            self.ours.optimizer.step()
        self.finish(second, skipped)

    def block(self, first: Any, second: Any, skipped: bool) -> None:
        self.ours.set_grads(first)
        with self.ours.optimizer.perturbed():
            self.ascend(first, skipped)
            self.both(self.edits("in the block", 0.3))
            self.ours.set_grads(second)
        self.both(self.edits("after the block", 0.3))
        self.ours.optimizer.step()
        self.finish(second, skipped)

    def closure(self, first: Any, second: Any, skipped: bool) -> None:
        passes = iter((first, second))

        def closure():
            grads = next(passes)
            if grads is first:
                self.both(self.edits("in the first closure", 0.2))
            else:
                self.ascend(first, skipped)
                self.both(self.edits("in the second closure", 0.3))
            self.ours.set_grads(grads)

        self.ours.optimizer.step(closure)
        self.finish(second, skipped)

    # ---- Are they equal? ---------------------------------------------------------------------------------------------

    def compare(self) -> None:
        tolerance = TOLERANCE[self.dtype]

        def check(what, a, b):
            b = b.to(a.dtype)
            if a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True):
                return
            raise AssertionError(f"{what} is {a.flatten().tolist()}, not {b.flatten().tolist()}")

        for i, (mine, other) in enumerate(zip(self.ours.params, self.theirs.params, strict=True)):
            check(f"parameter {i}", mine.detach(), other.detach())
        mine, others = self.ours.state(), self.theirs.state()
        for (i, name), other in others.items():
            assert (i, name) in mine, f"{name} of parameter {i} is missing"
            check(f"{name} of parameter {i}", mine[i, name], other)

    def run(self, steps: int = STEPS) -> int:
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(held, "FEWEST", self.fewest)
                for _ in range(steps):
                    self.step()
        except BaseException as error:
            text = "\n".join(self.log)
            raise AssertionError(f"program {self.seed}\n{text}\n{type(error).__name__}: {error}") from error
        return steps


# ---- Edits that change nothing ---------------------------------------------------------------------------------------

# Every way to keep an average, weights and state: what is fused into one pass with them has to go on to the bit.
KEPT: list[tuple[Any, torch.dtype, dict[str, Any]]] = [
    (torch.optim.AdamW, torch.float32, {"lr": 0.05, "ema_dtype": torch.int8}),
    (torch.optim.SGD, torch.float32, {"lr": 0.05, "momentum": 0.9, "ema_dtype": torch.bfloat16, "adaptive": True}),
    (torch.optim.AdamW, torch.bfloat16, {"lr": 0.05, "master_weights": True}),
    (torch.optim.SGD, torch.bfloat16, {"lr": 0.05, "momentum": 0.9, "master_weights": True, "ema_dtype": torch.int8}),
    (torch.optim.AdamW, torch.bfloat16, {"lr": 0.05, "stochastic_rounding": True}),
    (torch.optim.SGD, torch.float16, {"lr": 0.05, "momentum": 0.9, "stochastic_rounding": True, "every": 2}),
    (torch.optim.Adam, torch.float64, {"lr": 0.05, "ema": "updated"}),
    (torch.optim.SGD, torch.float32, {"lr": 0.05, "momentum": 0.9, "ema_source": "descent", "every": 2}),
    (torch.optim.NAdam, torch.float32, {"lr": 0.05, "ema_dtype": torch.int8, "foreach": False}),
    (torch.optim.RMSprop, torch.float32, {"lr": 0.05, "momentum": 0.5, "foreach": False}),
]
EQUAL_TENSORS = (
    programs.replaced_by_equal,
    programs.with_gaps,
    programs.moved_through_a_file,
    programs.in_other_memory,
)
EQUAL_STATE = (
    *(programs.all_through_a_file, programs.all_given_other_memory, programs.entry_in_another_order),
    *(programs.state_in_another_order, programs.entry_copied),
)
EQUAL_AT_REST = (programs.all_moved_away_and_back, programs.saved_and_loaded)
EQUAL_BETWEEN = (programs.loaded_into_a_fresh_one, programs.copied, programs.weights_in_other_memory)


class Unchanged:
    """Two runs of the same steps, with edits of one that leave every value as it is."""

    def __init__(self, seed: int) -> None:
        self.rng, self.log = random.Random(seed), [f"program {seed}"]
        base, dtype, options = self.rng.choice(KEPT)
        shapes = [self.rng.choice(programs.SHAPES) for _ in range(self.rng.randrange(1, 5))]
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        sides = [Side(True, [Parameter(w.clone()) for w in weights], base, options, {"rho": 0.1}) for _ in "ab"]
        self.generator, (self.edited, self.plain) = generator, sides
        self.log.append(f"{base.__name__} {options} {dtype} {shapes}")

    def edit(self, *kinds: Any) -> None:
        if self.rng.random() < 0.5:
            edit, seed = self.rng.choice([one for kind in kinds for one in kind]), self.rng.randrange(2**31)
            i = self.rng.randrange(len(self.edited.params))
            self.log.append(f"  {edit.__name__} {i}")
            if edit not in EQUAL_TENSORS:
                edit(self.edited, random.Random(seed))
            elif names := [name for name in self.edited.entry(i) if self.edited.has(i, name)]:
                edit(self.edited, i, self.rng.choice(names), random.Random(seed))

    def step(self) -> None:
        self.edit(EQUAL_TENSORS, EQUAL_STATE, EQUAL_AT_REST, EQUAL_BETWEEN)
        ascends, block = self.plain.optimizer.ascends, self.rng.random() < 0.5
        self.log.append("block" if block else "by hand")
        if ascends:
            self.set_grads()
            for side in (self.edited, self.plain):
                side.optimizer.first_step() if not block else self.perturb(side)
            self.edit(EQUAL_TENSORS, EQUAL_STATE, *((EQUAL_AT_REST,) if block else ()))
        self.set_grads()
        for side in (self.edited, self.plain):
            side.optimizer.step()
        for i, (mine, other) in enumerate(zip(self.edited.params, self.plain.params, strict=True)):
            assert identical(mine.detach(), other.detach()), f"parameter {i}"
            assert self.edited.entry(i).keys() == self.plain.entry(i).keys(), f"names of parameter {i}"
            for name, value in self.plain.entry(i).items():
                if isinstance(value, torch.Tensor):
                    mine = self.edited.entry(i)[name].clone(memory_format=torch.contiguous_format)
                    assert identical(mine, value), f"{name} of parameter {i}"

    def perturb(self, side: Side) -> None:
        with side.optimizer.perturbed(zero_grad=False):
            pass

    def set_grads(self) -> None:
        drop = self.rng.random() < 0.3
        grads = [
            None
            if number and drop and self.rng.random() < 0.4  # a step without any second gradient is refused
            else torch.randn(p.shape, generator=self.generator, dtype=torch.float64).to(p.dtype)
            for number, p in enumerate(self.plain.params)
        ]
        for side in (self.edited, self.plain):
            side.set_grads(grads)

    def run(self, steps: int = STEPS) -> int:
        try:
            for _ in range(steps):
                self.step()
        except BaseException as error:
            text = "\n".join(self.log)
            raise AssertionError(f"{text}\n{type(error).__name__}: {error}") from error
        return steps


@pytest.mark.filterwarnings("ignore:rounding to")
@pytest.mark.parametrize("part", range(4))
def test_edits_that_change_nothing_change_no_bit(part, request):
    seed = 1000 * request.config.fsam_seed + 25 * part
    assert sum(Unchanged(seed + i).run() for i in range(25)) == 600


# ---- Edits that change something -------------------------------------------------------------------------------------


def run(first: int, count: int) -> int:
    """Runs programs; returns their steps."""
    return sum(Program(first + i).run() for i in range(count))


PARTS, PROGRAMS = 8, 53


@pytest.mark.parametrize("part", range(PARTS))
def test_state_may_be_edited_at_any_moment(part, request):
    """10,176 steps in all, about 1.3 edits each."""
    assert run(1000 * request.config.fsam_seed + part * PROGRAMS, PROGRAMS) * PARTS >= 10_000


@pytest.mark.large
def test_state_may_be_edited_at_any_moment_for_long(request):
    assert run(1000 * request.config.fsam_seed + PARTS * PROGRAMS, 20_000) == 480_000
