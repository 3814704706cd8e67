"""FriendlySAMTrainer against the two passes written by hand, with the real Trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fsam_ext import FriendlySAM

from .reference import SIZE, RandomStates, batches, difference, network, rows, train

transformers = pytest.importorskip("transformers")
from transformers import get_scheduler  # noqa: E402

from fsam_ext.integrations.transformers import FriendlySAMTrainer  # noqa: E402

FSAM = {"rho": 0.1}
LR, WEIGHT_DECAY = 0.02, 0.1


class Classifier(nn.Module):
    """Returns its loss, as the Trainer wants it."""

    def __init__(self, dropout=0.0, batch_norm=False):
        super().__init__()
        self.net = network(dropout, batch_norm)

    def forward(self, x, labels):
        return {"loss": cross_entropy(self.net(x), labels)}


def dataset():
    return [{"x": x, "labels": y} for x, y in rows()]


def data():
    return [{"x": x, "labels": y} for x, y in batches()]


def loss_of(model, batch):
    return model(**batch)["loss"]


def arguments(tmp_path, **options):
    defaults = {
        "num_train_epochs": 2,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
    }
    return transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=SIZE,
        train_sampling_strategy="sequential",
        learning_rate=LR,
        weight_decay=WEIGHT_DECAY,
        dataloader_pin_memory=False,
        **{**defaults, **options},
    )


def fit(tmp_path, model, fsam=FSAM, train_dataset=None, **options):
    trainer = FriendlySAMTrainer(
        model, arguments(tmp_path, **options), train_dataset=train_dataset or dataset(), fsam=fsam
    )
    trainer.train()
    return trainer


def optimizer_of(model, base=torch.optim.AdamW, fsam=FSAM, **options):
    """With the Trainer's two groups: biases and norms do not decay."""
    decays = [[], []]
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            if param.requires_grad:
                decays[name == "bias" or isinstance(module, nn.LayerNorm)].append(param)
    groups = [{"params": some, "weight_decay": decay} for some, decay in zip(decays, (WEIGHT_DECAY, 0.0))]
    return FriendlySAM(groups, base, lr=LR, **fsam, **options)


def by_hand(dropout=0.0, batch_norm=False, fsam=FSAM, schedule=None, optimizer=optimizer_of, **how):
    model = Classifier(dropout, batch_norm)
    made = optimizer(model, fsam=fsam)
    scheduler = None if schedule is None else schedule(made)
    window = {"divide": len, "loss": loss_of, "epochs": 2}
    clean = train(model, made, data(), **{**window, **how}, scheduler=scheduler)
    return model, clean


def linear(optimizer):
    return get_scheduler("linear", optimizer, num_warmup_steps=4, num_training_steps=16)


def adamw(model, fsam):
    return optimizer_of(model, betas=(0.9, 0.999), eps=1e-8, fused=True, fsam=fsam)


def sgd(model, fsam):
    return optimizer_of(model, torch.optim.SGD, fsam=fsam)


CASES = {
    "plain": ({}, FSAM, {}, {}),
    "SGD": ({}, FSAM, {"optim": "sgd"}, {"optimizer": sgd}),
    "accumulation 4": ({}, FSAM, {"gradient_accumulation_steps": 4}, {"accumulate": 4}),
    "accumulation 3 over 8": ({}, FSAM, {"gradient_accumulation_steps": 3}, {"accumulate": 3}),
    "clipping": ({}, FSAM, {"max_grad_norm": 0.05}, {"clip": 0.05}),
    "clipping, accumulation 4": (
        {},
        FSAM,
        {"max_grad_norm": 0.05, "gradient_accumulation_steps": 4},
        {"clip": 0.05, "accumulate": 4},
    ),
    "bf16-mixed": ({}, FSAM, {"bf16": True}, {"autocast": torch.bfloat16}),
    "BatchNorm, accumulation 3": (
        {"batch_norm": True},
        FSAM,
        {"gradient_accumulation_steps": 3},
        {"batch_norm": True, "accumulate": 3},
    ),
    "LR scheduler, warm-up": (
        {},
        FSAM,
        {"lr_scheduler_type": "linear", "warmup_steps": 4},
        {"schedule": linear},
    ),
    "every=2": ({}, {"every": 2}, {}, {"fsam": {"every": 2}}),
    "start=5, accumulation 3": (
        {},
        {"start": 5},
        {"gradient_accumulation_steps": 3},
        {"fsam": {"start": 5}, "accumulate": 3},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_trains_as_by_hand(case, tmp_path, record):
    ours, fsam, how, theirs = CASES[case]
    model = Classifier(**ours)
    trainer = fit(tmp_path, model, fsam, **how)
    other, clean = by_hand(**{"optimizer": adamw, **theirs})
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, FriendlySAM) and not optimizer.is_perturbed
    assert not torch.equal(model.net[0].weight, network()[0].weight)
    record("transformers", case, difference(model, other))
    steps = len(clean) // how.get("gradient_accumulation_steps", 1)
    assert trainer.state.global_step in (steps, steps + 1)


@pytest.mark.parametrize("accumulate", (1, 3))
def test_dropout_has_the_same_masks(accumulate, tmp_path, record):
    model = Classifier(dropout=0.5)
    trainer = FriendlySAMTrainer(
        model, arguments(tmp_path, gradient_accumulation_steps=accumulate), train_dataset=dataset(), fsam=FSAM
    )
    states = RandomStates(model.net[0], lambda: trainer.optimizer.optimizer.is_perturbed)
    trainer.train()
    assert len(states) == 16
    other, _ = by_hand(dropout=0.5, accumulate=accumulate, states=states, optimizer=adamw)
    record("transformers", f"dropout, accumulation {accumulate}", difference(model, other))
