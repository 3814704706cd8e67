"""The implementations that are compared, all behind one small interface.

A provider is made from parameters and then called twice a step: ``ascend()`` with the first gradients in ``.grad``,
``descend()`` with the second ones. Everything that it needs between calls is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fsam_ext
from fsam_ext import backends

RHO, SIGMA, LMBDA, EPS = 0.05, 1.0, 0.9, 1e-12


@dataclass(frozen=True)
class Base:
    """A base optimizer and its options."""

    name: str
    optimizer: type[torch.optim.Optimizer]
    options: tuple[tuple[str, float], ...]

    def make(self, params: Sequence[nn.Parameter], **more: Any) -> torch.optim.Optimizer:
        return self.optimizer(params, **dict(self.options), **more)


BASES = {
    "sgd": Base("sgd", torch.optim.SGD, (("lr", 1e-3), ("momentum", 0.9), ("weight_decay", 1e-4))),
    "adamw": Base("adamw", torch.optim.AdamW, (("lr", 1e-4), ("weight_decay", 1e-2))),
}


class Provider:
    """One implementation of F-SAM over some parameters.

    Attributes:
        name: who is measured; rows carry it.
        buffers: an upper bound of the tensors of the parameters' size that exist during a step, gradients included.
        full_only: too slow or too close to another one for the short run.
        capturable: a CUDA graph can hold its step.
        is_fsam: it does the work of F-SAM, so that a ratio to it compares like with like.
        eager: its op calls pass through the dispatcher, where they can be counted.
        dtypes: those of the parameters that it is for; None: all.
    """

    name: ClassVar[str]
    backend = "torch"
    buffers = 7
    full_only = False
    capturable = False
    is_fsam = True
    eager = True
    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = None

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        self.params = params

    @classmethod
    def bytes_per_parameter(cls, dtype: torch.dtype, base: str) -> float:
        """What F-SAM with this provider's state must move: :func:`bytes_per_parameter`."""
        return bytes_per_parameter(dtype, base)

    def ascend(self) -> None:
        raise NotImplementedError

    def descend(self) -> None:
        raise NotImplementedError

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None


class Official(Provider):
    """The sequence of operations of the official implementation, one tensor after the other."""

    name = "official"

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        super().__init__(params, base)
        self.base = base.make(params)
        self.average: dict[nn.Parameter, Tensor] = {}
        self.saved: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def ascend(self) -> None:
        for p in self.params:
            gradient = p.grad.clone()
            if p in self.average:
                p.grad -= self.average[p] * SIGMA
                self.average[p] = self.average[p] * LMBDA + gradient * (1 - LMBDA)
            else:
                self.average[p] = gradient
        norm = torch.norm(torch.stack([(1.0 * p.grad).norm(p=2) for p in self.params]), p=2)
        scale = RHO / (norm + EPS)
        for p in self.params:
            self.saved[p] = p.data.clone()
            p.add_(1.0 * p.grad * scale.to(p))

    @torch.no_grad()
    def descend(self) -> None:
        for p in self.params:
            p.data = self.saved[p]
        self.base.step()


def foreach_ascent(
    params: list[Tensor],
    grads: list[Tensor],
    average: list[Tensor],
    saved: list[Tensor],
    weight: Tensor,
) -> None:
    """The ascent in horizontally fused operations; ``weight`` of the gradient in the average is 1 in the first step."""
    noise = torch._foreach_sub(grads, average, alpha=SIGMA)
    torch._foreach_lerp_(average, grads, weight)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(noise)))
    torch._foreach_mul_(noise, RHO / (norm + EPS))
    torch._foreach_copy_(saved, params)
    torch._foreach_add_(params, noise)


class Foreach(Provider):
    """F-SAM in torch._foreach operations and the fused base optimizer: what one can write in a screenful."""

    name = "foreach"

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        super().__init__(params, base)
        self.base = base.make(params, fused=True)
        self.average = [torch.zeros_like(p) for p in params]
        self.saved = [torch.empty_like(p) for p in params]
        # For the lerp the weight has the dtype of the parameters.
        self.first = torch.ones((), dtype=params[0].dtype, device=params[0].device)
        self.later = torch.full_like(self.first, 1 - LMBDA)
        self.weight = self.first

    def _ascent(self, *args: Any) -> None:
        foreach_ascent(*args)

    @torch.no_grad()
    def ascend(self) -> None:
        grads = [p.grad for p in self.params]
        self._ascent(self.params, grads, self.average, self.saved, self.weight)
        self.weight = self.later

    @torch.no_grad()
    def descend(self) -> None:
        torch._foreach_copy_(self.params, self.saved)
        self.base.step()


class Compiled(Foreach):
    """The same under torch.compile, the restore compiled together with the base update."""

    name = "compiled"
    eager = False

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        super().__init__(params, base)
        self.base = base.make(params, foreach=True)
        self._ascent = torch.compile(foreach_ascent, fullgraph=True)
        self._descend = torch.compile(self._restore_and_step)

    def _restore_and_step(self) -> None:
        torch._foreach_copy_(self.params, self.saved)
        self.base.step()

    @torch.no_grad()
    def descend(self) -> None:
        self._descend()


class PytorchOptimizer(Provider):
    """``FriendlySAM`` of the package pytorch_optimizer, with its horizontally fused operations."""

    name = "pytorch_optimizer"
    foreach: bool | None = True

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        from pytorch_optimizer import FriendlySAM

        super().__init__(params, base)
        options = {"rho": RHO, "sigma": SIGMA, "lmbda": LMBDA, "perturb_eps": EPS, **dict(base.options)}
        try:
            self.optimizer = FriendlySAM(params, base.optimizer, foreach=self.foreach, **options)
        except TypeError:  # a release that has no such option: it goes to the base optimizer, which may not know it
            self.optimizer = FriendlySAM(params, base.optimizer, **options)

    def ascend(self) -> None:
        self.optimizer.first_step()

    def descend(self) -> None:
        self.optimizer.second_step()


