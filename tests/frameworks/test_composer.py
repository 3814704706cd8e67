"""Composer's trainer with ComposerFriendlySAM, against the two passes written by hand.

Composer 0.32 asks for torch 2.6, and fsam_ext for 2.10: the tests run it with the torch that is there, installed
without its requirements.
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from fsam_ext import FriendlySAM

from ..distributed.ranks import run
from . import torchvision_on_cpu  # noqa: F401  on ranks too, which have no conftest.py
from .reference import (
    SIZE,
    RandomStates,
    batches,
    difference,
    distance,
    loss_of,
    network,
    perturbed_in_part,
    rows,
    train,
    train_with_local_first_passes,
    warming,
)

pytest.importorskip("composer")

from composer import Callback, Event, Trainer
from composer.algorithms import EMA, GradientClipping, MixUp
from composer.loggers import InMemoryLogger
from composer.models import ComposerModel
from composer.trainer._scaler import ClosureGradScaler
from composer.utils import dist
from torchmetrics.classification import MulticlassAccuracy

from fsam_ext.integrations.composer import ComposerFriendlySAM


class Model(ComposerModel):
    def __init__(self, **layers):
        super().__init__()
        self.module = network(**layers)
        self.train_metric = MulticlassAccuracy(num_classes=3, average="micro")
        self.seen = []
        self.updates = 0

    def forward(self, batch):
        self.seen.append([part.clone() for part in batch])
        return self.module(batch[0])

    def loss(self, outputs, batch):
        return cross_entropy(outputs, batch[1])

    def get_metrics(self, is_train):
        return {"accuracy": self.train_metric}

    def eval_forward(self, batch, outputs=None):
        return outputs

    def update_metric(self, batch, outputs, metric):
        self.updates += 1
        metric.update(outputs, batch[1])


class Share:
    """Divides a loss as Composer does: by multiplying with the micro-batch's share of the batch."""

    def __init__(self, window):
        self.share = SIZE / (SIZE * len(window))

    def __rtruediv__(self, loss):
        return loss * self.share


def made(model, base=SGD, groups=nn.Module.parameters, **options):
    options = {"rho": 0.1} | ({"lr": 0.1, "momentum": 0.9} if base is SGD else {}) | options
    return FriendlySAM(groups(model), base, **options)


def decay(optimizer):
    return LambdaLR(optimizer, lambda step: 0.8**step)


def trainer_of(model, optimizer, *, accumulate=1, algorithms=(), epochs=1, ranks=False, **options):
    memory = InMemoryLogger()
    sampler = dist.get_sampler(rows(), shuffle=False) if ranks else None
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(rows(), batch_size=SIZE * accumulate, sampler=sampler),
        optimizers=optimizer,
        algorithms=[ComposerFriendlySAM(), *algorithms],
        max_duration=f"{epochs}ep",
        device="cpu",
        device_train_microbatch_size=SIZE,
        step_schedulers_every_batch=True,
        progress_bar=False,
        loggers=memory,
        **options,
    )
    return trainer, memory


def logged(memory, name):
    return [value for _, value in memory.data[name]]


