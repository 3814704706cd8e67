"""timm's optimizer factory, and its training loop with TwoPassScaler, against the two passes written by hand."""

from __future__ import annotations

import argparse
import copy
import csv
import gc
from contextlib import nullcontext, suppress
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW

from fsam_ext import SAM, FriendlySAM

from ..distributed.ranks import run
from . import torchvision_on_cpu  # noqa: F401  on ranks too, which have no conftest.py
from .reference import RandomStates, batches, difference, network, perturbed_in_part, train, warming

timm = pytest.importorskip("timm")
from timm.loss import LabelSmoothingCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402
from timm.task import ClassificationTask  # noqa: E402
from timm.utils import ModelEmaV3, NativeScaler, update_summary  # noqa: E402

from fsam_ext.integrations.timm import TwoPassScaler, register  # noqa: E402


def made(model, base=SGD, groups=nn.Module.parameters, **options):
    options = {"rho": 0.1} | ({"lr": 0.1, "momentum": 0.9} if base is SGD else {}) | options
    return FriendlySAM(groups(model), base, **options)


class Loop:
    """What train_one_epoch of timm's train.py does, which timm does not install: the order of its calls and no more."""

    def __init__(self, model, optimizer, loss_fn, scaler, amp_autocast=suppress, accumulate=1, clip=None):
        self.model, self.optimizer, self.loss_fn, self.scaler = model, optimizer, loss_fn, scaler
        self.amp_autocast, self.accumulate, self.clip = amp_autocast, accumulate, clip
        self.ema = self.lr_scheduler = None
        self.updates = 0

    def epoch(self, data):
        losses, accumulate = [], self.accumulate
        partial_from = len(data) - len(data) % accumulate
        self.model.train()
        self.optimizer.zero_grad()
        for number, (inputs, targets) in enumerate(data):
            need_update = number == len(data) - 1 or (number + 1) % self.accumulate == 0
            if number >= partial_from:
                accumulate = len(data) % self.accumulate
            with self.model.no_sync() if hasattr(self.model, "no_sync") and not need_update else nullcontext():
                with self.amp_autocast():
                    loss = self.loss(inputs, targets)
                clean = loss.item()
                if accumulate > 1:
                    loss /= accumulate
                self.scaler(
                    loss,
                    self.optimizer,
                    clip_grad=self.clip,
                    clip_mode="norm",
                    parameters=self.model.parameters(),
                    create_graph=False,
                    need_update=need_update,
                )
            losses.append(clean)
            if not need_update:
                continue
            self.updates += 1
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.update(self.model, step=self.updates)
            if self.lr_scheduler is not None:
                self.lr_scheduler.step_update(num_updates=self.updates)
        return losses

    def loss(self, inputs, targets):
        if isinstance(self.model, ClassificationTask):
            return self.model(inputs, targets)["loss"]
        return self.loss_fn(self.model(inputs), targets)


def looped(model, optimizer, *, task=False, epochs=1, grad_scaler=None, **options):
    loss_fn = nn.CrossEntropyLoss()
    if task:
        model = ClassificationTask(model, loss_fn, verbose=False)
        scaler = TwoPassScaler(optimizer, model, grad_scaler=grad_scaler)
    else:
        scaler = TwoPassScaler(optimizer, model, loss_fn, grad_scaler=grad_scaler)
    loop = Loop(model, optimizer, loss_fn, scaler, **options)
    return [loss for _ in range(epochs) for loss in loop.epoch(batches())], loop


CASES = {
    "plain": ({}, {}, {}),
    "AdamW": ({"base": AdamW}, {}, {}),
    "accumulate 4": ({}, {}, {"accumulate": 4}),
    "accumulate 3 over 8": ({}, {}, {"accumulate": 3}),
    "clip": ({}, {}, {"clip": 0.1, "accumulate": 2}),
    "BatchNorm": ({}, {"batch_norm": True}, {"accumulate": 2}),
    "every=2": ({"every": 2}, {}, {}),
    "start=3": ({"start": 3}, {}, {"accumulate": 2}),
    "every=2, reuse=0.3": ({"every": 2, "reuse": 0.3}, {}, {}),
    "perturb=False": ({"groups": perturbed_in_part}, {}, {}),
}


@pytest.mark.parametrize("task", (False, True), ids=("model", "task"))
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_by_hand(case, task, record):
    options, layers, both = CASES[case]
    ours, reference = network(**layers), network(**layers)
    losses, _ = looped(ours, made(ours, **options), task=task, epochs=2, **both)
    assert losses == train(reference, made(reference, **options), batches(), epochs=2, divide=len, **both)
    record("timm", case + (", task" if task else ""), difference(ours, reference))


