"""1,500 mutated checkpoints: each is refused in one sentence and has changed nothing, or is loaded whole and trains on.

Mutations are drawn anew in each run; what fails names its number, and ``--seed`` repeats it.
"""

from __future__ import annotations

import copy
import random
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, AdamW, NAdam

from fsam_ext import SAM, FriendlySAM

from .conformance import identical

SHAPES = ((3, 5), (7,), ())  # those of tests/checkpoints
KINDS: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "sgd": (SGD, torch.float32, {"lr": 0.05, "momentum": 0.9}),
    "adamw": (AdamW, torch.float32, {"lr": 0.01}),
    "nadam": (NAdam, torch.float32, {"lr": 0.01}),
    "adadelta": (Adadelta, torch.float32, {"lr": 0.01, "base_rho": 0.8}),
    "int8": (SGD, torch.float32, {"lr": 0.05, "momentum": 0.9, "ema_dtype": torch.int8}),
    "masters": (AdamW, torch.bfloat16, {"lr": 0.01, "master_weights": True}),
    "rounding": (SGD, torch.bfloat16, {"lr": 0.01, "stochastic_rounding": True}),
    "sam": (AdamW, torch.float64, {"lr": 0.01}),
}


def made(kind: str, lone: bool = False) -> tuple[list[nn.Parameter], Any]:
    """(parameters, their optimizer), of two groups; ``lone``: the base alone."""
    base, dtype, options = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    if lone:
        return params, base(groups, lr=0.01)
    return params, (SAM if kind == "sam" else FriendlySAM)(groups, base, rho=0.1, **options)


