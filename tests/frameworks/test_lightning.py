"""FriendlySAMCallback against the two passes written by hand, with the real Trainer."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from fsam_ext import FriendlySAM

from .reference import SIZE, RandomStates, batches, difference, loss_of, network, rows, train

lightning = pytest.importorskip("lightning.pytorch")
from torchmetrics import MeanMetric, MetricCollection, SumMetric  # noqa: E402

from fsam_ext.integrations.lightning import FriendlySAMCallback  # noqa: E402

OPTIONS = {"rho": 0.1, "lr": 0.1, "momentum": 0.9}


class Module(lightning.LightningModule):
    def __init__(self, schedule=None, dropout=0.0, batch_norm=False, **options):
        super().__init__()
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
        optimizer = FriendlySAM(self.net.parameters(), **self.options)
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


def trainer(tmp_path, *callbacks, **options):
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options}
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, FriendlySAMCallback()],
        **options,
    )


def loader():
    return DataLoader(rows(), batch_size=SIZE)


def by_hand(schedule=None, dropout=0.0, batch_norm=False, options=(), **how):
    model = network(dropout, batch_norm)
    optimizer = FriendlySAM(model.parameters(), **{**OPTIONS, **dict(options)})
    clean = train(
        model, optimizer, batches(), **{"epochs": 2, **how}, scheduler=None if schedule is None else schedule(optimizer)
    )
    return model, clean


def fit(tmp_path, module, *callbacks, **options):
    made = trainer(tmp_path, *callbacks, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(module, loader())
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
