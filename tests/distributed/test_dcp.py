"""torch.distributed.checkpoint: saved on 2 ranks, resumed on 1, 2, 3 and 4, and the guard that it has to get past."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fsam_ext import SAM, FriendlySAM

from ..conformance import identical
from .ranks import run
from .test_fsdp import sharded
from .training import BASES, batches, distance, make, network, state_vector, train, vector

OPTIONS = {
    "sharded": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full_from_rank_0": {"full_state_dict": True, "cpu_offload": True},
}
HALF = 5


def everything(model, optimizer):
    names = {name for entry in optimizer.state.values() for name in entry if name != "step"}
    steps = [float(entry["step"]) for entry in optimizer.state.values() if "step" in entry]
    return {
        **{name: state_vector(optimizer, name) for name in sorted(names)},
        "step": torch.tensor(steps),
        "weights": vector(model.parameters()),
    }


def save(path, base, how):
    model = sharded()
    optimizer = make(model, base)
    train(model, optimizer, batches(HALF))
    options = StateDictOptions(**OPTIONS[how])
    states = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    if how.startswith("full"):
        if dist.get_rank() == 0:
            torch.save(states, path)
        dist.barrier()
    else:
        dcp.save(states, checkpoint_id=path)
    saved = everything(model, optimizer)
    return saved, train(model, optimizer, batches(HALF, first=HALF)), everything(model, optimizer)


def resume(path, base, how):
    model = sharded()
    optimizer = make(model, base, rho=0.7, lr=1.0)  # to be replaced
    for param in model.parameters():
        torch.nn.init.zeros_(param)
    options = dict(OPTIONS[how])
    if how.startswith("full"):
        if how == "full_from_rank_0":
            options = {"full_state_dict": True, "broadcast_from_rank0": True}
        states = {"model": {}, "optimizer": {}}
        if how == "full" or dist.get_rank() == 0:
            states = torch.load(path, weights_only=True)
    else:
        options = StateDictOptions(**options)
        states = {
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }
        dcp.load(states, checkpoint_id=path)
    options = options if isinstance(options, StateDictOptions) else StateDictOptions(**options)
    set_model_state_dict(model, states["model"], options=options)
    set_optimizer_state_dict(model, optimizer, states["optimizer"], options=options)
    loaded = everything(model, optimizer)
    return loaded, train(model, optimizer, batches(HALF, first=HALF)), everything(model, optimizer)


@pytest.mark.parametrize(
    "base, how", [("sgd", "sharded"), ("rmsprop", "sharded"), *(("adamw", how) for how in OPTIONS)]
)
def test_saved_on_2_ranks(base, how, tmp_path):
    path = str(tmp_path / "checkpoint")
    saved, history, end = run(2, save, path, base, how)[0]
    for world in (2, 1, 3, 4) if how == "sharded" else (2, 3):
        for loaded, again, last in run(world, resume, path, base, how):
            assert loaded.keys() == saved.keys()
            assert all(identical(loaded[name], saved[name]) for name in saved)
            if world == 2:  # 5 + 5 steps are 10 steps
                assert identical(again, history)
                assert all(identical(last[name], end[name]) for name in end)
            else:  # other shards, other order of the norm's sums
                assert distance(again, history) < 1e-12


def asked_for_state(base):
    model = sharded()
    optimizer = make(model, base)
    before = vector(model.parameters())
    get_optimizer_state_dict(model, optimizer)
    made = everything(model, optimizer)
    assert identical(vector(model.parameters()), before)
    data = batches(HALF)
    history = train(model, optimizer, data)
    fresh = sharded()
    return made, history, train(fresh, make(fresh, base), data)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_state_that_was_only_made_has_seen_no_gradient(base):
    for made, history, undisturbed in run(2, asked_for_state, base):
        assert made["fsam_ema"].isnan().all()
        assert identical(history, undisturbed)


@pytest.mark.parametrize("cls", [FriendlySAM, SAM])
@pytest.mark.parametrize("base", BASES)
def test_a_forgotten_ascent_still_raises(base, cls):
    """Zero gradients alone, or an lr of 0 alone (a warm-up starts like this), are no request for state."""
    torch_base, kwargs = BASES[base]
    for zero, lr in ((True, kwargs["lr"]), (False, 0.0)):
        model = network()
        optimizer = cls(model.parameters(), torch_base, **{**kwargs, "lr": lr})
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        if not zero:
            list(model.parameters())[-1].grad.fill_(1e-300)
        with pytest.raises(RuntimeError, match="without first_step"):
            optimizer.step()
    optimizer = cls(model.parameters(), torch_base, **{**kwargs, "lr": 0.0})
    list(model.parameters())[0].grad = None
    with pytest.raises(RuntimeError, match="without first_step"):
        optimizer.step()