def train(params: list[nn.Parameter], optimizer: Any, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    ours = hasattr(optimizer, "first_step")
    for _ in range(steps):
        for half in (optimizer.first_step, optimizer.second_step) if ours else (optimizer.step,):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            half()


def donors() -> list[tuple[str, Any]]:
    """(a kind that it fits, a checkpoint): of every kind, of its base alone, of the official code, of older formats."""
    found = []
    for kind in KINDS:
        for lone in (False, True):
            params, optimizer = made(kind, lone)
            train(params, optimizer, 3)
            found.append((kind, copy.deepcopy(optimizer.state_dict())))
    for file in sorted((Path(__file__).parent / "checkpoints").glob("format*.pt")):
        for name, case in torch.load(file, weights_only=True).items():
            saved = case["optimizer"]
            (group,) = saved["param_groups"]
            saved["param_groups"] = [{**group, "params": [0, 1]}, {**group, "params": [2]}]
            found.append(("sam" if name == "adamw" else name, saved))
    params, optimizer = made("sgd", lone=True)
    group = {**optimizer.state_dict()["param_groups"][0], "rho": 0.2, "adaptive": False}
    kept = {
        i: {name: torch.ones(shape) for name in ("momentum", "old_p", "first_grad")} for i, shape in enumerate(SHAPES)
    }
    groups = [{**group, "params": [0, 1]}, {**group, "params": [2]}]
    return [*found, ("sgd", {"state": kept, "param_groups": groups})]


# ---- Mutations: each changes a checkpoint in place, or returns another thing, and says in which words ----------------

WRONG: list[Callable[[Tensor], Any]] = [
    lambda v: None,
    lambda v: 3,
    lambda v: -1.5,
    lambda v: "a word",
    lambda v: [1.0, 2.0],
    lambda v: {"nested": v},
    lambda v: v.reshape(-1)[:-1] if v.dim() else v.reshape(1),
    lambda v: v.reshape(-1),
    lambda v: v[None],
    lambda v: v.t() if v.dim() == 2 else torch.stack([v, v]),
    lambda v: v.to(torch.complex64),
    lambda v: v.to(torch.int32),
    lambda v: v.to(torch.bool),
    lambda v: v.to(torch.float16),
    lambda v: v.double(),
    lambda v: v.to(torch.int8),
    lambda v: v.float().to_sparse() if v.dim() else v,
    lambda v: v.to("meta"),
    lambda v: torch.full_like(v, torch.nan, dtype=torch.float32),
    lambda v: torch.full_like(v, -torch.inf, dtype=torch.float32),
    lambda v: -v.float() - 1,
    lambda v: v.float().requires_grad_(),
    lambda v: v.float().expand(2, *v.shape)[0],
    lambda v: nn.Parameter(v.float()),
    lambda v: v.numpy() if v.dtype != torch.bfloat16 else v,
]
OPTIONS = (
    *(None, "a word", float("nan"), float("inf"), -1.0, -1, 2, 1e400, 10**320, [], {}, (0.9,), (0.9, 1.5), ("a", "b")),
    *([0.9, 0.99], b"bytes", True, False, torch.tensor([1.0, 2.0]), torch.tensor(3), torch.tensor(0.5), torch.int8),
    *(torch.float32, "torch.bfloat16", "torch.int8", "torch.nonsense", "torch.nn", object(), 1j, 0, {"params": []}),
)


def state_value(saved, rng):
    key = rng.choice(sorted(saved["state"]))
    name = rng.choice(sorted(saved["state"][key]))
    value = saved["state"][key][name]
    if isinstance(value, Tensor):
        saved["state"][key][name] = rng.choice(WRONG)(value)


def state_name(saved, rng):
    entry = saved["state"][rng.choice(sorted(saved["state"]))]
    name = rng.choice(sorted(entry))
    value = entry.pop(name)
    if rng.random() < 0.5:
        entry[rng.choice(("exp_avg", "momentum_buffer", "fsam_ema", "fsam_master", "fsam_ema_scale", "ema", 3))] = value


def more_state(saved, rng):
    entry = saved["state"][rng.choice(sorted(saved["state"]))]
    name = rng.choice(("fsam_ema", "fsam_ema_scale", "fsam_master", "momentum", "master", "step", "new", None, 7))
    entry[name] = rng.choice((torch.ones(7), torch.ones(()), torch.zeros(7, dtype=torch.int8), "a word", None, [1], 2))


def entry(saved, rng):
    key = rng.choice(sorted(saved["state"]))
    new = rng.choice((None, [], "a word", {}, 3, torch.ones(3), [saved["state"][key]], {"a": {"b": torch.ones(1)}}))
    if rng.random() < 0.3:
        del saved["state"][key]
    else:
        saved["state"][key] = new


def entries_swapped(saved, rng):
    i, j = rng.sample(sorted(saved["state"]), 2)
    saved["state"][i], saved["state"][j] = saved["state"][j], saved["state"][i]


def state_key(saved, rng):
    value = saved["state"].pop(rng.choice(sorted(saved["state"])))
    saved["state"][rng.choice(("0", 99, -1, (0, 1), None, 1.5, "weight"))] = value


def option(saved, rng):
    group = rng.choice(saved["param_groups"])
    name = rng.choice(sorted(set(group) - {"params"}))
    if rng.random() < 0.2:
        del group[name]
    else:
        group[name] = rng.choice(OPTIONS)


def more_options(saved, rng):
    group = rng.choice(saved["param_groups"])
    names = ("fsam_format", "fsam_step", "rho", "sigma", "amsgrad", "mine", 3, "param_names", "base_rho", "lr", "betas")
    group[rng.choice(names)] = rng.choice(OPTIONS)


def params(saved, rng):
    group = rng.choice(saved["param_groups"])
    kept = group["params"]
    group["params"] = rng.choice(
        (None, "ab", 3, [], kept + [5], kept[:-1], [kept], [kept[0]] * len(kept), [None] * len(kept), {"a": 1})
        + (
            ["a"] * len(kept),
            [99 + i for i in range(len(kept))],
            tuple(kept),
            [[k] for k in kept],
            list(map(str, kept)),
        )
        + (kept[::-1], [float(k) for k in kept], [torch.tensor(k) for k in kept], [True, False][: len(kept)])
    )
    if rng.random() < 0.1:
        del group["params"]


def groups(saved, rng):
    listed = saved["param_groups"]
    saved["param_groups"] = rng.choice(
        (None, [], {}, "ab", tuple(listed), listed[:1], listed + listed, [listed], [None, None], listed[::-1], [{}, {}])
    )


def whole(saved, rng):
    choices = (None, [], "a word", [saved], {"optimizer": saved}, {**saved, "more": 3}, {"state": saved["state"]})
    choices += ({**saved, "state": None}, {**saved, "state": []}, {**saved, "state": {}}, {}, 3, {**saved, 4: object()})
    return rng.choice(choices)


MUTATIONS = (
    *(state_value,) * 5,
    *(option,) * 4,
    *(state_name, more_state, entry, entries_swapped, state_key, more_options, params, groups, whole),
)


def mutated(saved: Any, rng: random.Random) -> tuple[Any, list[str]]:
    """(a damaged copy, what was done)."""
    saved = copy.deepcopy(saved)
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutate = rng.choice(MUTATIONS)
        done.append(mutate.__name__)
        try:
            result = mutate(saved, rng)
        except Exception:  # what it would damage is gone already
            continue
        if mutate is whole:
            return result, done
    return saved, done


# ---- What has to hold ------------------------------------------------------------------------------------------------


def snapshot(optimizer: Any) -> dict[str, Any]:
    """The objects that an optimizer consists of, by identity, and the values of options."""
    base = optimizer._base.optimizer
    return {
        "state": (id(optimizer.state), {id(p): {n: id(v) for n, v in e.items()} for p, e in optimizer.state.items()}),
        "groups": (id(optimizer.param_groups), [{n: id(v) for n, v in g.items()} for g in optimizer.param_groups]),
        "values": repr(optimizer.param_groups),
        "defaults": repr(optimizer.defaults),
        "stage": optimizer._stage,
        "base": {name: value for name, value in base.__dict__.items() if name not in ("state", "param_groups")},
        "base's state": len(base.state),
        "ours": set(optimizer.__dict__),
    }


def check_refused(error: BaseException, message: str) -> None:
    assert type(error) is ValueError or isinstance(error, ValueError) and type(error).__name__ == "Refused"
    assert "\n" not in message and 30 < len(message) < 600, message
    assert re.search(r"'\w+'|group|param|state|must be|has format|cannot load this checkpoint", message), (
        message
    )  # it names what


def check_one(kind: str, saved: Any) -> bool:
    """Loads into an optimizer that has trained; whether it was taken."""
    params, optimizer = made(kind)
    train(params, optimizer, 2)
    twins, twin = copy.deepcopy((params, optimizer))
    before = snapshot(optimizer)
    bits = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
    try:
        optimizer.load_state_dict(saved)
    except BaseException as error:
        check_refused(error, str(error))
        assert snapshot(optimizer) == before
        assert all(map(identical, bits, [value for entry in optimizer.state.values() for value in entry.values()]))
        assert all(map(identical, params, twins))
        train(params, optimizer, 2)
        train(twins, twin, 2)
        assert all(map(identical, params, twins))
        for mine, other in zip(params, twins, strict=True):
            assert optimizer.state[mine].keys() == twin.state[other].keys()
            assert all(identical(value, twin.state[other][name]) for name, value in optimizer.state[mine].items())
        return False
    try:
        train(params, optimizer, 2)
    except Exception as error:  # what a base that is not fused keeps is checked by nobody, in torch neither
        frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        base = KINDS[kind][0].__name__.lower()
        assert base in ("nadam", "adadelta") and any(name.endswith(f"/torch/optim/{base}.py") for name in frames), error
        optimizer.restore()
    copy.deepcopy(optimizer.state_dict())
    return True


PARTS, EACH = 6, 250


@pytest.mark.filterwarnings("ignore:Casting complex values", "ignore:.*sparse", "ignore:.*perturbation")
@pytest.mark.parametrize("part", range(PARTS))
def test_a_mutated_checkpoint_is_refused_whole_or_loaded_whole(part, request):
    originals = donors()
    taken = 0
    for number in range(part * EACH, (part + 1) * EACH):
        rng = random.Random(request.config.fsam_seed * 10_000 + number)
        kind, saved = rng.choice(originals)
        saved, done = mutated(saved, rng)
        try:
            taken += check_one(kind, saved)
        except BaseException as error:
            raise AssertionError(f"number {number}, {kind}: {done}: {type(error).__name__}: {error}") from error
    assert EACH / 10 < taken < EACH * 9 / 10  # both happen


@pytest.mark.parametrize("number", range(len(donors())))
def test_what_is_mutated_can_be_loaded(number):
    assert check_one(*donors()[number])
