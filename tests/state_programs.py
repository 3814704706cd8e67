"""Random programs of training steps with edits of an optimizer's state, made on ours and on torch's side alike.

A :class:`Side` is parameters and an optimizer: FriendlySAM at rho = 0, or torch's own, with the average by its plain
definition. Every edit is one function that is run on both sides with the same random numbers.
"""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fsam_ext import FriendlySAM

EMA = "fsam_ema"
SHAPES = ((), (1,), (3,), (2, 3), (3, 3), (3, 3), (1, 4), (2, 2, 1, 3), (40,))
# What each base keeps of a parameter, with the parameter's shape.
SHAPED = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.NAdam: ("exp_avg", "exp_avg_sq"),
    torch.optim.RMSprop: ("square_avg", "momentum_buffer"),
}
NUMBERS = {torch.optim.Adam: ("step",), torch.optim.AdamW: ("step",), torch.optim.NAdam: ("step", "mu_product")}
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
POSITIVE = ("exp_avg_sq", "square_avg")


class Side:
    """Parameters and their optimizer.

    Attributes:
        ours: whether it is a FriendlySAM; if not, its average is kept in the optimizer's state between the steps.
        twin: the other side where it tells what there is to edit: ours has state that has seen no gradient, too.
        kept: tensors that an edit has put aside.
        in_place: gradients are written where the last ones are, as autograd does.
    """

    def __init__(self, ours: bool, params: list[Parameter], base: Any, kwargs: dict[str, Any], own: dict[str, Any]):
        self.ours, self.params, self.base, self.kwargs, self.own = ours, params, base, kwargs, own
        self.twin: Side | None = None
        self.in_place = False
        self.kept: list[tuple[int, str, Tensor]] = []
        half = len(params) // 2
        self.names = [f"p{i}" for i in range(len(params))]
        named = list(zip(self.names, params))
        self.optimizer = self.make([{"params": named[:half], "lr": 0.02}, {"params": named[half:]}] if half else named)

    def make(self, params: Any) -> Any:
        if self.ours:
            return FriendlySAM(params, self.base, **({"rho": 0.0} | self.own), **self.kwargs)
        return self.base(params, foreach=False, **self.kwargs)

    def entry(self, i: int) -> dict[str, Any]:
        """The state of parameter i, or an empty dict that is nowhere."""
        return self.optimizer.state.get(self.params[i], {})

    def has(self, i: int, name: str) -> bool:
        return isinstance((self.twin or self).entry(i).get(name), Tensor)

    # ---- A step ------------------------------------------------------------------------------------------------------

    def set_grads(self, grads: list[Tensor | None]) -> None:
        for param, grad in zip(self.params, grads, strict=True):
            if self.in_place and grad is not None and param.grad is not None:
                param.grad.copy_(grad)
            else:
                param.grad = None if grad is None else grad.clone()

    def average(self, grads: list[Tensor | None]) -> None:
        """The definition: the first gradient is the average, and then m = lmbda m + (1 - lmbda) g."""
        if self.own["sigma"] == 0:
            return
        for i, grad in enumerate(grads):
            if grad is not None:
                entry = self.optimizer.state[self.params[i]]
                before = entry.get(EMA)
                lmbda = self.own["lmbda"]
                entry[EMA] = grad.clone() if before is None else lmbda * before + (1 - lmbda) * grad

    @contextmanager
    def only_torchs(self) -> Iterator[None]:
        """Torch's optimizers must not see the average: one with any state at all is not the first step's."""
        averages = {}
        for i, param in enumerate(self.params):
            if EMA in self.entry(i):
                averages[i] = self.entry(i).pop(EMA)
                if not self.entry(i):
                    del self.optimizer.state[param]
        yield
        for i, average in averages.items():
            self.optimizer.state[self.params[i]][EMA] = average

    def load(self, saved: Any) -> None:
        """Loads; torch's optimizers are not shown the average, and cast a dtype that ours leaves as it was saved."""
        if self.ours:
            return self.optimizer.load_state_dict(saved)
        averages = {key: entry[EMA] for key, entry in saved["state"].items() if EMA in entry}
        state = {key: {n: v for n, v in entry.items() if n != EMA} for key, entry in saved["state"].items()}
        self.optimizer.load_state_dict({**saved, "state": {key: entry for key, entry in state.items() if entry}})
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        for key, average in averages.items():
            self.optimizer.state[params[key]][EMA] = average.clone()
        for entry in self.optimizer.state.values():
            if "mu_product" in entry:
                entry["mu_product"] = entry["mu_product"].float()

    def state(self) -> dict[tuple[int, str], Tensor]:
        """What counts: every tensor that has seen a gradient."""
        return {
            (i, name): value
            for i in range(len(self.params))
            for name, value in self.entry(i).items()
            if isinstance(value, Tensor) and not (self.ours and value.numel() and bool(value.isnan().all()))
        }


