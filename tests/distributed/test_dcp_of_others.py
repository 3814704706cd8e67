"""fsam_ext.checkpoint.LoadPlanner: distributed checkpoints of plain optimizers, other SAM code and earlier formats."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fsam_ext import SAM, FriendlySAM
from fsam_ext.checkpoint import LoadPlanner
from fsam_ext.state.keys import FORMER_NAMES

from ..conformance import identical
from .ranks import run
from .test_fsdp import sharded
from .training import AdamW, backward, batches, network, shard, train, whole

HOW = {"nested": {}, "flattened": {"flatten_optimizer_state_dict": True}, "offloaded": {"cpu_offload": True}}
OFFICIAL = {"rho", "adaptive", "lr", "betas", "eps", "weight_decay", "amsgrad", "foreach", "maximize", "capturable"}
OFFICIAL |= {"differentiable", "fused", "decoupled_weight_decay", "params"}


def state_of(optimizer):
    """All state, whole, by the parameter's number and the state's name."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {
        f"{number}.{name}": whole(value)
        for number, param in enumerate(params)
        for name, value in optimizer.state[param].items()
    }


def plain_adamw(model, options):
    optimizer = AdamW(model.parameters(), lr=0.02)
    for batch in batches(3):
        backward(model, shard(batch) if torch.distributed.is_initialized() else batch)
        optimizer.step()
        optimizer.zero_grad()
    return get_optimizer_state_dict(model, optimizer, options=options), state_of(optimizer)


def of_ours(model, options, cls=FriendlySAM):
    optimizer = cls(model.parameters(), AdamW, lr=0.02, rho=0.3)
    train(model, optimizer, batches(3), part=shard if torch.distributed.is_initialized() else lambda batch: batch)
    return get_optimizer_state_dict(model, optimizer, options=options), state_of(optimizer)


def sam(model, options):
    return of_ours(model, options, SAM)


def renamed(state_dict, names, keep=lambda part, name: True, more=lambda part, name, value: {}):
    """A state_dict, nested or flattened, in which names of state and options differ."""

    def entry(part, items):
        kept = {name: value for name, value in items if keep(part, name)}
        added = {k: v for name, value in items for k, v in more(part, name, value).items()}
        return {names.get(name, name): value for name, value in kept.items()} | added

    if "state" in state_dict:
        return {
            "state": {key: entry("state", list(items.items())) for key, items in state_dict["state"].items()},
            "param_groups": [entry("param_groups", list(group.items())) for group in state_dict["param_groups"]],
        }
    result = {}
    for key, value in state_dict.items():
        prefix, _, name = key.rpartition(".")
        items = entry(key.partition(".")[0], [(name, value)])
        result.update({f"{prefix}.{new}": new_value for new, new_value in items.items()})
    return result


def earlier_format(model, options):
    saved, state = of_ours(model, options)
    names = {ours: former for former, ours in FORMER_NAMES.items()}
    return renamed(saved, names, keep=lambda part, name: name != "fsam_format"), state


def official(model, options):
    """What github.com/nblt/F-SAM has in its state_dict: nothing of the base optimizer's state."""
    saved, state = of_ours(model, options)

    def others(part, name, value):
        return {"old_p": value, "first_grad": value.clone()} if name == "fsam_ema" else {}

    keep = {"state": {"fsam_ema"}, "param_groups": OFFICIAL}
    state = {name: value for name, value in state.items() if name.endswith("fsam_ema")}
    return renamed(saved, {"fsam_ema": "momentum"}, lambda part, name: name in keep[part], others), state


WRITERS = {"adamw": plain_adamw, "sam": sam, "earlier format": earlier_format, "official": official, "ours": of_ours}


def load(path, model, optimizer, options, planner):
    template = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.load(template, checkpoint_id=path, planner=planner)
    set_optimizer_state_dict(model, optimizer, template["optimizer"], options=options)


