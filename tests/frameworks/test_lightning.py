"""FriendlySAMCallback against the two passes written by hand, with the real Trainer."""

from __future__ import annotations

import csv
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from fsam_ext import FriendlySAM

from ..host_waits import HostWaits
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

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from torchmetrics import MeanMetric, MetricCollection, SumMetric  # noqa: E402

from fsam_ext.integrations.lightning import FriendlySAMCallback  # noqa: E402

OPTIONS = {"rho": 0.1, "lr": 0.1, "momentum": 0.9}


class Module(lightning.LightningModule):
    def __init__(self, schedule=None, dropout=0.0, batch_norm=False, groups=nn.Module.parameters, **options):
        super().__init__()
        self.groups = groups
        self.net = network(dropout, batch_norm)
        self.seen = MeanMetric()
        self.counts = MetricCollection({"steps": SumMetric()})
        self.options = {**OPTIONS, **options}
        self.schedule = schedule

    def training_step(self, batch, batch_idx):
        loss = loss_of(self.net, batch)
        self.seen(loss.detach())
        self.counts["steps"].update(1)
        self.log("loss", loss)
        self.log("seen", self.seen, on_epoch=True)
        self.log_dict({"twice": 2 * loss})
        return loss

    def configure_optimizers(self):
        optimizer = FriendlySAM(self.groups(self.net), **self.options)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


def trainer(tmp_path, *callbacks, **options):
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        enable_model_summary=False,
        callbacks=[*callbacks, FriendlySAMCallback()],
        **options,
    )


def loader():
    return DataLoader(rows(), batch_size=SIZE)


class Resumable(DataLoader):
    """A loader whose place in the epoch Lightning saves with its checkpoints."""

    def __init__(self):
        super().__init__(rows(), batch_size=SIZE)
        self.place = 0

    def __iter__(self):
        first = self.place % len(self)
        for self.place, batch in enumerate(super().__iter__(), 1):
            if self.place > first:
                yield batch

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state_dict):
        self.place = state_dict["place"]


def by_hand(schedule=None, dropout=0.0, batch_norm=False, options=(), groups=nn.Module.parameters, **how):
    model = network(dropout, batch_norm)
    optimizer = FriendlySAM(groups(model), **{**OPTIONS, **dict(options)})
    clean = train(
        model, optimizer, batches(), **{"epochs": 2, **how}, scheduler=None if schedule is None else schedule(optimizer)
    )
    return model, clean


def fit(tmp_path, module, *callbacks, data=None, ckpt_path=None, **options):
    made = trainer(tmp_path, *callbacks, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return made


def warm_up(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=6)


CASES = {
    "plain": ({}, {}, {}),
    "accumulation 4": ({}, {"accumulate_grad_batches": 4}, {"accumulate": 4}),
    "accumulation 3 over 8": ({}, {"accumulate_grad_batches": 3}, {"accumulate": 3}),
    "clipping": ({}, {"gradient_clip_val": 0.05}, {"clip": 0.05}),
    "clipping, accumulation 4": (
        {},
        {"gradient_clip_val": 0.05, "accumulate_grad_batches": 4},
        {"clip": 0.05, "accumulate": 4},
    ),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}),
    "bf16-mixed, clipping": (
        {},
        {"precision": "bf16-mixed", "gradient_clip_val": 0.05},
        {"autocast": torch.bfloat16, "clip": 0.05},
    ),
    "BatchNorm": ({"batch_norm": True}, {}, {"batch_norm": True}),
    "BatchNorm, accumulation 3": (
        {"batch_norm": True},
        {"accumulate_grad_batches": 3},
        {"batch_norm": True, "accumulate": 3},
    ),
    "LR scheduler": ({"schedule": warm_up}, {}, {"schedule": warm_up}),
    "every=2": ({"every": 2}, {}, {"options": {"every": 2}}),
    "start=5, accumulation 3": (
        {"start": 5},
        {"accumulate_grad_batches": 3},
        {"options": {"start": 5}, "accumulate": 3},
    ),
    "rho warm-up": ({"rho": warming}, {}, {"rho": warming}),
    "rho warm-up, accumulation 3": (
        {"rho": warming},
        {"accumulate_grad_batches": 3},
        {"rho": warming, "accumulate": 3},
    ),
    "every=2, reuse=0.3": ({"every": 2, "reuse": 0.3}, {}, {"options": {"every": 2, "reuse": 0.3}}),
    "perturb=False": ({"groups": perturbed_in_part}, {}, {"groups": perturbed_in_part}),
}