@pytest.mark.parametrize("accumulate", (1, 3))
def test_a_radius_that_warms_up(accumulate, record):
    """As timm's script would have it: args.opt_kwargs holds options, and a function can be put there in code."""
    register()
    ours, reference = network(), network()
    optimizer = create_optimizer_v2(ours, "fsammomentum", lr=0.1, momentum=0.9, filter_bias_and_bn=False, rho=warming)
    losses, _ = looped(ours, optimizer, epochs=2, accumulate=accumulate)
    plain = made(reference)
    how = {"epochs": 2, "accumulate": accumulate, "divide": len}
    assert losses == train(reference, plain, batches(), rho=warming, **how)
    record("timm", f"rho warm-up, accumulate {accumulate}", difference(ours, reference))


def test_dropout_has_the_masks_of_the_first_pass(record):
    ours, reference = network(dropout=0.5), network(dropout=0.5)
    optimizer = made(ours)
    states = RandomStates(ours[0], lambda: optimizer.is_perturbed)
    losses, _ = looped(ours, optimizer, accumulate=2)
    assert losses == train(reference, made(reference), batches(), accumulate=2, divide=len, states=states)
    record("timm", "dropout", difference(ours, reference))


@pytest.mark.parametrize("task", (False, True), ids=("model", "task"))
def test_bfloat16(task, record):
    """The second pass is made outside of the loop's autocast block, in one like it."""
    ours, reference = network(), network()
    losses, _ = looped(ours, made(ours), task=task, amp_autocast=partial(torch.autocast, "cpu", torch.bfloat16))
    clean = train(reference, made(reference), batches(), autocast=torch.bfloat16)
    assert losses == clean != train(network(), made(network()), batches())
    record("timm", "bf16" + (", task" if task else ""), difference(ours, reference))


class Overflowing(nn.CrossEntropyLoss):
    """Infinite in one of the forward passes of a training, counted from 0."""

    def __init__(self, number):
        super().__init__()
        self.calls, self.number = 0, number

    def forward(self, output, target):
        self.calls += 1
        return super().forward(output, target) * (torch.inf if self.calls - 1 == self.number else 1)


@pytest.mark.parametrize("clip", (None, 0.1), ids=("", "clip"))
@pytest.mark.parametrize("overflow", (None, 6, 7), ids=("", "inf in the first pass", "inf in the second pass"))
def test_a_gradscaler(overflow, clip, record):
    ours, reference = network(), network()
    optimizer, loss_fn, by_hand = made(ours), Overflowing(overflow), Overflowing(overflow)
    one, other = (torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2))
    scaler = TwoPassScaler(optimizer, ours, loss_fn, grad_scaler=one)
    Loop(ours, optimizer, loss_fn, scaler, clip=clip).epoch(batches())
    loss = lambda model, batch: by_hand(model(batch[0]), batch[1])  # noqa: E731
    train(reference, made(reference), batches(), grad_scaler=other, clip=clip, loss=loss)
    assert one.get_scale() == other.get_scale() == (1024.0 if overflow is None else 512.0)
    kind = "" if overflow is None else ", inf in " + ("first" if overflow == 6 else "second")
    record("timm", f"GradScaler{kind}{', clip' if clip else ''}", difference(ours, reference))


def test_the_average_of_weights_takes_no_perturbed_ones(record):
    ours, reference = network(), network()
    optimizer, loss_fn = made(ours), nn.CrossEntropyLoss()
    loop = Loop(ours, optimizer, loss_fn, TwoPassScaler(optimizer, ours, loss_fn))
    loop.ema, by_hand = ModelEmaV3(ours, decay=0.5), ModelEmaV3(reference, decay=0.5)
    loop.epoch(batches())
    steps = iter(range(1, 9))
    train(reference, made(reference), batches(), after_step=lambda: by_hand.update(reference, step=next(steps)))
    record("timm", "ModelEmaV3", difference(loop.ema.module, by_hand.module))


def test_a_copy_of_the_model_has_no_scaler_of_its_own():
    """Nor an optimizer: a copy for an average of weights would hold all state twice."""
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = made(model)
    scaler = TwoPassScaler(optimizer, model, loss_fn)
    count = sum(type(one) is TwoPassScaler for one in gc.get_objects())
    copied = copy.deepcopy(model)
    assert sum(type(one) is TwoPassScaler for one in gc.get_objects()) == count
    copied(batches()[0][0])  # which is no forward pass of the loop
    scaler(loss_fn(model(batches()[0][0]), batches()[0][1]), optimizer)


