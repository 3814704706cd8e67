"""FriendlySAMTrainer against the two passes written by hand, with the real Trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fsam_ext import FriendlySAM

from .reference import SIZE, RandomStates, batches, difference, network, rows, train, warming

transformers = pytest.importorskip("transformers")
from transformers import Trainer, TrainerCallback, get_scheduler  # noqa: E402

from fsam_ext.integrations.transformers import FriendlySAMTrainer, FriendlySAMTrainerMixin  # noqa: E402

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
        "train_sampling_strategy": "sequential",
    }
    return transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=SIZE,
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
    decays: list[list] = [[], []]
    seen = set()  # tied weights are one parameter
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            if param.requires_grad and param not in seen:
                seen.add(param)
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
    "rho warm-up": ({}, {"rho": warming}, {}, {"rho": warming}),
    "rho warm-up, accumulation 3": (
        {},
        {"rho": warming},
        {"gradient_accumulation_steps": 3},
        {"rho": warming, "accumulate": 3},
    ),
    "every=2, reuse=0.3": ({}, {"every": 2, "reuse": 0.3}, {}, {"fsam": {"every": 2, "reuse": 0.3}}),
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


# ---- fp16 ------------------------------------------------------------------------------------------------------------


class Scaled(FriendlySAMTrainer):
    """Accelerate takes no fp16 on a CPU by name, but a GradScaler for it: what it sets up on a GPU, set up here."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"


class Overflows(Classifier):
    """Whose loss is infinite in some micro-batches: of the first pass, of the second, or of both."""

    def __init__(self, first, second, perturbed):
        super().__init__()
        self.left = {False: self.forwards(first), True: self.forwards(second)}
        self.perturbed = perturbed

    @staticmethod
    def forwards(bad):
        return iter([torch.inf if number in bad else 1.0 for number in range(16)])

    def forward(self, x, labels):
        return {"loss": super().forward(x, labels)["loss"] * next(self.left[self.perturbed()])}


@pytest.mark.parametrize("clip", (0.0, 0.05), ids=("", "clipping"))
@pytest.mark.parametrize("accumulate", (1, 3))
@pytest.mark.parametrize("where", ("nowhere", "first", "second", "both"))
def test_fp16_with_a_scaler_and_an_overflow(where, accumulate, clip, tmp_path, record):
    overflows = [(1, 4) if where in (which, "both") else () for which in ("first", "second")]
    model = Overflows(*overflows, lambda: trainer.optimizer.optimizer.is_perturbed)
    args = arguments(tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=clip)
    trainer = Scaled(model, args, train_dataset=dataset(), fsam=FSAM)
    trainer.train()
    other = Overflows(*overflows, lambda: optimizer.is_perturbed)
    optimizer = adamw(other, FSAM)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    how = {"epochs": 2, "accumulate": accumulate, "divide": len, "clip": clip or None, "autocast": torch.half}
    train(other, optimizer, data(), grad_scaler=scaler, loss=loss_of, **how)
    assert trainer.accelerator.scaler.get_scale() == scaler.get_scale()
    assert scaler.get_scale() > 2**10 or where != "nowhere"
    case = f"fp16, overflow {where}, accumulation {accumulate}{', clipping' if clip else ''}"
    record("transformers", case, difference(model, other))


# ---- What a run leaves -----------------------------------------------------------------------------------------------


class Counted(TrainerCallback):
    def __init__(self):
        self.calls = dict.fromkeys(("step_begin", "substep_end", "pre_optimizer", "optimizer", "step_end"), 0)

    def on_step_begin(self, *args, **kwargs):
        self.calls["step_begin"] += 1

    def on_substep_end(self, *args, **kwargs):
        self.calls["substep_end"] += 1

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.calls["pre_optimizer"] += 1

    def on_optimizer_step(self, *args, optimizer, **kwargs):
        assert not optimizer.optimizer.is_perturbed
        self.calls["optimizer"] += 1

    def on_step_end(self, *args, **kwargs):
        self.calls["step_end"] += 1


def test_callbacks_and_logs_are_of_the_first_pass(tmp_path, record, monkeypatch):
    asked = []
    stats = FriendlySAM.stats
    monkeypatch.setattr(FriendlySAM, "stats", lambda self: asked.append(None) or stats(self))
    counted = Counted()
    args = arguments(tmp_path, gradient_accumulation_steps=2, logging_steps=2, max_steps=6)
    trainer = FriendlySAMTrainer(Classifier(), args, train_dataset=dataset(), fsam=FSAM, callbacks=[counted])
    trainer.train()
    assert trainer.state.global_step == 6 and len(asked) == 3
    assert counted.calls == {"step_begin": 6, "substep_end": 6, "pre_optimizer": 6, "optimizer": 6, "step_end": 6}
    _, clean = by_hand(accumulate=2, optimizer=adamw)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 6]
    means = [sum(clean[i : i + 4]) / 4 for i in (0, 4, 8)]
    far = max(abs(entry["loss"] - mean) for entry, mean in zip(logged, means))
    record("transformers", "logged loss is the clean one (float32 sums)", far, limit=1e-6)
    for entry in logged:
        assert entry["fsam/noise_norm"] > 0 and entry["fsam/grad_norm"] > 0 and -1 <= entry["fsam/cosine"] <= 1
        assert entry["fsam/found_inf"] == 0 and "fsam/effective_cosine" not in entry


@pytest.mark.parametrize("extra", ({}, {"rho": warming}, {"reuse": 0.3}), ids=", ".join)
@pytest.mark.parametrize("accumulate", (1, 2))
def test_checkpoint_and_resume_in_mid_epoch(accumulate, extra, tmp_path, record):
    """With dropout and a random order: the Trainer saves the random numbers too."""
    how = {
        "gradient_accumulation_steps": accumulate,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 6 // accumulate,
        "train_sampling_strategy": "random",
        "seed": 3,
    }
    whole, resumed = (Classifier(dropout=0.5, batch_norm=True) for _ in range(2))
    fsam = {**FSAM, "every": 2, **extra}
    fit(tmp_path, whole, fsam, **how)
    trainer = FriendlySAMTrainer(resumed, arguments(tmp_path, **how), train_dataset=dataset(), fsam=fsam)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{6 // accumulate}"))
    assert trainer.state.global_step == 16 // accumulate
    case = ", ".join([f"resume in mid-epoch, accumulation {accumulate}", *extra])
    record("transformers", case, difference(resumed, whole))


def test_a_second_training_goes_on(tmp_path, record):
    model = Classifier()
    trainer = fit(tmp_path, model, num_train_epochs=1)
    trainer.train()
    other = Classifier()
    train(other, adamw(other, FSAM), data(), epochs=2, divide=len, loss=loss_of)
    record("transformers", "train() twice", difference(model, other))


def test_an_optimizer_of_ones_own_and_another_trainer(tmp_path, record):
    class Theirs(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 0.5 * model(x=inputs.pop("x"), labels=inputs.pop("labels"))["loss"]

    class Ours(FriendlySAMTrainerMixin, Theirs):
        pass

    model = Classifier()
    made = FriendlySAM(model.parameters(), lr=0.1, momentum=0.9, **FSAM)
    Ours(model, arguments(tmp_path), train_dataset=dataset(), optimizers=(made, None)).train()
    other = Classifier()
    half = {"loss": lambda model, batch: 0.5 * loss_of(model, batch), "epochs": 2}
    train(other, FriendlySAM(other.parameters(), lr=0.1, momentum=0.9, **FSAM), data(), **half)
    record("transformers", "the mixin, an optimizer of one's own", difference(model, other))