class BaseOnly(Provider):
    """The fused base optimizer alone: what a user pays without F-SAM."""

    name = "base"
    is_fsam = False
    buffers = 3

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        super().__init__(params, base)
        self.base = base.make(params, fused=True)

    def ascend(self) -> None:
        pass

    def descend(self) -> None:
        self.base.step()


class FsamExt(Provider):
    """This package, on one of its backends."""

    name = "fsam_ext"
    buffers = 5
    capturable = True
    sigma = SIGMA
    options: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        super().__init__(params, base)
        self.optimizer = fsam_ext.FriendlySAM(
            params,
            base.optimizer,
            rho=RHO,
            sigma=self.sigma,
            lmbda=LMBDA,
            backend=self.backend,
            capturable=params[0].is_cuda,
            **self.options,
            **dict(base.options),
        )

    @classmethod
    def bytes_per_parameter(cls, dtype: torch.dtype, base: str) -> float:
        """As for every provider, with the masters and the average that the options ask for."""
        average = cls.options.get("ema_dtype")
        return bytes_per_parameter(dtype, base, cls.options.get("master_weights", False), average)

    def ascend(self) -> None:
        self.optimizer.first_step()

    def descend(self) -> None:
        self.optimizer.second_step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


class FsamExtFlat(FsamExt):
    """This package, with parameters and gradients in one flat buffer."""

    name = "fsam_ext flat"
    buffers = 7  # the unflattened originals exist while they are moved

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        fsam_ext.flatten_parameters(nn.ParameterList(params), grads=True)
        super().__init__(params, base)


class FsamExtInt8(FsamExt):
    """This package with an average in eight bits."""

    name = "fsam_ext int8"
    options = MappingProxyType({"ema_dtype": torch.int8})
    full_only = True


class FsamExtMasters(FsamExt):
    """This package with float32 masters of 16-bit parameters."""

    name = "fsam_ext masters"
    buffers = 8
    dtypes = (torch.bfloat16, torch.float16)
    options = MappingProxyType({"master_weights": True})


class FsamExtMastersBfloat16(FsamExtMasters):
    """The same with an average in bfloat16."""

    name = "fsam_ext masters, bf16"
    options = MappingProxyType({"master_weights": True, "ema_dtype": torch.bfloat16})


class FsamExtMastersInt8(FsamExtMasters):
    """The same with an average in eight bits."""

    name = "fsam_ext masters, int8"
    options = MappingProxyType({"master_weights": True, "ema_dtype": torch.int8})


class Sam(FsamExt):
    """This package at sigma = 0: plain SAM."""

    name = "sam"
    sigma = 0.0
    is_fsam = False


def running_backends(device: torch.device) -> list[str]:
    """The names of this package's backends that serve the device, the preferred one first."""
    return [name for name, candidate in backends.CANDIDATES.items() if candidate(device)[0] is not None]


def all_providers(device: torch.device) -> dict[str, type[Provider]]:
    """Every provider that runs on the device, by a label that is unique."""
    preferred, *others = running_backends(device)
    kinds: list[type[Provider]] = [
        type(kind.__name__, (kind,), {"backend": preferred})
        for kind in (FsamExt, FsamExtFlat, FsamExtMasters, FsamExtMastersBfloat16, FsamExtMastersInt8, FsamExtInt8, Sam)
    ]
    kinds += [Official, Foreach, Compiled, BaseOnly]
    for name in others:
        more = {"backend": name, "name": f"fsam_ext {name}", "full_only": name == "reference"}
        kinds.append(type(FsamExt.__name__, (FsamExt,), {**more, "capturable": name != "reference"}))
    if _importable("pytorch_optimizer"):
        kinds.append(PytorchOptimizer)
        default = {"name": "pytorch_optimizer default", "foreach": None, "full_only": True}
        kinds.append(type(PytorchOptimizer.__name__, (PytorchOptimizer,), default))
    return {kind.name: kind for kind in kinds}


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


# ---- The bytes that a step must move -------------------------------------------------------------------------------


def bytes_per_parameter(
    dtype: torch.dtype, base: str, masters: bool = False, average: torch.dtype | None = None
) -> float:
    """What the three passes of F-SAM read and write for each parameter, each value once (docs/design.md).

    Pass A reads g and m; pass B reads g, m and w and writes m, w' and the backup; pass C reads the backup, g and the
    base optimizer's state and writes w and the state. Weights, gradients and the backup have the dtype of the
    parameters, the state is float32 (float64 for float64), and so is the average unless ``average`` is its dtype (int8
    has a float32 scale for each 128 elements). With ``masters`` there is no backup: pass B reads the master in place of
    w, and pass C reads and writes it and writes w.
    """
    low = dtype.itemsize
    state = 8 if dtype == torch.float64 else 4
    ema = state if average is None else average.itemsize + (4 / 128 if average == torch.int8 else 0)
    weight = state if masters else low
    noise_norm = low + ema
    perturb = (low + weight + ema) + (low + ema) + (0 if masters else low)
    moments = {"sgd": state, "adamw": 2 * state}[base]
    restore = (low + weight + moments) + (low + moments) + (state if masters else 0)
    return noise_norm + perturb + restore
