"""Finds calls at which the host waits for a device, on machines that have no such device."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Kernels that a device runs without the host, and for which fake tensors have no stand-in.
RUN_ON_THE_DEVICE = (torch.ops.aten._fused_sgd_.default,)
READ_BACK = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class HostWaits(TorchDispatchMode):
    """Within it ``found`` gets the name of each operator that needs values, or makes a copy, of a device's tensors.

    Under it a value that is read back is 1, so that all are found and not the first one only. Around it, for fake
    tensors of a device that is not there, belongs a FakeTensorMode.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RUN_ON_THE_DEVICE:
            return None
        on_device = any(self._is_there(leaf) for leaf in tree_leaves((args, kwargs)))
        if on_device and (READ_BACK & set(func.tags) or func is torch.ops.aten._local_scalar_dense.default):
            self.found.append(func.name())
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        result = func(*args, **kwargs)
        if on_device and any(
            isinstance(leaf, torch.Tensor) and not self._is_there(leaf) for leaf in tree_leaves(result)
        ):
            self.found.append(func.name())
        return result

    def _is_there(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.device.type == self.device_type