# ---- Edits -----------------------------------------------------------------------------------------------------------
# Of one tensor: (side, i, name, rng). A fused base keeps state in the dtype of the arithmetic, whatever it is given.


def values_like(value: Tensor, name: str, rng: random.Random) -> Tensor:
    """Other values that every dtype holds: multiples of 1/64."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    if name == "step":
        return torch.tensor(float(rng.randrange(1, 20)), dtype=value.dtype)
    if name == "mu_product":
        return torch.tensor(rng.randrange(32, 64) / 64, dtype=value.dtype)
    drawn = torch.randint(-32, 33, value.shape, generator=generator) / 64
    return (drawn.abs() + 1 / 64 if name in POSITIVE else drawn).to(value.dtype)


def reordered(value: Tensor) -> Tensor:
    """The same values in memory of their own, with the first dimension the innermost."""
    order = tuple(range(value.dim()))[::-1]
    return value.permute(order).clone(memory_format=torch.contiguous_format).permute(order)


def replaced_by_equal(side, i, name, rng):
    side.entry(i)[name] = side.entry(i)[name].clone()


def replaced(side, i, name, rng):
    side.entry(i)[name] = values_like(side.entry(i)[name], name, rng)


def in_another_dtype(side, i, name, rng):
    value = values_like(side.entry(i)[name], name, rng).to(rng.choice((torch.float64, torch.float16, torch.bfloat16)))
    if not side.ours or side.base not in FUSED and name != EMA:
        value = value.to(torch.float32 if name in ("step", "mu_product") else side.params[i].dtype)
    side.entry(i)[name] = value


def with_gaps(side, i, name, rng):
    value = side.entry(i)[name]
    wide = torch.full((*value.shape, 3), 7.0, dtype=value.dtype)
    wide[..., 1] = value
    side.entry(i)[name] = wide[..., 1]


def in_another_order(side, i, name, rng):
    side.entry(i)[name] = reordered(side.entry(i)[name])


def written_in_place(side, i, name, rng):
    value = side.entry(i)[name].data if rng.random() < 0.5 else side.entry(i)[name]
    value.copy_(values_like(value, name, rng))


def one_element_written(side, i, name, rng):
    value = side.entry(i)[name]
    if value.numel():
        value[(0,) * value.dim()] = 0.25


def given_other_memory(side, i, name, rng):
    value = side.entry(i)[name]
    value.data = value.data.clone() if rng.random() < 0.5 else values_like(value, name, rng)


def in_other_memory(side, i, name, rng):
    side.entry(i)[name].data = side.entry(i)[name].data.clone()


def given_other_memory_with_the_old_one_kept(side, i, name, rng):
    value = side.entry(i)[name]
    side.kept.append((i, name, value.data))
    value.data = values_like(value, name, rng)


def transposed_over_its_memory(side, i, name, rng):
    value = side.entry(i)[name]
    if value.dim() == 2 and value.shape[0] == value.shape[1]:
        if rng.random() < 0.5:
            value.t_()
        else:
            value.data = value.data.t()


def replaced_with_the_old_one_kept(side, i, name, rng):
    side.kept.append((i, name, side.entry(i)[name]))
    side.entry(i)[name] = values_like(side.entry(i)[name], name, rng)


def moved_through_a_file(side, i, name, rng):
    stream = io.BytesIO()
    torch.save(side.entry(i)[name], stream)
    stream.seek(0)
    side.entry(i)[name] = torch.load(stream)


def a_view_of_a_larger_tensor(side, i, name, rng):
    value = side.entry(i)[name]
    base = torch.cat([torch.full((5,), 3.0, dtype=value.dtype), value.reshape(-1), value.reshape(-1)])
    side.entry(i)[name] = base[5 : 5 + value.numel()].view(value.shape)


TENSOR_EDITS = (
    replaced_by_equal,
    replaced,
    in_another_dtype,
    with_gaps,
    in_another_order,
    written_in_place,
    one_element_written,
    given_other_memory,
    given_other_memory_with_the_old_one_kept,
    transposed_over_its_memory,
    replaced_with_the_old_one_kept,
    moved_through_a_file,
    a_view_of_a_larger_tensor,
)

# Those that count from the next step on where they are made between two passes: fsam_ext/state/watch.py, NOTE [one
# look at places a step].
SEEN_BY_THE_NEXT_STEP = (given_other_memory_with_the_old_one_kept, transposed_over_its_memory)

# ---- Of entries and of all state: (side, rng).


def name_deleted(side, rng):
    i = rng.randrange(len(side.params))
    if side.base is torch.optim.SGD or rng.random() < 0.5:  # torch's Adam fails where a part is missing
        side.entry(i).pop(EMA if rng.random() < 0.5 else "momentum_buffer", None) if side.base in FUSED else None


def entry_deleted(side, rng):
    side.optimizer.state.pop(side.params[rng.randrange(len(side.params))], None)


def entry_cleared(side, rng):
    side.entry(rng.randrange(len(side.params))).clear()


def all_cleared(side, rng):
    side.optimizer.state.clear()


def state_replaced(side, rng):
    old = side.optimizer.state
    side.optimizer.state = defaultdict(dict, old) if rng.random() < 0.7 else defaultdict(dict)


def entry_copied(side, rng):
    i = rng.randrange(len(side.params))
    if side.entry(i):
        side.optimizer.state[side.params[i]] = copy.deepcopy(side.entry(i))


def entry_replaced(side, rng):
    i = rng.randrange(len(side.params))
    clone = rng.random() < 0.5
    if side.entry(i):
        side.optimizer.state[side.params[i]] = {
            k: v.clone() if clone and isinstance(v, Tensor) else v for k, v in side.entry(i).items()
        }


def entry_in_another_order(side, rng):
    i = rng.randrange(len(side.params))
    items = list(side.entry(i).items())
    if items:
        side.entry(i).clear()
        side.optimizer.state[side.params[i]].update(reversed(items))


def state_in_another_order(side, rng):
    items = list(side.optimizer.state.items())
    side.optimizer.state.clear()
    side.optimizer.state.update(reversed(items))


def _alike(side, rng):
    i, j = rng.randrange(len(side.params)), rng.randrange(len(side.params))
    alike = i != j and side.params[i].shape == side.params[j].shape and side.params[i].dtype == side.params[j].dtype
    has_state = alike and all((side.twin or side).entry(k) for k in (i, j))
    return (i, j) if has_state else None


def entries_exchanged(side, rng):
    if pair := _alike(side, rng):
        i, j = (side.params[k] for k in pair)
        state = side.optimizer.state
        state[i], state[j] = state[j], state[i]


def old_one_put_back(side, rng):
    if side.kept:
        i, name, value = side.kept.pop(rng.randrange(len(side.kept)))
        if i < len(side.params) and side.has(i, name) and value.shape == side.entry(i)[name].shape:
            side.entry(i)[name] = value


def kept_let_go(side, rng):
    side.kept.clear()


def all_through_a_file(side, rng):
    stream = io.BytesIO()
    values = [dict(side.entry(i)) for i in range(len(side.params))]
    torch.save(values, stream)
    stream.seek(0)
    for i, entry in enumerate(torch.load(stream)):
        if entry:
            side.optimizer.state[side.params[i]] = entry


def all_given_other_memory(side, rng):
    for i in range(len(side.params)):
        for value in side.entry(i).values():
            if isinstance(value, Tensor):
                value.data = value.data.clone()


def _is_clean(side) -> bool:
    return not side.ours or not side.optimizer.is_perturbed


def all_moved_away_and_back(side, rng):
    """A device that keeps nothing, and copies that a framework has made."""
    if not side.ours:
        return
    copies = [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in side.entry(i).items()}
        for i in range(len(side.params))
    ]
    side.optimizer.move_state("meta")
    for i, entry in enumerate(copies):
        side.entry(i).update(entry)
    side.optimizer.move_state()


def saved_and_loaded(side, rng):
    saved = side.optimizer.state_dict()
    side.load(copy.deepcopy(saved) if rng.random() < 0.5 else saved)


def loaded_into_a_fresh_one(side, rng):
    stream = io.BytesIO()
    torch.save(side.optimizer.state_dict(), stream)
    stream.seek(0)
    groups = [{"params": list(zip(g["param_names"], g["params"]))} for g in side.optimizer.param_groups]
    side.optimizer = side.make(groups)
    side.load(torch.load(stream, weights_only=rng.random() < 0.5))


def loaded_through_a_hook(side, rng):
    names = SHAPED[side.base]

    def halve(optimizer, saved):
        state = {
            key: {n: v * 0.5 if n in names and isinstance(v, Tensor) else v for n, v in entry.items()}
            for key, entry in saved["state"].items()
        }
        return {**saved, "state": state}

    def negate(optimizer):
        for entry in optimizer.state.values():
            if isinstance(entry.get(names[0]), Tensor) and names[0] not in POSITIVE:
                entry[names[0]].neg_()

    handles = [
        side.optimizer.register_load_state_dict_pre_hook(halve),
        side.optimizer.register_load_state_dict_post_hook(negate),
    ]
    side.load(side.optimizer.state_dict())
    for handle in handles:
        handle.remove()


def saved_through_a_hook(side, rng):
    def wrap(optimizer, saved):
        return {"wrapped": saved}

    handle = side.optimizer.register_state_dict_post_hook(wrap)
    saved = side.optimizer.state_dict()["wrapped"]
    handle.remove()
    side.load(saved)


def copied(side, rng):
    pair = (side.params, side.optimizer)
    with nullcontext() if side.ours else side.only_torchs():
        side.params, side.optimizer = copy.deepcopy(pair) if rng.random() < 0.5 else pickle.loads(pickle.dumps(pair))
    side.kept.clear()


def group_added(side, rng):
    if len(side.params) < 6:
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        dtype = side.params[0].dtype
        param = Parameter(torch.randn(rng.choice(SHAPES), generator=generator, dtype=torch.float64).to(dtype))
        side.names.append(f"p{len(side.params)}")
        side.params.append(param)
        side.optimizer.add_param_group({"params": [(side.names[-1], param)], "lr": 0.03})


def frozen_or_not(side, rng):
    param = side.params[rng.randrange(len(side.params))]
    param.requires_grad_(not param.requires_grad)


def weights_written(side, rng):
    with torch.no_grad():
        side.params[rng.randrange(len(side.params))].mul_(0.75)


def weights_in_other_memory(side, rng):
    param = side.params[rng.randrange(len(side.params))]
    param.data = param.data.clone()


def weights_in_another_order(side, rng):
    param = side.params[rng.randrange(len(side.params))]
    param.grad, param.data = None, reordered(param.data)


def parameter_replaced(side, rng):
    """The recipe of those who grow models: another Parameter, and the state moves to it."""
    i = rng.randrange(len(side.params))
    old, new = side.params[i], Parameter(side.params[i].detach().clone())
    side.params[i] = new
    for group in side.optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if old in side.optimizer.state:
        side.optimizer.state[new] = side.optimizer.state.pop(old)


def pruned_and_grown(side, rng):
    """Rows are dropped and others added: every tensor of the state is indexed and concatenated."""
    i = rng.randrange(len(side.params))
    old = side.params[i]
    if old.dim() != 2:
        return
    rows = torch.tensor([rng.randrange(old.shape[0]) for _ in range(rng.randrange(1, 5))])
    more = rng.randrange(3)

    def changed(value):
        start = torch.nan if bool(value.isnan().all()) else 0.0  # state of ours that has seen no gradient is NaN
        return torch.cat([value[rows], torch.full((more, old.shape[1]), start, dtype=value.dtype)])

    new = side.params[i] = Parameter(changed(old.detach()))
    for group in side.optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    entry = side.optimizer.state.pop(old, None)
    if entry is not None:
        side.optimizer.state[new] = {k: changed(v) if v.dim() == 2 else v for k, v in entry.items()}


def parameters_reordered(side, rng):
    group = rng.choice(side.optimizer.param_groups)
    group["params"].reverse()
    group["param_names"].reverse()


def lr_edited(side, rng):
    rng.choice(side.optimizer.param_groups)["lr"] = rng.choice((0.0, 0.01, 0.1))


def base_option_edited(side, rng):
    group = rng.choice(side.optimizer.param_groups)
    group["weight_decay"] = rng.choice((0.0, 0.1))
    if "maximize" in group:
        group["maximize"] = rng.random() < 0.5
    if "betas" in group:
        group["betas"] = rng.choice(((0.9, 0.999), (0.5, 0.75)))
    if side.base is torch.optim.SGD:
        group["momentum"] = rng.choice((0.0, 0.5, 0.9))
        group["nesterov"] = group["momentum"] > 0 and not group["dampening"] and rng.random() < 0.5


# At any moment; only where no weights are perturbed; only between steps.
STATE_EDITS = (
    name_deleted,
    entry_deleted,
    entry_cleared,
    all_cleared,
    state_replaced,
    entry_replaced,
    entry_in_another_order,
    state_in_another_order,
    entries_exchanged,
    old_one_put_back,
    old_one_put_back,
    kept_let_go,
    all_through_a_file,
    all_given_other_memory,
    lr_edited,
    base_option_edited,
)
REST_EDITS = (all_moved_away_and_back, saved_and_loaded, loaded_through_a_hook, saved_through_a_hook, weights_written)
BETWEEN_EDITS = (
    loaded_into_a_fresh_one,
    copied,
    group_added,
    frozen_or_not,
    weights_in_other_memory,
    weights_in_another_order,
    parameter_replaced,
    pruned_and_grown,
    parameters_reordered,
)