@pytest.mark.parametrize("case", CASES)
def test_trains_as_by_hand(case, tmp_path, record):
    ours, how, theirs = CASES[case]
    module = Module(**ours)
    made = fit(tmp_path, module, **how)
    model, clean = by_hand(**theirs)
    assert not made.optimizers[0].is_perturbed
    assert not torch.equal(module.net[0].weight, network()[0].weight)
    record("lightning", case, difference(module.net, model))
    assert module.counts["steps"].compute() == len(clean)


@pytest.mark.parametrize("accumulate", (1, 3))
def test_dropout_has_the_same_masks(accumulate, tmp_path, record):
    module = Module(dropout=0.5)
    states = RandomStates(module.net[0], lambda: made.optimizers[0].is_perturbed)
    made = trainer(tmp_path, accumulate_grad_batches=accumulate)
    made.fit(module, loader())
    assert len(states) == 16
    model, _ = by_hand(dropout=0.5, accumulate=accumulate, states=states)
    record("lightning", f"dropout, accumulation {accumulate}", difference(module.net, model))


def checkpointed(net):
    """Keeps no activations: its backward pass makes them again."""
    net.forward = partial(checkpoint, net.forward, use_reentrant=False)
    return net


@pytest.mark.parametrize("accumulate", (1, 3))
def test_gradient_checkpointing(accumulate, tmp_path, record):
    module, model = Module(batch_norm=True), checkpointed(network(batch_norm=True))
    checkpointed(module.net)
    fit(tmp_path, module, accumulate_grad_batches=accumulate)
    train(model, FriendlySAM(model.parameters(), **OPTIONS), batches(), epochs=2, accumulate=accumulate)
    record("lightning", f"gradient checkpointing, accumulation {accumulate}", difference(module.net, model))


# ---- fp16 ------------------------------------------------------------------------------------------------------------


class Overflows(Module):
    """Whose loss is infinite in some micro-batches: of the first pass, of the second, or of both."""

    def __init__(self, first=(), second=(), **options):
        super().__init__(**options)
        self.overflows = {False: first, True: second}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (torch.inf if batch_idx in self.overflows[self.optimizers().is_perturbed] else 1.0)


@pytest.mark.parametrize("clip", (None, 0.05), ids=("", "clipping"))
@pytest.mark.parametrize("accumulate", (1, 3))
@pytest.mark.parametrize("where", ("nowhere", "first", "second", "both"))
def test_fp16_with_a_scaler_and_an_overflow(where, accumulate, clip, tmp_path, record):
    first = (1, 4) if where in ("first", "both") else ()
    second = (1, 6) if where in ("second", "both") else ()
    module = Overflows(first, second)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(tmp_path, module, plugins=[plugin], accumulate_grad_batches=accumulate, gradient_clip_val=clip)

    model = network()
    optimizer = FriendlySAM(model.parameters(), **OPTIONS)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    def loss(model, numbered):
        number, batch = numbered
        bad = number in (second if optimizer.is_perturbed else first)
        return loss_of(model, batch) * (torch.inf if bad else 1.0)

    data = list(enumerate(batches()))
    how = {"epochs": 2, "accumulate": accumulate, "clip": clip, "autocast": torch.half, "loss": loss}
    train(model, optimizer, data, grad_scaler=theirs, **how)
    assert scaler.get_scale() == theirs.get_scale()
    case = f"fp16, overflow {where}, accumulation {accumulate}{', clipping' if clip else ''}"
    record("lightning", case, difference(module.net, model))