def written_and_loaded(path, writer, how, model_of=sharded, used=False):
    options = StateDictOptions(**HOW[how])
    saved, state = WRITERS[writer](model_of(), options)
    dcp.save({"optimizer": saved}, checkpoint_id=path)
    model = model_of()
    optimizer = FriendlySAM(model.parameters(), AdamW, lr=1.0, rho=0.7, lmbda=0.6)
    if used:
        part = shard if torch.distributed.is_initialized() else lambda batch: batch
        train(model, optimizer, batches(1), part=part)
    missing, spare = "", model_of()
    try:
        load(path, spare, FriendlySAM(spare.parameters(), AdamW), options, None)
    except dcp.api.CheckpointException as error:
        missing = str(error)
    load(path, model, optimizer, options, LoadPlanner())
    group = {name: optimizer.param_groups[0][name] for name in ("lr", "rho", "lmbda", "fsam_format")}
    return state, state_of(optimizer), group, missing


def check(writer, state, loaded, group, missing):
    empty = {name for name, value in loaded.items() if value.numel() == 0}
    for name, value in loaded.items():
        if name in state:
            assert identical(value, state[name]), name
        elif name.endswith("fsam_ema"):
            assert value.isnan().all() and name not in empty
        else:  # the official code saves no state of the base
            assert writer == "official" and not value.any(), name
    assert set(state) <= set(loaded)
    assert any(name.endswith("fsam_ema") for name in loaded)
    rho, lmbda = (0.7, 0.6) if writer == "adamw" else (0.3, 0.9)
    assert group == {"lr": 0.02, "rho": rho, "lmbda": 0.6 if writer == "official" else lmbda, "fsam_format": 2}
    assert ("Missing key in checkpoint state_dict" in missing) == (writer != "ours")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("writer", WRITERS)
def test_on_two_ranks(writer, how, tmp_path):
    for state, loaded, group, missing in run(2, written_and_loaded, str(tmp_path / "checkpoint"), writer, how):
        check(writer, state, loaded, group, missing)


@pytest.mark.parametrize("how", ["nested", "flattened"])
@pytest.mark.parametrize("writer", WRITERS)
def test_into_an_optimizer_that_has_trained(writer, how, tmp_path):
    """Nothing of its own state is left."""
    check(writer, *written_and_loaded(tmp_path / "checkpoint", writer, how, network, used=True))


def test_anything_else_that_is_missing_is_torchs_error(tmp_path):
    model = network()
    saved, _ = of_ours(model, StateDictOptions())
    del saved["state"]["0.weight"]["exp_avg"]
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
    optimizer = FriendlySAM(model.parameters(), AdamW)
    with pytest.raises(dcp.api.CheckpointException, match=r"Missing key .*optimizer.state.0.weight.exp_avg\."):
        load(tmp_path, model, optimizer, StateDictOptions(), LoadPlanner())


@pytest.mark.parametrize("how", ["nested", "flattened"])
def test_masters_that_a_checkpoint_lacks_are_made_from_the_weights(how, tmp_path):
    options = StateDictOptions(**HOW[how])
    model = network(torch.bfloat16)
    optimizer = SAM(model.parameters(), AdamW)
    train(model, optimizer, batches(2, torch.bfloat16), part=lambda batch: batch)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
    other = network(torch.bfloat16)
    optimizer = FriendlySAM(other.parameters(), AdamW, master_weights=True, ema_dtype=torch.int8)
    load(tmp_path, other, optimizer, options, LoadPlanner())
    assert not any("fsam_master" in entry for entry in optimizer.state.values())
    other.load_state_dict(model.state_dict())  # after the optimizer
    assert optimizer.param_groups[0]["sigma"] == 0  # options are the checkpoint's
    optimizer.param_groups[0]["sigma"] = 1.0
    before = [param.detach().float() for param in other.parameters()]
    backward(other, batches(1, torch.bfloat16)[0])
    optimizer.first_step()
    optimizer.restore()
    for param, weight in zip(other.parameters(), before, strict=True):
        assert identical(optimizer.state[param]["fsam_master"], weight)
        assert not optimizer.state[param]["fsam_ema_scale"].isnan().any()


