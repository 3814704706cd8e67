"""What is measured: parameter shapes as real models have them, and models with batches for whole training steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.models import GPT2, ResNet50, SmallConvNet, SmallGPT

Shape = tuple[int, ...]
# Ends the name of a workload that was shrunk, so that its rows are not taken for those of the workload.
TINY = " (tiny)"


def resnet18() -> list[Shape]:
    """ResNet-18 for 1,000 classes (He et al. 2016): 62 tensors, 11.7 M parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, inputs, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and inputs != width:
                shapes += [(width, inputs, 1, 1), (width,), (width,)]
            inputs = width
    return [*shapes, (1000, 512), (1000,)]


def vit_b_16() -> list[Shape]:
    """ViT-B/16 at 224x224 (Dosovitskiy et al. 2021): 152 tensors, 86.6 M parameters."""
    d = 768
    shapes: list[Shape] = [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,)]
    for _ in range(12):
        shapes += [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,)]
        shapes += [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [*shapes, (d,), (d,), (1000, d), (1000,)]


def gpt2() -> list[Shape]:
    """GPT-2 124M with tied embeddings (Radford et al. 2019): 148 tensors."""
    d = 768
    shapes: list[Shape] = [(50257, d), (1024, d)]
    for _ in range(12):
        shapes += [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,)]
        shapes += [(4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [*shapes, (d,), (d,)]


def llama_1b_shard() -> list[Shape]:
    """One of eight FSDP shards of a 1.2 B Llama layout: each tensor cut in eight along its first dimension."""
    d, kv, hidden, vocab, ranks = 2048, 512, 8192, 128256, 8
    layer: list[Shape] = [(d, d), (kv, d), (kv, d), (d, d), (hidden, d), (hidden, d), (d, hidden), (d,), (d,)]
    whole: list[Shape] = [(vocab, d), *layer * 16, (d,)]
    return [(first // ranks, *rest) for first, *rest in whole]


def transformer_of(numel: int) -> list[Shape]:
    """Matrices and vectors as in a transformer of twelve layers, and an embedding that makes it ``numel`` in all."""
    width = math.isqrt(numel // 160)
    layer: list[Shape] = [(3 * width, width), (width, width), (4 * width, width), (4 * width, width)]
    shapes: list[Shape] = [*layer * 12, *[(width,)] * 48]
    return [*shapes, (numel - sum(math.prod(shape) for shape in shapes),)]


@dataclass(frozen=True)
class Workload:
    """Parameters to step over: a name, what it stands for, the shapes, and whether state is measured on it.

    The bytes of state for each parameter do not depend on the model, so one workload is enough for them.
    """

    name: str
    title: str
    shapes: tuple[Shape, ...]
    footprint: bool = False

    def tiny(self) -> Workload:
        """The first tensors, each of them small: for a dry run."""
        shapes = tuple(tuple(min(size, 16) for size in shape) for shape in self.shapes[:12])
        return replace(self, name=self.name + TINY, shapes=shapes)

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def parameters(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[nn.Parameter]:
        """Fresh parameters with the same values for each provider."""
        generator = torch.Generator(device).manual_seed(seed)
        params = []
        for shape in self.shapes:
            values = torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02, generator=generator)
            params.append(nn.Parameter(values))
        return params

    def gradients(self, dtype: torch.dtype, device: torch.device, seed: int = 1) -> list[Tensor]:
        """What a backward would have left."""
        generator = torch.Generator(device).manual_seed(seed)
        return [
            torch.empty(shape, dtype=dtype, device=device).normal_(std=1e-3, generator=generator)
            for shape in self.shapes
        ]


def _workload(name: str, title: str, shapes: list[Shape], footprint: bool = False) -> Workload:
    return Workload(name, title, tuple(shapes), footprint)


WORKLOADS = {
    workload.name: workload
    for workload in (
        _workload("resnet18", "ResNet-18", resnet18(), footprint=True),
        _workload("vit_b_16", "ViT-B/16", vit_b_16()),
        _workload("gpt2", "GPT-2 124M", gpt2()),
        _workload("llama_shard", "Llama 1B, 1/8 shard", llama_1b_shard()),
        _workload("tensors_1000", "1,000 tensors of 32x32", [(32, 32)] * 1000),
        _workload("tensors_10000", "10,000 tensors of 64", [(64,)] * 10_000),
        _workload("one_64m", "one tensor of 64M", [(1 << 26,)]),
    )
}


def scaling(largest: float) -> list[Workload]:
    """Workloads of 1e3, 1e4, ... parameters up to ``largest``, and ``largest`` itself."""
    sizes = [10**k for k in range(3, 9) if 10**k < largest] + [int(largest)]
    return [_workload(f"scale_{size:.0e}".replace("+", ""), f"{size:.0e}", transformer_of(size)) for size in sizes]


# ---- Whole training steps ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A model whose forward takes a batch and returns the loss, and how to make a batch.

    Attributes:
        base: the base optimizer that such a model is trained with.
        autocast: the forward runs in bfloat16 autocast over float32 weights, as GPUs are used; weights, gradients and
            state are float32 then.
        channels_last: the memory format in which convolutions run in autocast.
        shrunk: the same of a size for a dry run; where there is one, the workload itself is of a GPU's size.
    """

    name: str
    title: str
    base: str
    model: Callable[[], nn.Module]
    batch: Callable[[torch.device], Any]
    autocast: bool = False
    channels_last: bool = False
    shrunk: tuple[Callable[[], nn.Module], Callable[[torch.device], Any]] | None = None

    @property
    def dtype(self) -> str:
        """As rows say it."""
        return "autocast" if self.autocast else "fp32"

    def tiny(self) -> Training:
        model, batch = self.shrunk or (self.model, self.batch)
        return replace(self, name=self.name + TINY, model=model, batch=batch)


def _images(count: int, size: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images.to(device), torch.randint(classes, (count,), generator=generator).to(device)


def _tokens(count: int, length: int, vocabulary: int, device: torch.device) -> Tensor:
    """One more than ``length``: each token is the target of the ones before it."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (count, length + 1), generator=generator).to(device)


TRAININGS = {
    training.name: training
    for training in (
        Training(
            "train_convnet", "small convnet, batch 128 of 32x32", "sgd", SmallConvNet, partial(_images, 128, 32, 10)
        ),
        Training("train_gpt", "small GPT, 8 sequences of 128", "adamw", SmallGPT, partial(_tokens, 8, 128, 256)),
        Training(
            "train_gpt2",
            "GPT-2 124M, 8 sequences of 1,024",
            "adamw",
            GPT2,
            partial(_tokens, 8, 1024, 50257),
            autocast=True,
            shrunk=(partial(GPT2, 32, 2, 2, 16, 64), partial(_tokens, 2, 16, 64)),
        ),
        Training(
            "train_resnet50",
            "ResNet-50, batch 64 of 224x224",
            "sgd",
            ResNet50,
            partial(_images, 64, 224, 1000),
            autocast=True,
            channels_last=True,
            shrunk=(partial(ResNet50, 8, 10, (1, 1)), partial(_images, 2, 32, 10)),
        ),
    )
}
