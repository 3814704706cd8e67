"""FriendlySAM: what a user calls. The passes are in step/, the state in state/."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from . import backends, options
from .schedule import Boundary, Schedule
from .state.entries import asks_for_state
from .state.flatten import REGISTRY
from .state.keys import STEP
from .stateful import StatefulOptimizer
from .step import base_options, closures, protocol
from .step.accumulation import as_list, evaluate
from .step.amp import is_asked_by_torch, scaler_of
from .step.base_update import base_of
from .step.gradients import clear_flattened
from .step.random_state import RandomState
from .step.transaction import Stage

# NOTE [steps are not compiled]
# A step is op calls that are fused already, around state that a graph cannot hold. torch.compile of a training step
# breaks its graph at the methods that torch._disable_dynamo marks, as at those of torch's own Optimizer; it compiles a
# model that a closure calls as ever.


class FriendlySAM(StatefulOptimizer):
    """Friendly Sharpness-Aware Minimization around a base optimizer.

    The first gradient g gives the noise d = g - sigma m with m the moving average of gradients; the weights move to
    w + rho d / |d|, where the second gradient is taken; the base optimizer then updates the original weights with it.
    Li et al., CVPR 2024, arXiv 2403.12350; the defaults and the positional order are those of the official code.

    Either give ``step`` a closure::

        optimizer = FriendlySAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        loss = optimizer.step(closure)          # closure: forward and backward, returns the loss

    or make the two passes yourself::

        loss(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        loss(model(x), y).backward()
        optimizer.second_step(zero_grad=True)

    Where the first gradient is not finite (its squared norm is inf or NaN, which in float32 includes norms beyond
    1.8e19), nothing is perturbed, the average keeps its value, and the second step only restores: such a step
    leaves weights and all state as they were. ``stats()["found_inf"]`` tells.

    Parameters and gradients may be float64, float32, bfloat16 or float16; all arithmetic is float32 (float64 for
    float64), and so is the state unless an option says otherwise. Nothing in a step waits for the device, unless the
    base optimizer is not fused: whether its step counts is read on the host.

    With ``every``, ``start`` or ``end`` only some steps make an ascent (``ascends`` tells); the others are plain steps
    of the base optimizer, by ``step(closure)``, or by ``step()`` after one backward.

    Args:
        params: parameters, named parameters or param groups, as for every torch optimizer.
        base_optimizer: class of the optimizer that updates the weights. SGD, Adam and AdamW run in the same pass as the
            restore; any other class whose step() needs no closure runs after it.
        rho: radius of the perturbation, in the norm over all parameters (of |w| d where ``adaptive``); a number, 0
            included; for CUDA graphs a tensor of one element; or a function of the step's number, to warm it up.
        sigma: how much of the average is taken out of the gradient. 0 is SAM, and then no average is kept.
        lmbda: decay of the average, in [0, 1).
        adaptive: scale the perturbation with |w|^2 (ASAM).
        ema: "previous": d uses the average of earlier gradients, and the first one becomes the average (the official
            code). "updated": d uses the average that includes g, and the average starts at 0 (Algorithm 1).
        perturb_eps: added to the norm.
        backend: name of the backend that has to serve; None takes the best one for each device.
        every, start, end: ascend in every ``every``-th step only, from step ``start`` on and before step ``end``,
            counted from 0; ``start`` and ``end`` may be functions of the step's number that tell whether they are
            reached. The average sees a gradient in every step.
        reuse: add what the last ascent found to the gradients of the steps between two ascents: the part of its second
            gradient that is orthogonal to the first, as long as ``reuse`` times the gradient (LookSAM, Liu et al., CVPR
            2022). With ``every``, for wrong labels: docs/demo.md. Costs 4 bytes a parameter; SGD, Adam, AdamW only.
        reuse_dtype: what stores that part: torch.float32 or torch.bfloat16; None: the dtype of the arithmetic.
        master_weights: keep float32 copies of bfloat16 and float16 parameters, which the base optimizer updates and of
            which the parameters are the rounded values. There is no backup then. SGD, Adam and AdamW only.
        stochastic_rounding: without masters, round the base optimizer's update of 16-bit parameters up or down at
            random, so that small updates count in the mean. SGD, Adam and AdamW only.
        rounding_seed: of those random numbers, which depend on it, on the number of the step and on the element.
        ema_dtype: what stores the average: torch.float32, torch.bfloat16 (for lmbda up to .99), or torch.int8 with a
            scale for each 128 elements (for lmbda up to .999). None: the dtype of the arithmetic.
        ema_source: "ascent": the average is of first gradients. "descent": of second ones; with data-parallel training
            whose first pass is local, these are the same on all ranks. Costs a pass over gradients and average.
        ascent_sync: False promises that data-parallel ranks make the first pass on their own (``no_sync``): each is
            perturbed along its own gradient, and one whose first gradient is not finite is not perturbed but makes
            the update that all others make. docs/scaling.md has the choice of ``ema_source`` that goes with it.
        forward_dtype: the 16-bit dtype that forward passes see float32 parameters in (autocast, mixed-precision
            policies); only for ``stats()`` and its warning.
        capturable: promise that every option that changes is a tensor on the device, so that a CUDA graph may hold
            the step; handed to the base optimizer too where it knows the option.
        **base_kwargs: the options of the base optimizer. All options, these included, are param-group keys, and so is
            ``perturb``: a group with ``perturb=False`` takes no part in ascents, and only the base updates it. ``eps``
            belongs to the base where the base has one (Adam), as in the official code; for a base without
            one it is another name of ``perturb_eps``.

    Raises:
        ValueError, TypeError: an option or a parameter cannot be used; the message names it and what to do.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] = SGD,
        rho: float | Tensor | Callable[[int], float | Tensor] = 0.05,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        adaptive: bool = False,
        *,
        ema: str = "previous",
        perturb_eps: float = options.PERTURB_EPS,
        every: int = 1,
        start: Boundary = None,
        end: Boundary = None,
        reuse: float = 0.0,
        reuse_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        ema_dtype: torch.dtype | None = None,
        ema_source: str = "ascent",
        ascent_sync: bool = True,
        forward_dtype: torch.dtype | None = None,
        backend: str | None = None,
        capturable: bool = False,
        **base_kwargs: Any,
    ) -> None:
        if backend is not None:
            backends.check_name(backend)
        options.check_seed(rounding_seed)
        protocol.refuse_sharding_wrapper()
        own = {"rho": rho, "sigma": sigma, "lmbda": lmbda, "adaptive": adaptive, "ema": ema, "perturb_eps": perturb_eps}
        own["reuse"] = reuse
        layout = (ema_dtype, master_weights, stochastic_rounding, forward_dtype, ema_source, reuse_dtype, True)
        self.base_class = base_optimizer
        self.backend = backend
        self.capturable = capturable
        self.ascent_sync = ascent_sync
        self.rounding_seed = rounding_seed
        self.schedule = Schedule(every, start, end)
        groups = base_options.listed(params)
        base_kwargs = options.for_base(base_optimizer, base_kwargs, own, capturable)
        base = base_options.made(base_optimizer, list(map(base_options.their_group, groups)), base_kwargs)
        self._base = base_of(base)
        with_base = base_options.with_base(groups, base.param_groups)
        super().__init__(with_base, options.defaults(base, own, layout))
        options.complete(self)
        self._begin()

    @property
    def base_optimizer(self) -> FriendlySAM:
        """The optimizer itself: the official script and davda54/sam attach their schedulers to this name."""
        return self

    @property
    def ascends(self) -> bool:
        """Whether the present step makes an ascent, or is a plain step of the base optimizer."""
        return self.schedule.ascends(self.param_groups[0][STEP])

    @property
    def is_perturbed(self) -> bool:
        """Whether the weights are perturbed now: between first_step and second_step. Do not save a model then."""
        return self._stage in (Stage.PERTURBED, Stage.UPDATING)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, whose options may differ from the defaults; raises before anything changes."""
        protocol.refuse_while_perturbed(self._stage, "add_param_group()")
        count = len(self.param_groups)
        try:
            new = [param_group]
            if "_passes" in self.__dict__:  # else it comes from the base, by the constructor
                group = base_options.listed_group(param_group)
                new = base_options.added(self._base.optimizer, self.param_groups, group)
            for group in new:
                super().add_param_group(group)
                options.check_group(self.param_groups, len(self.param_groups) - 1, self._base)
                self.param_groups[-1][STEP] = self.param_groups[0][STEP]
            if "_passes" in self.__dict__:
                options.complete(self)
        except BaseException:
            del self.param_groups[count:]
            raise

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return is_asked_by_torch()

    @torch._disable_dynamo
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, grad_scaler: Any = None) -> None:
        """Perturbs the weights along the noise of the present gradients, and updates the average.

        Args:
            zero_grad: clear the gradients afterwards.
            grad_scaler: the torch.amp.GradScaler that scaled the loss. The gradients are unscaled as they are read
                (unless ``grad_scaler.unscale_(optimizer)`` did it, to clip); finish the step with
                ``grad_scaler.step(optimizer)``.

        Raises:
            RuntimeError: the weights are perturbed already, the schedule has no ascent in this step, a gradient
                cannot be used, or parameters are sharded with ``ascent_sync=False``. Nothing has changed then.
            TypeError, ValueError: an option or the scaler cannot be used.
        """
        protocol.check_first_step(self._stage, self.schedule, self.param_groups[0][STEP])
        self._options.check(self.param_groups, self._base)
        self._passes.ascent_sync = self.ascent_sync
        scaler = scaler_of(grad_scaler, self._itself())
        self._passes.ascend(self.param_groups, self.state, scaler)
        self._progress.ascended()
        if zero_grad:
            self.zero_grad()

    @torch._disable_dynamo
    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and lets the base optimizer update them with the present gradients.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: no first step was made, or a gradient cannot be used.
        """
        protocol.check_second_step(self._stage)
        self.step()  # through step, so that hooks and LR schedulers see one step
        if zero_grad:
            self.zero_grad()

    @torch._disable_dynamo
    @torch.no_grad()
    def step(
        self,
        closure: Callable[..., Any] | None = None,
        *,
        accumulate: Iterable[Any] | None = None,
        replay_rng: bool = False,
    ) -> Any:
        """Makes or finishes one training step.

        Args:
            closure: computes the loss, calls backward and returns the loss. Without perturbed weights it is called
                twice (once where the schedule has no ascent); after first_step() it is called once, for the second
                pass. Gradients are cleared before each pass; those that are there already are used where one
                is enough and the closure makes none. If it raises, the weights are restored and the exception goes on.
                If its second call returns None and the first one did not, the step is given up: some frameworks say so
                that a gradient overflowed.
            accumulate: micro-batches. The closure is then called as ``closure(batch)`` for each of them in both passes,
                and should divide its loss by their number; the losses are summed.
            replay_rng: draw the same random numbers in both passes, so that dropout has the same masks.

        Returns:
            The closure's first loss: the one at the unperturbed weights (after first_step(): the perturbed one).

        Raises:
            RuntimeError: there is no closure and no first step was made, which other optimizers would take for a plain
                step; a closure was given after ``with perturbed():``, or through ``GradScaler.step``; or a scaler was
                used in one of the two passes only.
            TypeError, ValueError: ``accumulate`` without a closure, or empty.
        """
        try:
            loss = self._step(closure, accumulate, replay_rng)
        except BaseException:
            for name in ("grad_scale", "found_inf"):  # GradScaler.step removes them only where nothing is raised
                self.__dict__.pop(name, None)
            raise
        self._passes.warn()
        return loss

    def _step(self, closure: Callable[..., Any] | None, accumulate: Iterable[Any] | None, replay: bool) -> Any:
        passes, stage, given = self._passes, self._stage, self.__dict__  # GradScaler.step sets attributes for the call
        if closure is None and stage is Stage.CLEAN and asks_for_state(self.state, self.param_groups):
            return passes.make_state(self.param_groups, self.state)
        scaled, lacks_ascent = "found_inf" in given, stage is Stage.CLEAN and self.ascends
        protocol.check_step(stage, lacks_ascent, closure, accumulate, scaled, passes.scaler)
        batches = None if accumulate is None else as_list(accumulate)
        scaling = given.get("grad_scale"), given.get("found_inf")
        self._options.check(self.param_groups, self._base)
        try:
            loss, goes_on = None, True
            if closure is not None:
                loss, goes_on = self._evaluate(torch.enable_grad()(partial(evaluate, closure, batches)), replay)
            else:
                protocol.check_gradients(passes.transaction, self.param_groups, passes.backward_count)
            if goes_on:
                passes.finish(self.param_groups, self.state, scaling, self.schedule.reuses)
                self._progress.stepped()
            else:
                passes.give_up(self.param_groups)
        except BaseException:
            if closure is not None or self._stage is Stage.UPDATING:  # else the user finishes the step, or restores
                passes.give_up(self.param_groups)
            raise
        return loss

    def _evaluate(self, evaluate_pass: Callable[[], Any], replay: bool) -> tuple[Any, bool]:
        """The passes of a closure, what is left of this step's two: (its first loss, whether the step goes on)."""
        passes = self._passes
        params = [param for group in self.param_groups for param in group["params"]]
        aside = closures.SetAside(params, passes.backward_count, self.zero_grad)
        if self._stage is not Stage.CLEAN or not self.ascends:
            return closures.one_pass(evaluate_pass, aside, passes.warn_once), True
        state = RandomState(params) if replay else None
        loss = closures.first_pass(evaluate_pass, aside, passes.warn_once)
        self.first_step(zero_grad=True)
        if state is not None:
            state.replay()
        with closures.with_a_graph_of_its_own():
            second = evaluate_pass()
        return loss, loss is None or second is not None

    @torch._disable_dynamo
    @torch.no_grad()
    def restore(self) -> None:
        """Undoes an ascent: the weights are what they were before it, bit for bit.

        For a step that is given up, by an exception anywhere or by Ctrl-C. The average keeps the gradient it has seen.
        An update that was interrupted after it had begun is finished instead: then the step has been made. Safe to call
        at any time.

        Raises:
            RuntimeError: a parameter was resized while it was perturbed; all others are restored.
        """
        for name in ("grad_scale", "found_inf"):
            self.__dict__.pop(name, None)
        self._passes.give_up(self.param_groups)

    @contextmanager
    def perturbed(self, zero_grad: bool = True, grad_scaler: Any = None) -> Iterator[None]:
        """Within the block the weights are perturbed; after it they are restored, exceptions included.

        Inside, compute the second gradient. After the block, clip or unscale it as you like and call ``step()``, which
        is then the plain update of the base optimizer. After an exception the step is given up.

        Args:
            zero_grad: clear the first gradient on entry.
            grad_scaler: as in :meth:`first_step`; call ``grad_scaler.step(optimizer)`` then in place of ``step()``.

        Raises:
            RuntimeError: as :meth:`first_step`.
        """
        open_already = self._stage is not Stage.CLEAN
        try:
            self.first_step(zero_grad=zero_grad, grad_scaler=grad_scaler)
            with closures.with_a_graph_of_its_own():
                yield
            if self._stage is Stage.PERTURBED:  # otherwise the block has finished or given up the step itself
                self._passes.restore_weights(self.param_groups)
        except BaseException:
            if not open_already:
                self.restore()
            raise

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients; those that ``flatten_parameters`` laid out are zeroed in place, run by run."""
        if len(REGISTRY):
            clear_flattened(self.param_groups, self._passes.layout, set_to_none)
        else:
            super().zero_grad(set_to_none)
        self._passes.backward_count.cleared(chain.from_iterable(group["params"] for group in self.param_groups))

    @torch.no_grad()
    def stats(self) -> dict[str, Tensor]:
        """What the last ascent measured, as 0-d float64 tensors on the parameters' device (``found_inf``: bool).

        Returns:
            ``noise_norm``: |d|, adaptive: ||w| d|; ``grad_norm``: |g|; ``ema_norm``: |m| before the ascent;
            ``cosine``: of g and m before the ascent, NaN where one of them is zero; ``found_inf``: the ascent was
            not finite, nothing was perturbed. Where weights are rounded (16-bit parameters, ``forward_dtype``), over
            these: ``effective_norm``, of what rounding leaves of the perturbation, and ``effective_cosine``, of that
            with the intended one: 0 where nothing is left, NaN where none was meant (``rho`` = 0). Of sharded
            parameters these two are about this rank's shards.

        Before the first ascent all are NaN. Reading a value waits for the device; calling this does not.
        """
        return self._passes.stats()
