"""Accelerate's loop with TwoPass, against the two passes written by hand."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from fsam_ext import FriendlySAM

from .reference import (
    SIZE,
    RandomStates,
    batches,
    difference,
    loss_of,
    network,
    perturbed_in_part,
    rows,
    train,
    warming,
)

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed

from fsam_ext.integrations.accelerate import TwoPass


@pytest.fixture(autouse=True)
def _one_accelerator_a_test():
    reset()
    yield
    reset()


def reset():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def made(model, base=SGD, groups=nn.Module.parameters, **options):
    options = {"rho": 0.1} | ({"lr": 0.1, "momentum": 0.9} if base is SGD else {}) | options
    return FriendlySAM(groups(model), base, **options)


def decay(optimizer):
    return LambdaLR(optimizer, lambda step: 0.8**step)


def loader():
    """Its generator is its own: starting it again, to go on in mid-epoch, draws nothing that dropout would draw."""
    return DataLoader(rows(), batch_size=SIZE, generator=torch.Generator())


def looped(model, optimizer, *, opens=False, clip=None, accelerator=None, epochs=1, scheduler=None, **options):
    """Accelerate's loop: (losses, accelerator, what prepare() made of the optimizer)."""
    accelerator = accelerator or Accelerator(cpu=True, **options)
    model, optimizer, data = accelerator.prepare(model, optimizer, loader())
    scheduler = None if scheduler is None else accelerator.prepare(scheduler)
    step = TwoPass(accelerator, model, optimizer, loss_of, clip=clip)
    losses = []
    for _ in range(epochs):
        for batch in data:
            with accelerator.accumulate(model) if opens else nullcontext():
                losses.append(step(batch).item())
                if scheduler is not None:
                    scheduler.step()
    return losses, accelerator, optimizer


