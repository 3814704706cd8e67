"""Parameters (and gradients) of a module laid out in one flat buffer: a step then sees one row whatever the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .flat_state import aligned_numel, filled_flat, memory_view
from .tensors import check_disjoint, is_dense


class FlatParameters:
    """The flat buffers behind some parameters of one dtype on one device.

    Attributes:
        data: 1-d tensor that holds every parameter, each starting on a line of 128 bytes.
        grad: 1-d tensor of the same layout that holds every gradient, or None.
        offset: parameter -> position of its first element.
    """

    def __init__(self, params: list[nn.Parameter], grads: bool) -> None:
        self.offset: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        first = params[0]
        numel = 0
        for param in params:
            self.offset[param] = numel
            numel += aligned_numel(param.numel(), param.dtype)
        self.data = filled_flat(numel, first.dtype, first.device, 0.0)
        self.grad: Tensor | None = filled_flat(numel, first.dtype, first.device, 0.0) if grads else None
        for param in params:
            view = memory_view(self.data, self.offset[param], param.data)
            view.copy_(param.data)
            param.data = view
            if self.grad is not None:
                grad = memory_view(self.grad, self.offset[param], param.data)
                if param.grad is not None:
                    grad.copy_(param.grad)
                param.grad = grad
            REGISTRY.add(param, self)

    def holds(self, param: Tensor) -> bool:
        """Whether the parameter's values are (still) here: ``model.half()`` and the like move them away."""
        return param.dtype == self.data.dtype and param.data_ptr() == self._address(self.data, param)

    def holds_grad(self, param: Tensor) -> bool:
        """Whether the parameter's gradient is here."""
        return (
            self.grad is not None
            and param.grad is not None
            and param.grad.dtype == self.grad.dtype
            and (param.grad.shape, param.grad.stride()) == (param.shape, param.stride())
            and param.grad.data_ptr() == self._address(self.grad, param)
        )

    def _address(self, flat: Tensor, param: Tensor) -> int:
        return flat.data_ptr() + self.offset[param] * flat.element_size()

    def zero_grad(self, params: Sequence[Tensor]) -> None:
        """Zeroes the gradients of ``params``, and puts back those that ``set_to_none`` may have taken away.

        Not those of parameters that were frozen since: a gradient of zero would go on moving them, by momentum.
        """
        assert self.grad is not None
        for param in params:
            if not param.requires_grad:
                param.grad = None
        params = [param for param in params if param.requires_grad]
        for param in params:
            if not self.holds_grad(param):
                param.grad = memory_view(self.grad, self.offset[param], param)
                REGISTRY.generation += 1
        if len(params) == len(self.offset):
            self.grad.zero_()
        elif params:  # the others are another optimizer's
            torch._foreach_zero_([param.grad for param in params])


class Registry:
    """Which parameters live in which :class:`FlatParameters`.

    ``generation`` changes when a parameter or a gradient has come (back) into a flat buffer, so that whoever found it
    outside looks again.
    """

    def __init__(self) -> None:
        self._owner: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.generation = 0

    def __len__(self) -> int:
        return len(self._owner)

    def add(self, param: Tensor, owner: FlatParameters) -> None:
        """Notes where a parameter lives now."""
        self._owner[param] = owner
        self.generation += 1

    def get(self, param: Tensor) -> FlatParameters | None:
        """Where a parameter lives; None where that is no flat buffer (any more)."""
        owner = self._owner.get(param)
        if owner is not None and not owner.holds(param):
            del self._owner[param]
            self.generation += 1
            return None
        return owner


REGISTRY = Registry()


def flatten_parameters(module: nn.Module, grads: bool = False) -> list[FlatParameters]:
    """Moves a module's trainable parameters into one flat buffer for each dtype and device.

    A step is then three op calls over one row, whatever the number of parameters. Values, shapes and strides stay;
    every parameter becomes a view, which code that compares storages (safetensors, pointer-sharing tools, FSDP2) sees.
    Call it once the module is on its device and in its dtype, before or after the optimizer is made.

    Args:
        module: its parameters that require a gradient are moved; frozen ones stay where they are.
        grads: lay the gradients out the same way. They are then kept, and zeroed in one pass, by the ``zero_grad`` of
            this package's optimizers; gradients that something else replaces are found, and cost the one-row layout
            but not correctness.

    Returns:
        One :class:`FlatParameters` for each dtype and device.

    Raises:
        TypeError: a parameter is no plain tensor (a DTensor, say).
        ValueError: a parameter is on the meta device, sparse, has gaps or overlaps in memory, or shares
            it with another.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for name, param in module.named_parameters():
        if not param.requires_grad:
            continue
        if type(param.data) is not Tensor:
            raise TypeError(
                f"flatten_parameters cannot move parameter '{name}' of type {type(param.data).__name__}; "
                "leave sharded or wrapped modules unflattened"
            )
        if param.is_meta or param.layout != torch.strided:
            raise ValueError(
                f"flatten_parameters cannot move parameter '{name}' ({param.device}, {param.layout}); "
                "materialise it as a dense tensor first"
            )
        if not is_dense(param):
            raise ValueError(
                f"flatten_parameters cannot move parameter '{name}' with strides {tuple(param.stride())}: it has gaps "
                "or overlaps in memory; call .contiguous() on it"
            )
        kinds.setdefault((param.dtype, param.device), []).append(param)
    names = {param: f"parameter '{name}'" for name, param in module.named_parameters()}
    for params in kinds.values():
        check_disjoint(params, names.__getitem__)
    return [FlatParameters(params, grads) for params in kinds.values()]
