"""What torch promises of any optimizer's state: it is saved, loaded, copied and moved."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from . import options
from .schedule import Progress
from .state import checkpoints
from .state.entries import moved
from .state.tensors import name_of
from .step import loading, protocol
from .step.base_update import FusedBase, GenericBase
from .step.passes import Passes
from .step.transaction import Stage

# What a copy or a pickle keeps beside groups and state.
_COPIED = ("base_class", "backend", "capturable", "ascent_sync", "rounding_seed", "schedule", "_base")


class StatefulOptimizer(Optimizer):
    """The part of :class:`fsam_ext.FriendlySAM` that is about state at rest, between steps."""

    _base: FusedBase | GenericBase
    _passes: Passes

    def _begin(self) -> None:
        """Sets up what no copy takes along."""
        # Wrappers of frameworks borrow this class and pass on what they lack: what is set must be set here.
        self._itself = weakref.ref(self)
        self._options = options.Watched()
        self._passes = Passes(self._base, self.backend, self.rounding_seed)
        self._progress = Progress(self, self.schedule)

    @property
    def _stage(self) -> Stage:
        passes = getattr(self, "_passes", None)  # there is none yet while the constructor adds the groups
        return Stage.CLEAN if passes is None else passes.transaction.stage

    def state_dict(self) -> dict[str, Any]:
        """The complete state: the average and the base optimizer's state, never a backup.

        Hooks run as torch's do: what they are given and give back is the whole.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        protocol.refuse_while_perturbed(self._stage, "state_dict()")
        state_dict = loading.packed(self._base, self.state, self.param_groups)
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of this class, of the official F-SAM code, or of a plain torch optimizer.

        Options and state that a checkpoint lacks keep their present value, or start anew. Dtypes are kept: torch
        itself would round the float32 state of bfloat16 parameters.

        Raises:
            RuntimeError: the weights are perturbed.
            ValueError: the checkpoint does not fit; nothing has changed then.
        """
        if isinstance(state_dict, dict):
            state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        protocol.refuse_while_perturbed(self._stage, "load_state_dict()")
        translated = checkpoints.translate(state_dict, self.param_groups)
        options.check_loaded(translated["param_groups"], self.defaults, self._base)
        describe = partial(name_of, self.param_groups)
        state, groups = loading.read(self._base, translated, self.param_groups, describe)
        self._itself().__dict__.update(state=state, param_groups=groups)
        self._passes.layout.forget()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    @torch.no_grad()
    def move_state(self, device: torch.device | str | None = None) -> None:
        """Moves all state to another device, to have its memory for a while; to the parameters' where it is None.

        The backup is freed too. The next step brings state back by itself, and goes on to the bit.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        protocol.refuse_while_perturbed(self._stage, "move_state()")
        for param, entry in self.state.items():
            for name, value in entry.items() if isinstance(entry, dict) else ():
                entry[name] = moved(value, param, device)

    def __getstate__(self) -> dict[str, Any]:
        protocol.refuse_while_perturbed(self._stage, "A copy or pickle of the optimizer")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _COPIED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def __getattr__(self, name: str) -> Any:
        # Schedule-free optimizers: train() and eval() move the weights to where the next step, or a test, wants them.
        base = self.__dict__.get("_base") if name in ("train", "eval") else None
        if base is None or not hasattr(base.optimizer, name):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return partial(self._switch, name)

    @torch.no_grad()
    def _switch(self, mode: str) -> None:
        protocol.refuse_while_perturbed(self._stage, f"{mode}()")
        self._base.prepare(self.state, self.param_groups)
        getattr(self._base.optimizer, mode)()
        self._base.merge(self.state, self.param_groups)