def test_learning_rates(record):
    ours, reference = network(), network()
    optimizer, plain, loss_fn = made(ours), made(reference), nn.CrossEntropyLoss()
    loop = Loop(ours, optimizer, loss_fn, TwoPassScaler(optimizer, ours, loss_fn))
    loop.lr_scheduler = CosineLRScheduler(optimizer, t_initial=8, warmup_t=2, warmup_lr_init=1e-3, t_in_epochs=False)
    by_hand = CosineLRScheduler(plain, t_initial=8, warmup_t=2, warmup_lr_init=1e-3, t_in_epochs=False)
    steps = iter(range(1, 9))
    loop.epoch(batches())
    train(reference, plain, batches(), after_step=lambda: by_hand.step_update(next(steps)))
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    record("timm", "scheduler", difference(ours, reference))


@pytest.mark.parametrize("options", ({}, {"rho": warming}, {"every": 3, "reuse": 0.3}), ids=", ".join)
def test_a_checkpoint(options, tmp_path, record):
    """timm's keys, with the scaler's state under its key."""
    reference = network()
    train(reference, made(reference, AdamW, **options), batches(), epochs=2)
    ours = network()
    optimizer, loss_fn = made(ours, AdamW, **options), nn.CrossEntropyLoss()
    scaler = TwoPassScaler(optimizer, ours, loss_fn)
    Loop(ours, optimizer, loss_fn, scaler).epoch(batches())
    saved = {"state_dict": ours.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved | {scaler.state_dict_key: scaler.state_dict(), "epoch": 0}, tmp_path / "last.pth.tar")
    model = network()
    optimizer = made(model, AdamW, **options)
    scaler = TwoPassScaler(optimizer, model, loss_fn)
    timm.models.resume_checkpoint(model, str(tmp_path / "last.pth.tar"), optimizer, scaler, log_info=False)
    Loop(model, optimizer, loss_fn, scaler).epoch(batches())
    record("timm", ", ".join(["checkpoint", *options]), difference(model, reference))


@pytest.mark.parametrize("name, checkpointing", (("test_vit", False), ("test_resnet", False), ("test_vit", True)))
def test_a_model_of_timm(name, checkpointing, record):
    """With the real thing: drop path, BatchNorm, label smoothing, and what create_optimizer_v2 makes of a name."""
    register()
    draw = torch.Generator().manual_seed(1)
    data = [(torch.randn(4, 3, 160, 160, generator=draw), torch.randint(5, (4,), generator=draw)) for _ in range(3)]

    def begun():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=5, drop_path_rate=0.3)
        model.set_grad_checkpointing(checkpointing)
        return model, create_optimizer_v2(model, "fsamadamw", lr=1e-3, weight_decay=0.05, rho=0.1)

    (ours, optimizer), (reference, plain) = begun(), begun()
    states = RandomStates(ours, lambda: optimizer.is_perturbed)
    loss_fn = LabelSmoothingCrossEntropy(0.1)
    losses = Loop(ours, optimizer, loss_fn, TwoPassScaler(optimizer, ours, loss_fn)).epoch(data)
    loss = lambda model, batch: loss_fn(model(batch[0]), batch[1])  # noqa: E731
    assert losses == train(reference, plain, data, states=states, loss=loss)
    record("timm", name + (", gradient checkpointing" if checkpointing else ""), difference(ours, reference))


def on_a_rank(accumulate):
    model = nn.parallel.DistributedDataParallel(network())
    optimizer, loss_fn = made(model), nn.CrossEntropyLoss()
    scaler = TwoPassScaler(optimizer, model, loss_fn)
    Loop(model, optimizer, loss_fn, scaler, accumulate=accumulate).epoch(batches()[torch.distributed.get_rank() :: 2])
    return model.module.state_dict()


@pytest.mark.parametrize("accumulate", (1, 2))
def test_two_processes_equal_one(accumulate, record):
    reference = network()
    train(reference, made(reference), batches(), accumulate=2 * accumulate)
    for state in run(2, on_a_rank, accumulate):
        model = network()
        model.load_state_dict(state)
        record("timm", f"2 processes, accumulate {accumulate}", difference(model, reference), 1e-7)


def test_a_compiled_model(record):
    ours, reference = network(), network()
    optimizer, loss_fn = made(ours), nn.CrossEntropyLoss()
    model = torch.compile(ours, backend="eager")
    losses = Loop(model, optimizer, loss_fn, TwoPassScaler(optimizer, model, loss_fn)).epoch(batches())
    assert losses == train(reference, made(reference), batches())
    record("timm", "torch.compile", difference(ours, reference))


