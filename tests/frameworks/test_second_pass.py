"""A loop of one's own with SecondPass, against the two passes written by hand: options by step and by group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fsam_ext import FriendlySAM, SecondPass

from .reference import RandomStates, batches, difference, loss_of, network, perturbed_in_part, train, warming


def made(model, groups=nn.Module.parameters, **options):
    return FriendlySAM(groups(model), torch.optim.AdamW, **{"rho": 0.1, "lr": 0.01, **options})


def looped(model, optimizer, accumulate=1, epochs=2, first=0, last=None):
    """The loop of the docs, over the steps from ``first`` on and before ``last``."""
    second_pass = SecondPass(optimizer, model)
    data = batches() * epochs

    def backward(batch):
        (loss_of(model, batch) / accumulate).backward()

    windows = [data[at : at + accumulate] for at in range(0, len(data), accumulate)]
    for window in windows[first:last]:
        optimizer.zero_grad()

        for batch in window:
            second_pass.keep(batch)
            backward(batch)
        second_pass.run(backward)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


OPTIONS = {
    "rho warm-up": {"rho": warming},
    "every=2, reuse=0.3": {"every": 2, "reuse": 0.3},
    "rho warm-up, every=3, reuse=0.3": {"rho": warming, "every": 3, "reuse": 0.3},
    "perturb=False": {"groups": perturbed_in_part},
}


def by_hand(options, accumulate, states=()):
    model = network(dropout=0.5, batch_norm=True)
    how = {"epochs": 2, "accumulate": accumulate, "clip": 0.5, "states": states, "rho": options.get("rho")}
    train(model, made(model, **options), batches(), **how)
    return model


@pytest.mark.parametrize("accumulate", (1, 4))
@pytest.mark.parametrize("case", OPTIONS)
def test_equals_the_loop_by_hand(case, accumulate, record):
    model = network(dropout=0.5, batch_norm=True)
    optimizer = made(model, **OPTIONS[case])
    states = RandomStates(model[0], lambda: optimizer.is_perturbed)
    looped(model, optimizer, accumulate)
    reference = by_hand(OPTIONS[case], accumulate, states)
    record("torch", f"SecondPass, {case}, accumulate {accumulate}", difference(model, reference))


@pytest.mark.parametrize("case", OPTIONS)
def test_resumed(case, tmp_path, record):
    """In the middle of a warm-up, and between two ascents."""
    whole, first, rest = network(), network(), network()
    looped(whole, made(whole, **OPTIONS[case]))
    saved = made(first, **OPTIONS[case])
    looped(first, saved, last=5)
    torch.save((first.state_dict(), saved.state_dict()), tmp_path / "it.pt")
    optimizer = made(rest, **OPTIONS[case])
    for one, state in zip((rest, optimizer), torch.load(tmp_path / "it.pt", weights_only=True)):
        one.load_state_dict(state)
    looped(rest, optimizer, first=5)
    record("torch", f"SecondPass, {case}, resumed", difference(rest, whole))


@pytest.mark.parametrize("case", OPTIONS)
def test_these_options_make_a_difference(case):
    """So a loop that missed one would be seen."""
    model, plain = network(), network()
    train(model, made(model, **OPTIONS[case]), batches(), rho=OPTIONS[case].get("rho"))
    train(plain, made(plain), batches())
    assert difference(model, plain) > 1e-4