CASES = {
    "plain": ({}, {}, {}, {}),
    "AdamW": ({"base": AdamW}, {}, {}, {}),
    "accumulate 4": ({}, {}, {"gradient_accumulation_steps": 4}, {"accumulate": 4}),
    "accumulate 3 over 8": ({}, {}, {"gradient_accumulation_steps": 3}, {"accumulate": 3}),
    "accumulate 4, in the loop": ({}, {}, {"gradient_accumulation_steps": 4, "opens": True}, {"accumulate": 4}),
    "clip": ({}, {}, {"clip": 0.1}, {"clip": 0.1}),
    "BatchNorm": ({}, {"batch_norm": True}, {"gradient_accumulation_steps": 2}, {"accumulate": 2}),
    "every=2": ({"every": 2}, {}, {}, {}),
    "start=3": ({"start": 3}, {}, {"gradient_accumulation_steps": 2}, {"accumulate": 2}),
    "rho warm-up": ({"rho": warming}, {}, {}, {"rho": warming}),
    "rho warm-up, accumulate 3": (
        {"rho": warming},
        {},
        {"gradient_accumulation_steps": 3},
        {"rho": warming, "accumulate": 3},
    ),
    "every=2, reuse=0.3": ({"every": 2, "reuse": 0.3}, {}, {}, {}),
    "perturb=False": ({"groups": perturbed_in_part}, {}, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_by_hand(case, record):
    options, layers, theirs, by_hand = CASES[case]
    ours, reference = network(**layers), network(**layers)
    losses, _, _ = looped(ours, made(ours, **options), epochs=2, **theirs)
    clean = train(reference, made(reference, **options), batches(), epochs=2, **by_hand)
    assert losses == clean
    record("accelerate", case, difference(ours, reference))


def test_dropout_has_the_masks_of_the_first_pass(record):
    ours, reference = network(dropout=0.5), network(dropout=0.5)
    optimizer = made(ours)
    states = RandomStates(ours[0], lambda: optimizer.is_perturbed)
    losses, _, _ = looped(ours, optimizer, gradient_accumulation_steps=2)
    assert losses == train(reference, made(reference), batches(), accumulate=2, states=states)
    record("accelerate", "dropout", difference(ours, reference))


def test_learning_rates(record):
    ours, reference = network(), network()
    optimizer, plain = made(ours), made(reference)
    looped(ours, optimizer, scheduler=decay(optimizer), gradient_accumulation_steps=2, epochs=2)
    train(reference, plain, batches(), scheduler=decay(plain), accumulate=2, epochs=2)
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"] < 0.1
    record("accelerate", "scheduler", difference(ours, reference))


def in_16_bits(dtype, model, batch):
    """As Accelerate has it: the forward pass is cast, its output is float32 again."""
    with torch.autocast("cpu", dtype):
        output = model(batch[0])
    return cross_entropy(output.float(), batch[1])


def test_bfloat16(record):
    ours, reference = network(), network()
    losses, _, _ = looped(ours, made(ours), mixed_precision="bf16", clip=0.1)
    clean = train(reference, made(reference), batches(), loss=partial(in_16_bits, torch.bfloat16), clip=0.1)
    assert losses == clean != train(network(), made(network()), batches())
    record("accelerate", "bf16", difference(ours, reference))


class Overflowing:
    """A loss that is infinite in one of the forward passes of a training, counted from 0."""

    def __init__(self, number):
        self.calls, self.number = 0, number

    def __call__(self, model, batch):
        self.calls += 1
        return loss_of(model, batch) * (torch.inf if self.calls - 1 == self.number else 1)


@pytest.mark.parametrize("clip", (None, 0.1), ids=("", "clip"))
@pytest.mark.parametrize("overflow", (None, 6, 7), ids=("", "inf in the first pass", "inf in the second pass"))
def test_a_gradscaler(overflow, clip, record):
    """Accelerate has one for float16, which it makes on GPUs only: here it is given one of the CPU."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=1024.0), True
    accelerator.state._mixed_precision = "fp16"
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ours, reference = network(), network()
    optimizer = accelerator.prepare(made(ours))
    step = TwoPass(accelerator, ours, optimizer, Overflowing(overflow), clip=clip)
    train(reference, made(reference), batches(), grad_scaler=scaler, clip=clip, loss=Overflowing(overflow))
    for batch in batches():
        step(batch)
    assert accelerator.scaler.get_scale() == scaler.get_scale() == (1024.0 if overflow is None else 512.0)
    kind = "" if overflow is None else ", inf in " + ("first" if overflow == 6 else "second")
    record("accelerate", f"GradScaler{kind}{', clip' if clip else ''}", difference(ours, reference))


@pytest.mark.parametrize("options", ({}, {"rho": warming}, {"every": 3, "reuse": 0.3}), ids=", ".join)
def test_save_state_and_load_state(options, tmp_path, record):
    """Stopped in mid-epoch, and gone on with in new objects."""
    reference = network(dropout=0.5)
    whole = made(reference, AdamW, **options)
    set_seed(0)
    expected, _, _ = looped(reference, whole, scheduler=decay(whole))
    reset()

    def begun():
        model = network(dropout=0.5)
        optimizer = made(model, AdamW, **options)
        accelerator = Accelerator(cpu=True)
        prepared = accelerator.prepare(model, optimizer, loader(), decay(optimizer))
        return model, accelerator, prepared, TwoPass(accelerator, prepared[0], prepared[1], loss_of)

    _, accelerator, (_, _, data, scheduler), step = begun()
    set_seed(0)
    losses = []
    for number, batch in enumerate(data):
        losses.append(step(batch).item())
        scheduler.step()
        if number == 3:
            accelerator.save_state(tmp_path)
            break
    reset()
    model, accelerator, (_, _, data, scheduler), step = begun()
    accelerator.load_state(tmp_path)
    for batch in accelerator.skip_first_batches(data, 4):
        losses.append(step(batch).item())
        scheduler.step()
    assert losses == expected
    record("accelerate", ", ".join(["save_state, load_state", *options]), difference(model, reference))


def test_nothing_is_saved_in_a_second_pass(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*(lambda model: (model, made(model)))(network()))

    def saves(model, batch):
        if optimizer.optimizer.is_perturbed:
            accelerator.save_state(tmp_path)
        return loss_of(model, batch)

    with pytest.raises(RuntimeError, match="while the weights are perturbed"):
        TwoPass(accelerator, model, optimizer, saves)(batches()[0])
    assert not optimizer.optimizer.is_perturbed


@pytest.mark.parametrize("perturbed", (False, True), ids=("first pass", "second pass"))
def test_a_step_that_raises_leaves_nothing_behind(perturbed):
    """An out-of-memory error that the loop catches, say."""
    ours, reference = network(), network()
    optimizer, plain, failing = made(ours), made(reference), []

    def loss(model, batch):
        if failing and optimizer.is_perturbed == perturbed:
            raise MemoryError
        return loss_of(model, batch)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    step = TwoPass(accelerator, *accelerator.prepare(ours, optimizer), loss)
    data = batches()
    for batch in data[:3]:
        step(batch)
    failing.append(True)
    with pytest.raises(MemoryError):
        step(data[3])
    failing.clear()
    for batch in data[4:]:
        step(batch)
    train(reference, plain, data[:2], accumulate=2)
    if perturbed:  # the average has seen the first gradient of the step that was given up
        plain.zero_grad()
        for batch in data[2:4]:
            (loss_of(reference, batch) / 2).backward()
        plain.first_step()
        plain.restore()
    train(reference, plain, data[4:], accumulate=2)
    assert difference(ours, reference) == 0


def test_an_exception_between_the_second_pass_and_the_update_restores_the_weights():
    """In the user's hook, or by Ctrl-C."""
    model, before = network(), network()
    accelerator = Accelerator(cpu=True)
    step = TwoPass(accelerator, *accelerator.prepare(model, optimizer := made(model)), loss_of)

    def interrupt(*_):
        assert optimizer.is_perturbed
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(batches()[0])
    assert difference(model, before) == 0 and not optimizer.is_perturbed
    handle.remove()
    step(batches()[1])
    assert difference(model, before) > 0


def test_two_models_with_an_optimizer_each():
    """As in a GAN: the loop opens accumulate once for both."""
    pairs = [(network(), network(batch_norm=True)) for _ in range(2)]
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    models = pairs[0]
    prepared = [accelerator.prepare(model, made(model)) for model in models]
    steps = [TwoPass(accelerator, *pair, loss_of) for pair in prepared]
    for batch in batches():
        with accelerator.accumulate(*models):
            for step in steps:
                step(batch)
    for ours, reference in zip(*pairs):
        train(reference, made(reference), batches(), accumulate=2)
        assert difference(ours, reference) == 0


def test_what_an_ascent_measured_is_for_the_log():
    model = network()
    accelerator = Accelerator(cpu=True)
    step = TwoPass(accelerator, *accelerator.prepare(model, made(model)), loss_of)
    assert step.stats()["fsam/noise_norm"].isnan()
    step(batches()[0])
    assert set(step.stats()) >= {"fsam/noise_norm", "fsam/grad_norm", "fsam/cosine", "fsam/found_inf"}
    assert step.stats()["fsam/grad_norm"] > 0


def test_bad_input():
    accelerator = Accelerator(cpu=True)
    model = network()
    optimizer = made(model)
    with pytest.raises(TypeError, match=r"must be what accelerator.prepare\(\) returned, not a bare FriendlySAM"):
        TwoPass(accelerator, model, optimizer, loss_of)
    prepared = accelerator.prepare(optimizer)
    with pytest.raises(TypeError, match="optimizer must be one optimizer, not 2"):
        TwoPass(accelerator, model, [prepared, prepared], loss_of)
    with pytest.raises(TypeError, match="optimizer must be a fsam_ext.FriendlySAM or SAM, not SGD"):
        TwoPass(accelerator, model, accelerator.prepare(SGD(model.parameters(), lr=0.1)), loss_of)
    with pytest.raises(TypeError, match="a batch of type generator is used up by the first pass"):
        TwoPass(accelerator, model, prepared, loss_of)(x for x in batches())
