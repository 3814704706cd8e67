"""This package's own providers, and every provider that runs on a device."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

import fsam_ext
from bench.measure import reason_of
from bench.peers import (
    LMBDA,
    RHO,
    SIGMA,
    Base,
    BaseOnly,
    Compiled,
    Foreach,
    Official,
    Plain,
    Provider,
    PytorchOptimizer,
    SamByHand,
    bytes_per_parameter,
)
from fsam_ext import backends


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
    kinds += [Official, SamByHand, Foreach, Compiled, BaseOnly, Plain]
    for name in others:
        more = {"backend": name, "name": f"fsam_ext {name}", "full_only": name == "reference"}
        more |= {
            "capturable": name != "reference",
            "not_captured": "it is the tests' oracle",
        }
        kinds.append(type(FsamExt.__name__, (FsamExt,), more))
    if PACKAGE not in missing_providers(device):
        kinds.append(PytorchOptimizer)
        default = {"name": "pytorch_optimizer default", "foreach": None, "full_only": True}
        kinds.append(type(PytorchOptimizer.__name__, (PytorchOptimizer,), default))
    return {kind.name: kind for kind in kinds}


PACKAGE = PytorchOptimizer.name


@cache
def missing_providers(device: torch.device) -> dict[str, str]:
    """Providers that exist and cannot run here: why not."""
    running = running_backends(device)
    missing = {f"fsam_ext {running[0]}": "'fsam_ext' is measured on this backend here"}
    for name, candidate in backends.CANDIDATES.items():
        if name not in running:
            missing[f"fsam_ext {name}"] = str(candidate(device)[1])
    reason = None
    if find_spec(PACKAGE) is None:
        reason = "it is not installed: pip install pytorch_optimizer"
    else:
        try:
            import_module(PACKAGE)
        except Exception as error:  # an installed package that does not fit this torch
            reason = f"it cannot be imported: {reason_of(error)}"
    if reason is not None:
        missing |= {PACKAGE: reason, f"{PACKAGE} default": reason}
    return missing