def test_what_an_ascent_measured_is_for_the_summary(tmp_path):
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = made(model)
    scaler = TwoPassScaler(optimizer, model, loss_fn)
    losses = Loop(model, optimizer, loss_fn, scaler).epoch(batches())
    metrics = {"loss": losses[-1], **{name: float(value) for name, value in scaler.stats().items()}}
    update_summary(0, metrics, {}, tmp_path / "summary.csv", write_header=True)
    with open(tmp_path / "summary.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["train_fsam/grad_norm"]) == float(optimizer.stats()["grad_norm"].float()) > 0
    assert {"train_fsam/noise_norm", "train_fsam/cosine", "train_fsam/found_inf"} < row.keys()


def test_evaluation_between_steps_is_not_kept():
    ours, reference = network(), network()
    optimizer, loss_fn = made(ours), nn.CrossEntropyLoss()
    loop = Loop(ours, optimizer, loss_fn, TwoPassScaler(optimizer, ours, loss_fn))
    for batch in batches():
        loop.epoch([batch])
        ours.eval()
        loss_fn(ours(batch[0]), batch[1])
        with torch.no_grad():
            ours.train()(batch[0])
    train(reference, made(reference), batches())
    assert difference(ours, reference) == 0


def test_names_for_opt():
    """As timm's script has it: --opt fsamadamw --opt-kwargs rho=0.2."""
    assert register() == [
        *("fsamsgd", "samsgd", "fsammomentum", "sammomentum"),
        *("fsamadam", "samadam", "fsamadamw", "samadamw"),
    ]
    assert register("lamb") == ["fsamlamb", "samlamb"]
    assert {"fsamsgd", "samadamw", "fsamlamb"} <= set(list_optimizers("*sam*"))
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    args = argparse.Namespace(opt="fsamadamw", lr=1e-3, weight_decay=0.05, momentum=0.9, opt_betas=(0.8, 0.9))
    args.opt_args = {"rho": 0.2}
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    assert type(optimizer) is FriendlySAM and optimizer.base_class is AdamW
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    for group in optimizer.param_groups:
        assert (group["rho"], group["betas"], group["lr"]) == (0.2, (0.8, 0.9), 1e-3)
    sam = create_optimizer_v2(model, "samsgd", lr=0.1, momentum=0.8)
    assert type(sam) is SAM and sam.base_class is SGD
    assert sam.param_groups[0]["nesterov"] is True and sam.param_groups[0]["momentum"] == 0.8
    assert create_optimizer_v2(model, "sammomentum", lr=0.1).param_groups[0]["nesterov"] is False
    with pytest.raises(ValueError, match="nothing not found"):
        register("nothing")


def test_bad_input():
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = made(model)
    with pytest.raises(TypeError, match="optimizer must be a fsam_ext.FriendlySAM or SAM, not SGD"):
        TwoPassScaler(SGD(model.parameters(), lr=0.1), model, loss_fn)
    with pytest.raises(TypeError, match="loss_fn must be a torch.nn.Module, whose hooks see the targets"):
        TwoPassScaler(optimizer, model, cross_entropy)
    with pytest.raises(TypeError, match="grad_scaler must be a torch.amp.GradScaler, not NativeScaler"):
        TwoPassScaler(optimizer, model, loss_fn, NativeScaler(device="cpu"))
    with pytest.raises(ValueError, match="ascent_sync must be True with timm"):
        TwoPassScaler(made(model, ascent_sync=False, ema_source="descent"), model, loss_fn)
    scaler = TwoPassScaler(optimizer, model, loss_fn)
    with pytest.raises(TypeError, match=r"called with another optimizer \(SGD\) than it was made with"):
        scaler(loss_fn(model(batches()[0][0]), batches()[0][1]), SGD(model.parameters(), lr=0.1))


def test_what_the_second_pass_could_not_make_again_is_refused():
    model, loss_fn = network(), nn.CrossEntropyLoss()
    optimizer = made(model)
    scaler = TwoPassScaler(optimizer, model, loss_fn)
    before, (inputs, targets) = network(), batches()[0]
    with pytest.raises(RuntimeError, match="the model was called 2 times for 1 losses"):
        scaler(loss_fn(model(inputs) + model(-inputs), targets), optimizer)
    with pytest.raises(RuntimeError, match="the loss was changed after the module that made it"):
        scaler(loss_fn(model(inputs), targets) / 2, optimizer)  # a loop that divides by a number of its own
    with pytest.raises(RuntimeError, match="the loss was changed after the module that made it"):
        scaler(loss_fn(model(inputs), targets) + 0.1 * model[0].weight.square().sum(), optimizer)
    assert difference(model, before) == 0 and all(param.grad is None for param in model.parameters())
    scaler(loss_fn(model(inputs), targets), optimizer)
    train(before, made(before), batches(1))
    assert difference(model, before) == 0


def test_takes_the_place_of_timms_scaler():
    """The same call, and a state that either can load."""
    theirs = NativeScaler(device="cpu")
    model = network()
    ours = TwoPassScaler(made(model), model, nn.CrossEntropyLoss(), grad_scaler=torch.amp.GradScaler("cpu"))
    assert ours.state_dict_key == theirs.state_dict_key
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