CASES = {
    "plain": ({}, {}, 1),
    "AdamW": ({"base": AdamW}, {}, 1),
    "accumulate 4": ({}, {}, 4),
    "accumulate 3 over 8": ({}, {}, 3),
    "BatchNorm": ({}, {"batch_norm": True}, 2),
    "every=2": ({"every": 2}, {}, 1),
    "start=3": ({"start": 3}, {}, 2),
    "rho warm-up": ({"rho": warming}, {}, 1),
    "rho warm-up, accumulate 3": ({"rho": warming}, {}, 3),
    "every=2, reuse=0.3": ({"every": 2, "reuse": 0.3}, {}, 1),
    "perturb=False": ({"groups": perturbed_in_part}, {}, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_by_hand(case, record):
    options, layers, accumulate = CASES[case]
    ours, reference = Model(**layers), network(**layers)
    trainer, memory = trainer_of(ours, made(ours, **options), accumulate=accumulate, epochs=2)
    trainer.fit()
    plain, how = made(reference, **options), {"epochs": 2, "accumulate": accumulate, "divide": Share}
    clean = train(reference, plain, batches(), rho=options.get("rho"), **how)
    if accumulate == 1:
        assert logged(memory, "loss/train/total") == clean
    record("mosaicml", case, difference(ours.module, reference))


def test_clipping_is_of_the_second_gradient_only(record):
    ours, reference = Model(), network()
    clipping = GradientClipping(clipping_type="norm", clipping_threshold=0.1)
    trainer, _ = trainer_of(ours, made(ours, every=2), accumulate=2, algorithms=[clipping])
    trainer.fit()
    train(reference, made(reference, every=2), batches(), accumulate=2, divide=Share, clip=0.1)
    assert any(one is clipping for one in trainer.state.algorithms)
    record("mosaicml", "clip, every=2", difference(ours.module, reference))


def test_dropout_has_the_masks_of_the_first_pass(record):
    ours, reference = Model(dropout=0.5), network(dropout=0.5)
    optimizer = made(ours)
    states = RandomStates(ours.module[0], lambda: optimizer.is_perturbed)
    trainer, _ = trainer_of(ours, optimizer, accumulate=2)
    trainer.fit()
    train(reference, made(reference), batches(), accumulate=2, divide=Share, states=states)
    record("mosaicml", "dropout", difference(ours.module, reference))


def test_learning_rates(record):
    ours, reference = Model(), network()
    optimizer, plain = made(ours), made(reference)
    trainer, _ = trainer_of(ours, optimizer, schedulers=decay(optimizer))
    trainer.fit()
    train(reference, plain, batches(), scheduler=decay(plain))
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"] < 0.1
    record("mosaicml", "scheduler", difference(ours.module, reference))


@pytest.mark.parametrize("options", ({}, {"rho": warming}, {"every": 2, "reuse": 0.3}), ids=", ".join)
def test_a_checkpoint_in_mid_epoch(options, tmp_path, record):
    reference = network()
    train(reference, made(reference, AdamW, **options), batches())
    first = Model()
    trainer, _ = trainer_of(first, made(first, AdamW, **options), save_folder=str(tmp_path), save_interval="3ba")
    trainer.fit()
    ours = Model()
    trainer, _ = trainer_of(ours, made(ours, AdamW, **options), load_path=str(tmp_path / "ep0-ba3-rank0.pt"))
    trainer.fit()
    assert trainer.state.timestamp.batch.value == 8
    record("mosaicml", ", ".join(["checkpoint", *options]), difference(ours.module, reference))


def test_the_average_of_weights_takes_no_perturbed_ones(record):
    ours, reference = Model(), network()
    averaging = EMA(half_life="2ba", update_interval="1ba")
    trainer, _ = trainer_of(ours, made(ours), algorithms=[averaging])
    trainer.fit()
    average = None

    def update():
        nonlocal average
        weights = {f"module.{name}": param.detach().clone() for name, param in reference.named_parameters()}
        average = average or weights  # Composer's begins with the weights after the first step
        kept = averaging.smoothing
        average = {name: average[name] * kept + value * (1.0 - kept) for name, value in weights.items()}

    train(reference, made(reference), batches(), after_step=update)
    record("mosaicml", "EMA", distance(average, averaging.ema_model.named_parameters_dict))


class Counting(Callback):
    def __init__(self):
        self.seen = {}

    def run_event(self, event, state, logger):
        self.seen[event] = self.seen.get(event, 0) + 1


def test_callbacks_and_metrics_see_each_batch_once():
    ours, counting = Model(), Counting()
    optimizer = made(ours)
    trainer, memory = trainer_of(ours, optimizer, accumulate=2, callbacks=[counting])
    trainer.fit()
    assert counting.seen[Event.BATCH_END] == counting.seen[Event.AFTER_TRAIN_BATCH] == 4
    assert counting.seen[Event.AFTER_FORWARD] == counting.seen[Event.AFTER_BACKWARD] == 8
    assert len(ours.seen) == 2 * 8 and ours.updates == 8
    assert all(value > 0 for value in logged(memory, "fsam/grad_norm")) and len(logged(memory, "fsam/cosine")) == 4


def test_algorithms_draw_the_same_random_numbers_in_both_passes():
    """MixUp draws from NumPy and from torch."""
    ours = Model()
    trainer, _ = trainer_of(ours, made(ours), algorithms=[MixUp(alpha=0.5, interpolate_loss=True)])
    trainer.fit()
    inputs = [inputs for inputs, _ in ours.seen]
    pairs = list(zip(inputs[::2], inputs[1::2]))
    assert len(pairs) == 8 and all(torch.equal(first, second) for first, second in pairs)
    assert not any(torch.equal(mixed, batch) for (mixed, _), (batch, _) in zip(pairs, batches()))


@pytest.mark.parametrize("overflow", (None, 6, 7), ids=("", "inf in the first pass", "inf in the second pass"))
def test_composers_gradscaler(overflow, record):
    """The trainer refuses float16 on the CPU: its scaler is driven as the trainer does it."""
    ours, reference, plain_scaler = Model(), network(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = made(ours)
    trainer, _ = trainer_of(ours, optimizer)
    scaler = ClosureGradScaler("cpu", init_scale=1024.0)
    calls = []

    def infinite(loss, calls=calls):
        calls.append(None)
        return loss * (torch.inf if len(calls) - 1 == overflow else 1)

    for batch in batches():

        def closure(loss_dict=None, batch=batch):
            scaler.scale(infinite(cross_entropy(ours.module(batch[0]), batch[1]))).backward()
            return 0.0

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scaler.step(optimizer, closure=closure)
        scaler.update()
    count = []
    by_hand = lambda model, batch: infinite(loss_of(model, batch), count)  # noqa: E731
    if overflow == 6:  # Composer's protocol makes no second pass then
        after = iter(range(100))
        by_hand = lambda model, batch: loss_of(model, batch) * (torch.inf if next(after) in (6, 7) else 1)  # noqa: E731
    train(reference, made(reference), batches(), grad_scaler=plain_scaler, loss=by_hand)
    assert scaler.get_scale() == plain_scaler.get_scale() == (1024.0 if overflow is None else 512.0)
    kind = "" if overflow is None else ", inf in " + ("first" if overflow == 6 else "second")
    record("mosaicml", "ClosureGradScaler" + kind, difference(ours.module, reference))
    assert trainer.state.optimizers == [optimizer]


def on_a_rank(accumulate, options):
    rank = torch.distributed.get_rank()
    os.environ |= {name: str(rank) for name in ("RANK", "LOCAL_RANK")} | {"NODE_RANK": "0"}
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513"}
    ours = Model()
    trainer, _ = trainer_of(ours, made(ours, **options), accumulate=accumulate, ranks=True)
    trainer.fit()
    assert type(trainer.state.model) is DistributedDataParallel
    seen, both = [], 2 * accumulate
    for first in range(0, len(ours.seen), both):  # without those of second passes
        seen += ours.seen[first : first + accumulate]
    return ours.module.state_dict(), local_by_hand(accumulate, seen, options)


def local_by_hand(accumulate, seen, options):
    """The same with DistributedDataParallel and no_sync."""
    model = DistributedDataParallel(network())
    train_with_local_first_passes(model, made(model, **options), seen, accumulate)
    return model.module.state_dict()


@pytest.mark.parametrize("accumulate", (1, 2))
def test_two_processes_equal_one(accumulate, record):
    reference = network()
    train(reference, made(reference), batches(), accumulate=2 * accumulate)
    for state, local in run(2, on_a_rank, accumulate, {}):
        record("mosaicml", f"2 processes, accumulate {accumulate}", distance(state, reference.state_dict()), 1e-7)
        assert distance(state, local) > 1e-4


@pytest.mark.parametrize("accumulate", (1, 2))
def test_a_local_first_pass(accumulate, record):
    for state, local in run(2, on_a_rank, accumulate, {"ascent_sync": False, "ema_source": "descent"}):
        record("mosaicml", f"2 processes, local first pass, accumulate {accumulate}", distance(state, local), 1e-7)


def test_bad_input():
    model = Model()
    with pytest.raises(TypeError, match="optimizers must be a fsam_ext.FriendlySAM or SAM for ComposerFriendlySAM"):
        trainer_of(model, SGD(model.parameters(), lr=0.1))
    with pytest.raises(NotImplementedError, match="Only one optimizer is supported; found 2"):
        trainer_of(model, [made(model), made(model)])
