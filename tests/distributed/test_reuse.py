"""Reuse of second gradients on several ranks: its norm and products are over all of them, and v lies in shards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..conformance import every_pair, identical
from .ranks import run
from .test_communication import model_of
from .test_fsdp import sharded
from .training import batches, distance, make, network, state_vector, train, train_alone, wide_network

STEPS, HALF = 12, 5
OPTIONS = {"every": 3, "reuse": 0.4}


def trained(kind, base, options):
    model, part = model_of(kind)
    optimizer = make(model, base, **OPTIONS, **options)
    history = train(model, optimizer, batches(STEPS), part=part)
    return history, state_vector(optimizer, "fsam_reuse"), float(optimizer.param_groups[0]["fsam_reuse_sq"])


@every_pair(
    kind__world=[("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("fsdp_x_tp", 4), ("tp", 2)],
    base=["sgd", "adamw"],
    options=[{}, {"sigma": 0.0}],
)
def test_equals_one_process_with_the_whole_batch(kind, world, base, options):
    results = run(world, trained, kind, base, options)
    alone, optimizer = train_alone(batches(STEPS), base, wide_network() if "tp" in kind else None, **OPTIONS, **options)
    for history, v, norm_sq in results:
        assert identical(history, results[0][0])
        assert distance(history, alone) < 1e-12
        assert distance(v, state_vector(optimizer, "fsam_reuse")) < 1e-10
        assert norm_sq == results[0][2] == pytest.approx(float(optimizer.param_groups[0]["fsam_reuse_sq"]), rel=1e-9)


def with_a_group_left_out(model):
    params = list(model.parameters())
    return make(Groups([{"params": params[:2], "perturb": False}, {"params": params[2:]}]), "sgd", **OPTIONS)


class Groups(list):
    """Groups in the place of a model's parameters."""

    def parameters(self):
        return list(self)


def partly(kind):
    model, part = model_of(kind)
    return train(model, with_a_group_left_out(model), batches(STEPS), part=part)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_group_that_is_not_perturbed(kind):
    model = network()
    alone = train(model, with_a_group_left_out(model), batches(STEPS), part=lambda batch: batch)
    for history in run(2, partly, kind):
        assert distance(history, alone) < 1e-12


def states_of(model, optimizer, options):
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def save(path, flat):
    model, options = sharded(), StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizer = make(model, "sgd", **OPTIONS)
    train(model, optimizer, batches(HALF))
    dcp.save(states_of(model, optimizer, options), checkpoint_id=path)
    return train(model, optimizer, batches(HALF, first=HALF))


def resume(path, flat):
    model, options = sharded(), StateDictOptions(flatten_optimizer_state_dict=flat)
    optimizer = make(model, "sgd", **OPTIONS)
    states = states_of(model, optimizer, options)
    dcp.load(states, checkpoint_id=path)
    set_model_state_dict(model, states["model"])
    set_optimizer_state_dict(model, optimizer, states["optimizer"], options=options)
    return train(model, optimizer, batches(HALF, first=HALF))


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_saved_on_two_ranks_and_resumed_on_others(tmp_path, flat):
    (went_on, _) = run(2, save, str(tmp_path / "it"), flat)
    for world in (2, 3):
        for history in run(world, resume, str(tmp_path / "it"), flat):
            assert identical(history, went_on) if world == 2 else distance(history, went_on) < 1e-12
    assert torch.isfinite(went_on).all()
