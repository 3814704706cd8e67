"""timm: names for --opt, and a loss scaler that makes the second pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers
from timm.optim._optim_factory import default_registry
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn

from ..optimizer import FriendlySAM
from ..sam import SAM
from ..second_pass import SecondPass
from .exchange import refuse_local_ascents
from .logged import logged
from .versions import require

# NOTE [timm's registry]
# timm exports the class of its registry, but not the registry that create_optimizer_v2 looks into.

# NOTE [what timm's loop does not say]
# timm's loop hands the loss to its scaler, and neither the inputs nor the targets. They are kept by forward hooks: of
# the module that makes the loss (a task of timm.task, or the loss function), and of the model. The loop divides each
# loss by the number of a step's micro-batches, in place and after the hooks; so does the second pass, and for each new
# number it is checked that the two agree.

#: The bases that :func:`register` takes where it is given none.
BASES = ("sgd", "momentum", "adam", "adamw")


def register(*bases: str) -> list[str]:
    """Makes F-SAM and SAM around timm's optimizers known to ``create_optimizer_v2``, and so to ``--opt``.

    Args:
        bases: names of timm's optimizers, as ``--opt`` takes them; :data:`BASES` if there are none.

    Returns:
        The new names: ``fsam`` or ``sam`` before each base's, as in ``fsamadamw``. Their options are those of the base
        and of :class:`fsam_ext.FriendlySAM` (``--opt-kwargs rho=0.1``).

    Raises:
        ValueError: timm does not know a base.
        ImportError: another version of timm than the tested one.
    """
    require("timm", "1.0")
    names = []
    for base in bases or BASES:
        info = get_optimizer_info(base)
        for prefix, ours in (("fsam", FriendlySAM), ("sam", SAM)):
            made = partial(ours, base_optimizer=get_optimizer_class(base, bind_defaults=False))
            names.append(f"{prefix}{info.name}")
            if names[-1] not in list_optimizers():
                told = f"{ours.__name__} (fsam_ext) around: {info.description}"
                default_registry.register(replace(info, name=names[-1], opt_class=made, description=told))
    return names


@dataclass
class _Forward:
    """A forward pass of the loop: what it was called with, and the loss that came out."""

    autocast: torch.autocast
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    loss: Tensor | None = None


class TwoPassScaler:
    """Takes the place of timm's NativeScaler: with the last micro-batch of a step it makes the second pass.

    In timm's ``train.py``, after the loss function is made, with or without ``--amp``::

        loss_scaler = TwoPassScaler(optimizer, model, train_loss_fn)      # or TwoPassScaler(optimizer, task)

    Args:
        optimizer: a :class:`fsam_ext.FriendlySAM`, from ``--opt fsamadamw`` say.
        model: the module that the loop calls, DistributedDataParallel included; or a task of ``timm.task``, which
            returns a dict with the loss.
        loss_fn: the module that the loop calls with the output and the target; None where ``model`` is a task.
        grad_scaler: a torch.amp.GradScaler, for float16; None without.

    Raises:
        TypeError: the optimizer is none of this package, the loss function is no module and has no hooks, or the scaler
            is none of torch's.
        ValueError: ``ascent_sync=False``: timm's loop exchanges gradients in the last micro-batch of a first pass.
    """

    state_dict_key = "amp_scaler"

    def __init__(
        self,
        optimizer: FriendlySAM,
        model: nn.Module,
        loss_fn: nn.Module | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if loss_fn is not None and not isinstance(loss_fn, nn.Module):
            raise TypeError(f"loss_fn must be a torch.nn.Module, whose hooks see the targets, not {loss_fn!r}")
        if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, not {type(grad_scaler).__name__}")
        self._second_pass = SecondPass(optimizer, model)
        refuse_local_ascents(optimizer, "timm")
        self._optimizer = optimizer
        self._modules = [model] if loss_fn is None else [model, loss_fn]
        self._device = next(model.parameters()).device.type
        self._scaler = torch.amp.GradScaler(enabled=False) if grad_scaler is None else grad_scaler
        self._kept: list[_Forward] = []
        self._losses: list[Tensor] = []
        self._agreed: set[int] = set()
        self._replaying = False
        # Functions, because methods would take the scaler along into copies of the model (ModelEmaV3).
        model.register_forward_pre_hook(lambda *call: self._note_model(*call), with_kwargs=True)
        if loss_fn is not None:
            loss_fn.register_forward_pre_hook(lambda *call: self._note_loss_fn(*call), with_kwargs=True)
        self._modules[-1].register_forward_hook(lambda *call: self._note_loss(*call))

    def __call__(
        self,
        loss: Tensor,
        optimizer: FriendlySAM,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Iterable[Tensor] | None = None,
        create_graph: bool = False,
        need_update: bool = True,
    ) -> None:
        """The backward pass; with ``need_update`` the second pass, clipping of its gradient, and the step.

        Raises:
            TypeError: another optimizer than the scaler was made with.
            RuntimeError: there was not one forward pass for each loss, or the loss was changed otherwise than by
                dividing it by the number of micro-batches. The step is given up then.
        """
        if optimizer is not self._optimizer:
            raise TypeError(
                f"loss_scaler was called with another optimizer ({type(optimizer).__name__}) than it was made with; "
                "make a TwoPassScaler for the one that trains"
            )
        try:
            self._losses.append(loss.detach())
            self._scaler.scale(loss).backward(create_graph=create_graph)
            if need_update:
                self._finish(clip_grad, clip_mode, parameters, create_graph)
        except BaseException:
            self._forget()
            optimizer.restore()
            optimizer.zero_grad()
            raise
        if need_update:
            self._forget()

    def stats(self) -> dict[str, Tensor]:
        """What the last ascent measured, for ``update_summary``, as 0-d tensors. Reading one waits for the device."""
        return logged(self._optimizer)

    def state_dict(self) -> dict[str, Any]:
        """That of the GradScaler."""
        return self._scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads that of a GradScaler, timm's NativeScaler's too."""
        self._scaler.load_state_dict(state_dict)

    def _finish(self, clip: float | None, mode: str, parameters: Iterable[Tensor] | None, create_graph: bool) -> None:
        self._check_window()
        number = len(self._kept)

        def backward(kept: _Forward) -> None:
            self._scaler.scale(self._loss_again(kept) / number).backward(create_graph=create_graph)

        self._second_pass.run(backward, grad_scaler=self._scaler)
        if clip is not None:
            self._scaler.unscale_(self._optimizer)
            dispatch_clip_grad(parameters, clip, mode=mode)
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def _forget(self) -> None:
        self._second_pass.forget()
        self._kept, self._losses = [], []

    def _check_window(self) -> None:
        kept, losses = self._kept, self._losses
        if len(kept) != len(losses) or any(one.loss is None for one in kept):
            raise RuntimeError(
                f"the model was called {len(kept)} times for {len(losses)} losses, so the second pass cannot tell how "
                "to make them; give TwoPassScaler the one module that makes the loss (a task of timm.task)"
            )
        if len(kept) not in self._agreed:  # once for each length, because it waits for the device
            ours = torch.stack([one.loss for one in kept]) / len(kept)
            if not torch.allclose(ours, torch.stack(losses).to(ours), rtol=1e-3, equal_nan=True):
                raise RuntimeError(
                    "the loss was changed after the module that made it, otherwise than by dividing it by the number "
                    "of micro-batches, and the second pass would miss that; do it within the module"
                )
            self._agreed.add(len(kept))

    def _loss_again(self, kept: _Forward) -> Tensor:
        model, *loss_fn = self._modules
        (args, kwargs), *rest = kept.calls
        self._replaying = True
        try:
            with kept.autocast:
                output = model(*args, **kwargs)
                if not loss_fn:
                    return output["loss"]
                args, kwargs = rest[0]
                return loss_fn[0](output, *args, **kwargs)
        finally:
            self._replaying = False

    def _ignores(self, module: nn.Module) -> bool:
        """Whether a forward pass is none of a first pass: of a copy of the model, of evaluation, of the second pass."""
        ours = any(module is one for one in self._modules)
        return self._replaying or not (ours and module.training and torch.is_grad_enabled())

    def _note_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._ignores(module):
            return
        kind, cache = self._device, torch.is_autocast_cache_enabled()
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        self._kept.append(_Forward(torch.autocast(kind, dtype, enabled, cache), [(args, kwargs)]))
        self._second_pass.keep(self._kept[-1])

    def _note_loss_fn(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._kept and len(self._kept[-1].calls) == 1 and not self._ignores(module):
            self._kept[-1].calls.append((args[1:], kwargs))

    def _note_loss(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._kept and self._kept[-1].loss is None and not self._ignores(module):
            loss = output["loss"] if isinstance(output, dict) else output
            self._kept[-1].loss = loss.detach().clone()
