"""F-SAM in Lightning: ``Trainer(callbacks=[FriendlySAMCallback()])`` with automatic optimization.

NOTE [Lightning's closure runs before the step]
Lightning hands its first pass, what its callbacks do before a step, and clipping to ``optimizer.step`` as one closure.
A hook of torch's runs that closure before the step begins, as Lightning itself does where there is a GradScaler. So
the gradients of earlier micro-batches stay, the callback's own hook finds the first gradient whole and makes the second
pass, and what Lightning clips after it is the second gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from ..second_pass import SecondPass
from .exchange import refuse_local_ascents
from .logged import logged
from .versions import require


class FriendlySAMCallback(Callback):
    """Makes the second pass of each step; ``configure_optimizers`` returns a :class:`fsam_ext.FriendlySAM`.

    Precision, accumulation, clipping, schedulers, checkpoints and logs are the Trainer's as ever. What
    ``training_step`` logs, and the metrics that it updates, are of the first pass. Every ``log_every_n_steps`` steps
    ``fsam/noise_norm``, ``fsam/grad_norm``, ``fsam/cosine``, ``fsam/effective_cosine`` where there is one, and
    ``fsam/found_inf`` are logged.

    Args:
        replay_rng: draw the same random numbers in both passes, so that dropout has the same masks.

    Raises:
        ImportError: the adapter was not tested with this version of Lightning.
        TypeError: when training starts: the optimizer is none of this package; or at a batch that cannot be kept.
        ValueError: when training starts: manual optimization, or ``ascent_sync=False``. Two optimizers Lightning
            refuses itself.
    """

    def __init__(self, *, replay_rng: bool = True) -> None:
        require("lightning", "2.6")
        self._replay_rng = replay_rng
        self._has_loss = False
        self._end: Callable[[], None] = lambda: None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the optimizer on."""
        if not pl_module.automatic_optimization:
            raise ValueError(
                "FriendlySAMCallback needs automatic_optimization=True; with manual optimization call first_step() and "
                "second_step() in training_step, and leave the callback out"
            )
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise TypeError(
                "training_step(dataloader_iter) draws its batches itself, so the second pass could not see them; take "
                "(batch, batch_idx)"
            )
        optimizer = trainer.optimizers[0]
        self._optimizer: Any = optimizer
        self._second_pass = SecondPass(optimizer, trainer.strategy.model, replay_rng=self._replay_rng)
        refuse_local_ascents(optimizer, "Lightning")
        self._end = optimizer.register_step_pre_hook(_closure_before_step).remove

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drops what an epoch that was left early has kept."""
        self._second_pass.forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps the micro-batch."""
        self._has_loss = False
        self._second_pass.keep((batch, batch_idx))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that ``training_step`` did not return None."""
        self._has_loss = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Makes the second pass: NOTE [Lightning's closure runs before the step]."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and not self._has_loss:
            return self._second_pass.forget()  # Lightning makes no step then
        with _unheard(pl_module):
            replayed = self._second_pass.run(partial(_backward, trainer, pl_module, scaler), scaler)
        if scaler is not None and any(replayed):
            scaler.unscale_(optimizer)  # as Lightning had done with the first: clipping comes next
        if trainer.log_every_n_steps and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            pl_module.log_dict(logged(self._optimizer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restores the weights, before checkpoints are written."""
        if hasattr(self, "_second_pass"):
            self._optimizer.restore()
        self._end()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the optimizer go."""
        self._end()


def _closure_before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """NOTE [Lightning's closure runs before the step]."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is not None:
        closure()
    return args[:1], {name: value for name, value in kwargs.items() if name != "closure"}


def _backward(trainer: Trainer, pl_module: LightningModule, scaler: Any, kept: tuple[Any, int]) -> bool:
    """The forward and backward pass of a micro-batch, without the hooks around it; whether there was a loss."""
    takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
    output = trainer.strategy.training_step(*kept if takes_index else kept[:1])
    loss = output["loss"] if isinstance(output, Mapping) else output
    if loss is None:
        return False
    loss = loss / trainer.accumulate_grad_batches
    pl_module.backward(loss if scaler is None else scaler.scale(loss))
    return True


@contextmanager
def _unheard(pl_module: LightningModule) -> Iterator[None]:
    """What a training step logs within the block is dropped, and its metrics are afterwards as they were."""
    before = [
        (metric, {**vars(metric), **_copied(metric)}) for metric in pl_module.modules() if isinstance(metric, Metric)
    ]
    own = {name: vars(pl_module)[name] for name in ("log", "log_dict") if name in vars(pl_module)}
    pl_module.log = pl_module.log_dict = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del pl_module.log, pl_module.log_dict
        vars(pl_module).update(own)
        for metric, values in before:
            vars(metric).update(values)


def _copied(metric: Metric) -> dict[str, Any]:
    return {n: v.clone() if isinstance(v, Tensor) else list(v) for n, v in metric.metric_state.items()}
