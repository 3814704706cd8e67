"""Models of transformers and peft in the Trainer and in Accelerate: losses over a window, LoRA, checkpointing."""

from __future__ import annotations

import pytest
import torch

from fsam_ext import FriendlySAM

from .reference import SIZE, RandomStates, difference, train

transformers = pytest.importorskip("transformers")
from fsam_ext.integrations.transformers import FriendlySAMTrainer  # noqa: E402

from .test_transformers import FSAM, adamw, arguments, loss_of  # noqa: E402


def texts(count=8):
    """Sentences of unlike length, as labels count: the Trainer divides by the labels of all micro-batches."""
    draw = torch.Generator().manual_seed(2)
    found = []
    for number in range(count):
        tokens = torch.randint(1, 30, (SIZE, 6), generator=draw)
        labels = tokens.clone()
        labels[:, 4 - number % 3 :] = -100
        found.append({"input_ids": tokens, "labels": labels})
    return found


def counted(accumulate=1):
    """The same with the number of labels of the whole window, as the Trainer hands it to models."""
    data = texts()
    for first in range(0, len(data), accumulate):
        window = data[first : first + accumulate]
        items = sum((batch["labels"] != -100).sum() for batch in window)
        for batch in window:
            batch["num_items_in_batch"] = items
    return data


def sentences():
    return [{name: value[row] for name, value in batch.items()} for batch in texts() for row in range(SIZE)]


def language_model(dropout=0.0, lora=False, checkpointing=False):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=32,
            n_positions=8,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
        model = transformers.GPT2LMHeadModel(config)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=dropout, target_modules=["c_attn"]))
            with torch.no_grad():
                for name, param in model.named_parameters():
                    if "lora_B" in name:
                        param.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("case", ("", "gradient checkpointing", "LoRA", "LoRA, gradient checkpointing"))
@pytest.mark.parametrize("accumulate", (1, 3))
def test_language_models(accumulate, case, tmp_path, record):
    """With dropout; each micro-batch's loss is divided by the labels of the whole window, as the Trainer has it."""
    how = {"dropout": 0.1, "lora": "LoRA" in case}
    checkpointing = "checkpointing" in case
    model = language_model(**how)
    args = arguments(
        tmp_path,
        gradient_accumulation_steps=accumulate,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
    )
    trainer = FriendlySAMTrainer(model, args, train_dataset=sentences(), fsam=FSAM)
    states = RandomStates(trainer.model, lambda: trainer.optimizer.optimizer.is_perturbed)
    trainer.train()
    assert len(states) == 16
    other = language_model(**how, checkpointing=checkpointing)
    other.train()
    hand = {"divide": lambda window: 1, "loss": loss_of, "epochs": 2, "accumulate": accumulate, "states": states}
    clean = train(other, adamw(other, FSAM), counted(accumulate), **hand)
    name = f"GPT-2{', ' if case else ''}{case}, accumulation {accumulate}"
    record("transformers", name, difference(model, other))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if accumulate == 1:
        record("transformers", f"{name}: logged loss", max(abs(a - b) for a, b in zip(logged, clean, strict=True)))


@pytest.mark.parametrize("lora, left_out", ((False, ".wte."), (True, "lora_A")), ids=("embeddings", "LoRA"))
def test_a_group_that_is_not_perturbed(lora, left_out, tmp_path, record):
    """The Trainer makes its groups itself, so whoever wants others makes the optimizer."""

    def optimizer_of(model):
        groups = [{"params": [], "perturb": True}, {"params": [], "perturb": False}]
        for name, param in model.named_parameters():
            if param.requires_grad:
                groups[left_out in name]["params"].append(param)
        assert all(group["params"] for group in groups)
        return FriendlySAM(groups, torch.optim.AdamW, lr=0.02, **FSAM)

    model, other = language_model(lora=lora), language_model(lora=lora)
    made, plain = optimizer_of(model), optimizer_of(other)
    args = arguments(tmp_path, lr_scheduler_type="linear")
    FriendlySAMTrainer(model, args, train_dataset=sentences(), optimizers=(made, None)).train()
    schedule = transformers.get_scheduler("linear", plain, num_warmup_steps=0, num_training_steps=16)
    train(other.train(), plain, counted(), epochs=2, loss=loss_of, scheduler=schedule)
    record("transformers", f"GPT-2, perturb=False of {left_out}", difference(model, other))


@pytest.mark.parametrize("case", ("LoRA", "LoRA, gradient checkpointing"))
@pytest.mark.parametrize("accumulate", (1, 3))
def test_lora_in_accelerate(accumulate, case, record):
    """Dropout within the adapters; the frozen weights have no gradient and are not moved."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    from fsam_ext.integrations.accelerate import TwoPass

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    how = {"dropout": 0.1, "lora": True, "checkpointing": "checkpointing" in case}
    ours, reference = language_model(**how).train(), language_model(**how).train()
    frozen = {name: param.clone() for name, param in ours.named_parameters() if not param.requires_grad}
    optimizer, plain = (adamw(model, FSAM) for model in (ours, reference))
    states = RandomStates(ours, lambda: optimizer.is_perturbed)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, prepared, data = accelerator.prepare(
        ours, optimizer, torch.utils.data.DataLoader(sentences(), batch_size=SIZE)
    )
    step = TwoPass(accelerator, model, prepared, loss_of, clip=1.0)
    losses = [step(batch).item() for _ in range(2) for batch in data]
    hand = {"epochs": 2, "accumulate": accumulate, "states": states, "clip": 1.0, "loss": loss_of}
    assert losses == train(reference, plain, texts(), **hand)
    assert all(torch.equal(ours.get_parameter(name), value) for name, value in frozen.items())
    record("accelerate", f"GPT-2, {case}, accumulate {accumulate}", difference(ours, reference))
