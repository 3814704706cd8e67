"""What is measured: parameter shapes as real models have them, and two small models for whole training steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]


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
    """Parameters to step over: a name, what it stands for, and the shapes."""

    name: str
    title: str
    shapes: tuple[Shape, ...]

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


def _workload(name: str, title: str, shapes: list[Shape]) -> Workload:
    return Workload(name, title, tuple(shapes))


WORKLOADS = {
    workload.name: workload
    for workload in (
        _workload("resnet18", "ResNet-18", resnet18()),
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


class SmallConvNet(nn.Module):
    """Three stages of convolutions for 32x32 images, 0.3 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 32), (32, 64), (64, 128), (128, 128)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4, 10))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.body(images), labels)


class SmallGPT(nn.Module):
    """A causal transformer over bytes, pre-norm, 6.5 M parameters."""

    def __init__(self, width: int = 256, layers: int = 8, context: int = 128) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, batch: Tensor) -> Tensor:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        hidden = self.blocks(self.token(inputs) + self.position, mask=self.mask, is_causal=True)
        return F.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Training:
    """A model whose forward takes a batch and returns the loss, and how to make a batch."""

    name: str
    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[torch.device], object]


def _images(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(128, 3, 32, 32, generator=generator)
    return images.to(device), torch.randint(10, (128,), generator=generator).to(device)


def _text(device: torch.device) -> Tensor:
    return torch.randint(256, (8, 129), generator=torch.Generator().manual_seed(0)).to(device)


TRAININGS = {
    training.name: training
    for training in (
        Training("train_convnet", "small convnet, batch 128 of 32x32", SmallConvNet, _images),
        Training("train_gpt", "small GPT, 8 sequences of 128", SmallGPT, _text),
    )
}