@pytest.mark.parametrize("how", ["nested", "flattened"])
def test_averages_of_another_dtype(how, tmp_path):
    """float32 to int8 is quantised; int8 to float32 is refused, because the codes alone would be read."""
    options = StateDictOptions(**HOW[how])
    model = network(torch.float32)
    optimizer = FriendlySAM(model.parameters(), AdamW)
    train(model, optimizer, batches(2, torch.float32), part=lambda batch: batch)
    small = FriendlySAM(model.parameters(), AdamW, ema_dtype=torch.int8)
    small.load_state_dict(optimizer.state_dict())
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path / "f")
    dcp.save({"optimizer": get_optimizer_state_dict(model, small, options=options)}, checkpoint_id=tmp_path / "i")
    again = FriendlySAM(model.parameters(), AdamW, ema_dtype=torch.int8)
    load(tmp_path / "f", model, again, options, LoadPlanner())
    wanted = state_of(small)
    assert all(identical(value, wanted[name]) for name, value in state_of(again).items())
    with pytest.raises(dcp.api.CheckpointException, match="is int8 in the checkpoint and torch.float32 in the"):
        load(tmp_path / "i", model, FriendlySAM(model.parameters(), AdamW), options, LoadPlanner())


@pytest.mark.parametrize("how", ["nested", "flattened"])
def test_an_option_of_the_base_with_a_name_of_ours(how, tmp_path):
    """Adadelta has a rho."""
    options = StateDictOptions(**HOW[how])
    model = network()
    alone = torch.optim.Adadelta(model.parameters(), rho=0.8)
    dcp.save({"optimizer": get_optimizer_state_dict(model, alone, options=options)}, checkpoint_id=tmp_path)
    optimizer = FriendlySAM(model.parameters(), torch.optim.Adadelta, rho=0.3)
    load(tmp_path, model, optimizer, options, LoadPlanner())
    assert [optimizer.param_groups[0][name] for name in ("rho", "base_rho")] == [0.3, 0.8]


PLACES = {
    "alone": lambda state_dict: state_dict,
    "by a name": lambda state_dict: {"optimizer": state_dict},
    "in a dict called state": lambda state_dict: {"state": {"model": {"w": torch.ones(2)}, "optimizer": state_dict}},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", ["nested", "flattened"])
@pytest.mark.parametrize("base", [AdamW, torch.optim.Adadelta, torch.optim.RMSprop])
def test_wherever_it_is_in_the_checkpoint(base, how, place, tmp_path):
    """Two groups, and an lr that is a tensor: torch then names each option for itself."""
    options = StateDictOptions(**HOW[how])
    model = network()
    params = list(model.parameters())

    def groups():
        return [{"params": params[:2], "lr": torch.tensor(0.1)}, {"params": params[2:], "lr": torch.tensor(0.2)}]

    alone = base(groups())
    backward(model, batches(1)[0])
    alone.step()
    alone.zero_grad()
    saved = get_optimizer_state_dict(model, alone, options=options)
    dcp.save(PLACES[place](saved), checkpoint_id=tmp_path)
    optimizer = FriendlySAM([{**group, "lr": torch.tensor(1.0)} for group in groups()], base, rho=0.3)
    template = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.load(PLACES[place](template), checkpoint_id=tmp_path, planner=LoadPlanner())
    set_optimizer_state_dict(model, optimizer, template, options=options)
    loaded = state_of(optimizer)
    assert all(identical(loaded.pop(name), value) for name, value in state_of(alone).items())
    assert loaded and all(value.isnan().all() for value in loaded.values())
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.1, 0.2])
    assert [group["rho"] for group in optimizer.param_groups] == [0.3, 0.3]


@pytest.mark.parametrize("how", ["nested", "flattened"])
def test_an_average_of_the_papers_form_starts_at_zero(how, tmp_path):
    options = StateDictOptions(**HOW[how])
    model = network()
    saved, _ = plain_adamw(model, options)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
    optimizer = FriendlySAM(model.parameters(), AdamW, ema="updated")
    load(tmp_path, model, optimizer, options, LoadPlanner())
    assert not any(value.any() for name, value in state_of(optimizer).items() if name.endswith("fsam_ema"))


def test_the_package_does_not_import_distributed_checkpoints():
    script = "import sys, fsam_ext, fsam_ext.convert; print('torch.distributed.checkpoint' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