# ---- What a run leaves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", ({}, {"rho": warming}, {"reuse": 0.3}), ids=", ".join)
@pytest.mark.parametrize("accumulate", (1, 2))
def test_checkpoint_and_resume_in_mid_epoch(accumulate, extra, tmp_path, record):
    options = {"batch_norm": True, "schedule": warm_up, "every": 2, **extra}
    how = {"accumulate_grad_batches": accumulate}
    whole, resumed = Module(**options), Module(**options)
    fit(tmp_path, whole, **how)
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=6 // accumulate, save_top_k=-1)
    fit(tmp_path, Module(**options), saves, data=Resumable(), enable_checkpointing=True, **how)
    path = tmp_path / f"epoch=0-step={6 // accumulate}.ckpt"
    made = fit(tmp_path, resumed, data=Resumable(), ckpt_path=path, **how)
    assert made.global_step == 16 // accumulate
    case = ", ".join([f"resume in mid-epoch, accumulation {accumulate}", *extra])
    record("lightning", case, difference(resumed.net, whole.net))


class Counted(Callback):
    """How often the hooks of a batch run."""

    def __init__(self):
        self.calls = dict.fromkeys(("zero_grad", "backward", "after_backward", "step", "start", "end"), 0)

    def on_before_zero_grad(self, *args):
        self.calls["zero_grad"] += 1

    def on_before_backward(self, *args):
        self.calls["backward"] += 1

    def on_after_backward(self, *args):
        self.calls["after_backward"] += 1

    def on_before_optimizer_step(self, *args):
        self.calls["step"] += 1

    def on_train_batch_start(self, *args):
        self.calls["start"] += 1

    def on_train_batch_end(self, trainer, *args):
        assert not trainer.optimizers[0].is_perturbed
        self.calls["end"] += 1


def test_hooks_metrics_and_logs_are_of_the_first_pass(tmp_path, record, monkeypatch):
    asked = []
    stats = FriendlySAM.stats
    monkeypatch.setattr(FriendlySAM, "stats", lambda self: asked.append(None) or stats(self))
    module, counted = Module(), Counted()
    made = fit(
        tmp_path,
        module,
        counted,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=2,
        accumulate_grad_batches=2,
        max_epochs=10,
        max_steps=6,
    )
    assert made.global_step == 6 and len(asked) == 3
    assert counted.calls == {"zero_grad": 6, "backward": 12, "after_backward": 12, "step": 6, "start": 12, "end": 12}
    assert module.counts["steps"].compute() == 12
    _, clean = by_hand(accumulate=2)
    assert made.callback_metrics["seen_epoch"].item() == pytest.approx(sum(clean[8:12]) / 4, abs=1e-6)
    with open(tmp_path / "lightning_logs/version_0/metrics.csv") as file:
        logged = [row for row in csv.DictReader(file) if row["loss"]]
    assert [int(row["step"]) for row in logged] == [1, 3, 5]
    losses = [abs(float(row["loss"]) - clean[2 * int(row["step"]) + 1]) for row in logged]
    twice = [abs(float(row["twice"]) - 2 * clean[2 * int(row["step"]) + 1]) for row in logged]
    record("lightning", "logged loss is the clean one", max(losses + twice))
    for name in ("noise_norm", "grad_norm"):
        assert all(float(row[f"fsam/{name}"]) > 0 for row in logged)
    assert all(-1 <= float(row["fsam/cosine"]) <= 1 and float(row["fsam/found_inf"]) == 0 for row in logged)


def test_the_callback_reads_nothing_on_the_host(tmp_path):
    class Bare(Module):
        def training_step(self, batch, batch_idx):
            return loss_of(self.net, batch)

    class Watched(FriendlySAMCallback):
        found: list[str] = []
        steps = 0

        def on_before_optimizer_step(self, trainer, *args):
            with HostWaits("cpu") as waits:
                super().on_before_optimizer_step(trainer, *args)
            self.found.extend(waits.found)
            self.steps += 1

    watched = Watched()
    made = trainer(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=4)
    made.callbacks[:] = [watched]
    made.fit(Bare(), loader())
    assert watched.steps == 16 and watched.found == []
    assert made.logged_metrics["fsam/grad_norm"] > 0  # it is Lightning's logger that reads


def test_averaged_weights_are_never_perturbed_ones(tmp_path, record):
    module = Module()
    averaging = WeightAveraging(avg_fn=lambda average, current, count: 0.9 * average + 0.1 * current)
    fit(tmp_path, module, averaging)
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=averaging._kwargs["avg_fn"])
    optimizer = FriendlySAM(model.parameters(), **OPTIONS)
    train(model, optimizer, batches(), epochs=2, after_step=lambda: average.update_parameters(model))
    record("lightning", "EMA of the weights", difference(module.net, average.module))
