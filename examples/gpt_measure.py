"""What is measured of a trained model: its loss, the damage of quantization, and forgetting under fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gpt_model import GPT
from gpt_tokens import Text
from gpt_training import FINETUNE_LRS, Recipe, Stretch, Training
from torch import Tensor
from training import DeferredInterrupt, Interrupted

QUANTIZED_BLOCK = 64
BITS = (4, 3)
POINTS = 6  # on the curve of a fine-tuning, besides its start
EVALUATION_BATCH = 32


class Point(NamedTuple):
    """Where a fine-tuning is after some steps."""

    step: int
    loss1: float  # on what is held out of text 1, which it forgets
    loss2: float  # of text 2, which it learns


@torch.no_grad()
def loss(model: GPT, windows: Tensor) -> float:
    """Nats a token over ``windows``, int64 [count, context + 1]."""
    total = sum(float(model.loss(part)) * len(part) for part in windows.split(EVALUATION_BATCH))
    return total / len(windows)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """``weight``, each block of 64 rounded to the nearest multiple of a scale that maps its largest value to the last
    of the ``2 ** (bits - 1) - 1`` levels on a side. Blocks run along the rows; the last one may be short."""
    flat = weight.flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % QUANTIZED_BLOCK)).view(-1, QUANTIZED_BLOCK)
    scale = padded.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    levels = (padded / scale.clamp_min(torch.finfo(weight.dtype).tiny)).round()
    return (levels * scale).flatten()[: len(flat)].view_as(weight)


def quantized(model: GPT, bits: int) -> GPT:
    """A copy of ``model`` whose blocks have matrices of ``bits`` bits; embeddings, biases and norms stay."""
    rough = copy.deepcopy(model)
    with torch.no_grad():
        for weight in rough.block_weights():
            weight.copy_(rounded(weight, bits))
    return rough


def finetune(
    model: GPT,
    lr: float,
    recipe: Recipe,
    seed: int,
    texts: tuple[Text, Text],
    interrupt: DeferredInterrupt,
    after_step: Callable[[], Any],
) -> list[Point]:
    """Trains a copy of ``model`` on text 2 with plain AdamW at a constant ``lr``: the curve, its start first."""
    training = Training(Stretch("adamw", recipe.finetune, 0, lr), recipe, seed, texts[1].train)
    training.model.load_state_dict(model.state_dict())
    measured_at = {round(recipe.finetune * i / POINTS) for i in range(1, POINTS + 1)}

    def point() -> Point:
        return Point(training.step, *(loss(training.model, text.held_out) for text in texts))

    curve = [point()]
    while training.step < recipe.finetune:
        training.train_step()
        after_step()
        if interrupt.requested:
            raise Interrupted("while fine-tuning")
        if training.step in measured_at:
            curve.append(point())
    return curve


def measure(
    model: GPT,
    recipe: Recipe,
    seed: int,
    texts: tuple[Text, Text],
    interrupt: DeferredInterrupt,
    after_step: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Everything of one arm, as JSON can hold it."""
    figures: dict[str, Any] = {"loss": loss(model, texts[0].held_out)}
    for bits in BITS:
        figures[f"loss{bits}"] = loss(quantized(model, bits), texts[0].held_out)
    figures["finetune"] = [finetune(model, lr, recipe, seed, texts, interrupt, after_step) for lr in FINETUNE_LRS]
    return figures


def forgetting(curve: list[Point]) -> float:
    """What text 1 has lost by the end."""
    return curve[-1].loss1 - curve[0].loss1


def forgetting_at(curve: list[Point], loss2: float) -> float:
    """What text 1 has lost when text 2 had come down to ``loss2``, between points linearly.

    ``nan`` where the curve does not reach it.
    """
    for before, after in zip(curve, curve[1:]):
        if after.loss2 <= loss2 <= before.loss2:
            share = (before.loss2 - loss2) / (before.loss2 - after.loss2) if before.loss2 > after.loss2 else 0.0
            return before.loss1 + share * (after.loss1 - before.loss1) - curve[0].loss1
    return float("nan")
