"""F-SAM in Hugging Face's Trainer: ``FriendlySAMTrainer(model, args, train_dataset=..., fsam={"rho": 0.05})``.

NOTE [the Trainer's last micro-batch]
``training_step`` makes the forward and backward pass of one micro-batch, and is there to be overridden. In the last
one of a step (``accelerator.sync_gradients``) the first gradient is whole when it returns, and the Trainer clips and
steps after that: the second pass belongs in between.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

from ..optimizer import FriendlySAM
from ..second_pass import SecondPass
from .exchange import refuse_local_ascents
from .logged import logged
from .versions import require


class FriendlySAMTrainerMixin:
    """Puts F-SAM into a Trainer: ``class Mine(FriendlySAMTrainerMixin, SomeTrainer)``.

    The optimizer that ``args.optim`` names (or ``optimizer_cls_and_kwargs``) becomes the base optimizer of a
    :class:`fsam_ext.FriendlySAM`, with its param groups and options; or ``optimizers=`` brings one that is made
    already. Precision, accumulation, clipping, schedulers, checkpoints and logs are the Trainer's as ever: the logged
    loss is that of the first pass, the gradient norm that of the second. With each logged loss come
    ``fsam/noise_norm``, ``fsam/grad_norm``, ``fsam/cosine``, ``fsam/effective_cosine`` where there is one, and
    ``fsam/found_inf``.

    Args:
        args, kwargs: the Trainer's.
        fsam: options of the :class:`fsam_ext.FriendlySAM`: ``rho``, ``sigma``, ``every`` and so on.

    Raises:
        ImportError: the adapter was not tested with this version of transformers.
        TypeError: when training starts: the optimizer in ``optimizers=`` is none of this package; or at a batch that
            cannot be kept.
        ValueError: both ``fsam`` and an optimizer, DeepSpeed, ``ascent_sync=False``, or an ``args.optim`` that is made
            of a whole model or schedule-free.
    """

    def __init__(self, *args: Any, fsam: dict[str, Any] | None = None, **kwargs: Any) -> None:
        require("transformers", "5.24")
        self._fsam = dict(fsam or {})
        self._second_pass: SecondPass | None = None
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            raise ValueError("FriendlySAMTrainer cannot train with DeepSpeed, which steps by itself; use FSDP or DDP")
        if self._fsam and self.optimizer is not None:
            raise ValueError("fsam= and optimizers= were both given; give the optimizer its options where it is made")

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Has the Trainer make its optimizer, within a FriendlySAM."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        asked = self.optimizer_cls_and_kwargs
        whole = self.model if model is None else model
        base, options = self.get_optimizer_cls_and_kwargs(self.args, whole) if asked is None else asked
        if not (isinstance(base, type) and issubclass(base, Optimizer)) or options.keys() & {"model", "optimizer_dict"}:
            raise ValueError(
                f"{getattr(base, '__name__', base)} (args.optim or optimizer_cls_and_kwargs) is made of a whole model, "
                "which F-SAM has no way into; name an optimizer of parameters"
            )
        if hasattr(base, "train"):
            raise ValueError(
                f"{base.__name__} moves the weights between training and evaluation, which the Trainer asks of it in "
                "each micro-batch, perturbed ones included; name another optimizer in args.optim"
            )
        self.optimizer_cls_and_kwargs = FriendlySAM, {"base_optimizer": base, **self._fsam, **options}
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = asked

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; where it raises, the weights are restored."""
        try:
            return super().train(*args, **kwargs)
        except BaseException:
            if self._second_pass is not None:
                self._friendly.restore()
            raise
        finally:
            self._second_pass = None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A micro-batch of the first pass; with the last one the second pass: NOTE [the Trainer's last micro-batch]."""
        if self._second_pass is None:
            self._second_pass = SecondPass(self._friendly, model)
            refuse_local_ascents(self._friendly, "the Trainer")
        micro_batch = super().training_step
        self._second_pass.keep((inputs, num_items_in_batch))
        loss = micro_batch(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._second_pass.run(lambda kept: micro_batch(model, *kept), self.accelerator.scaler)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs with each loss what the last ascent measured."""
        if "loss" in logs and self._second_pass is not None:
            logs = {**logs, **{name: float(value) for name, value in logged(self._friendly).items()}}
        super().log(logs, *args, **kwargs)

    @property
    def _friendly(self) -> Any:
        """The optimizer within Accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)


class FriendlySAMTrainer(FriendlySAMTrainerMixin, Trainer):
    """A Trainer with F-SAM: :class:`FriendlySAMTrainerMixin`."""
