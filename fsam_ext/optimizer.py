"""FriendlySAM and SAM: the param groups, the state and the state machine around the three passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from . import backends, checkpoints, distributed, ops, options
from .base_update import GenericBase, base_defaults, fused_base, is_fused, number_or_tensor
from .distributed import sharding
from .flat_state import FlatState
from .flatten import REGISTRY, FlatParameters
from .options import check_gradient, check_options, check_parameter, uses_ema
from .segments import Segment, same_objects


class State(Enum):
    """Where a training step stands.

    CLEAN -> first_step -> PERTURBED -> second_step, or step() -> CLEAN. The block ``with perturbed():`` ends in
    ASCENDED, with the weights restored and the second gradient in place, from where step() is the plain base update.
    """

    CLEAN = "clean"
    PERTURBED = "perturbed"
    ASCENDED = "ascended"


class Participant(NamedTuple):
    """A segment that takes part in a pass, its options and its gradients, row by row."""

    group: dict[str, Any]
    segment: Segment
    grads: Sequence[Tensor]


class FriendlySAM(Optimizer):
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
    float64), and so is the state. Nothing in a step waits for the device.

    Args:
        params: parameters, named parameters or param groups, as for every torch optimizer.
        base_optimizer: class of the optimizer that updates the weights. SGD, Adam and AdamW run in the same pass as the
            restore; any other class whose step() needs no closure runs after it.
        rho: radius of the perturbation, in the norm over all parameters (of |w| d where ``adaptive``); a number or,
            for CUDA graphs, a tensor of one element. 0 is allowed.
        sigma: how much of the average is taken out of the gradient. 0 is SAM, and then no average is kept.
        lmbda: decay of the average, in [0, 1).
        adaptive: scale the perturbation with |w|^2 (ASAM).
        ema: "previous": d uses the average of earlier gradients, and the first one becomes the average (the official
            code). "updated": d uses the average that includes g, and the average starts at 0 (Algorithm 1).
        perturb_eps: added to the norm.
        backend: name of the backend that has to serve; None takes the best one for each device.
        capturable: promise that every option that changes is a tensor on the device, so that a CUDA graph may hold
            the step; handed to the base optimizer too where it knows the option.
        **base_kwargs: the options of the base optimizer. All options, these included, are param-group keys. ``eps``
            belongs to the base where the base has one (Adam), as in the official code; for a base without
            one it is another name of ``perturb_eps``.

    Raises:
        ValueError, TypeError: an option or a parameter cannot be used; the message names it and what to do.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] = SGD,
        rho: float | Tensor = 0.05,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        adaptive: bool = False,
        *,
        ema: str = "previous",
        perturb_eps: float = 1e-12,
        backend: str | None = None,
        capturable: bool = False,
        **base_kwargs: Any,
    ) -> None:
        if backend is not None:
            backends.check_name(backend)
        base = base_defaults(base_optimizer, {k: v for k, v in base_kwargs.items() if k != "eps"})
        if "eps" in base_kwargs:
            if "eps" in base:
                base = base_defaults(base_optimizer, base_kwargs)
            else:
                perturb_eps = base_kwargs.pop("eps")
        if "capturable" in base:
            base["capturable"] = capturable
        self.base_optimizer = base_optimizer
        self.backend = backend
        self.capturable = capturable
        self._generic: GenericBase | None = None
        self._start()
        ours = dict(zip(options.NAMES, (rho, sigma, lmbda, adaptive, ema, perturb_eps), strict=True))
        super().__init__(params, {**base, **ours})
        self._make_base(base_kwargs)

    # ---- Construction and options ----------------------------------------------------------------------------------

    def _start(self) -> None:
        """What holds before the first step, and again whenever the state has been replaced."""
        self._stage = State.CLEAN
        self._flats: dict[tuple[Any, ...], FlatState] = {}
        self._meshes: dict[int, tuple[list[Tensor], dict[Any, torch.device]]] = {}
        self._segments: dict[int, tuple[list[Segment], tuple[str, ...]]] = {}
        self._record: list[Segment] = []
        self._totals: dict[torch.device, Tensor] = {}
        self._stats: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}

    def _make_base(self, base_kwargs: dict[str, Any]) -> None:
        fused = [is_fused(self.base_optimizer, group) for group in self.param_groups]
        self._fused = fused_base(self.base_optimizer) if all(fused) else None
        if self._fused is None:
            groups = [{k: v for k, v in g.items() if k not in options.NAMES} for g in self.param_groups]
            self._generic = GenericBase(self.base_optimizer(groups, **base_kwargs))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, whose options may differ from the defaults; raises before anything changes."""
        if self.__dict__.get("_stage") is State.PERTURBED:
            raise RuntimeError(
                "add_param_group was called between first_step and second_step; call it before first_step, or after "
                "second_step or restore()"
            )
        count = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_options(group)
            for param in group["params"]:
                check_parameter(param, self._describe)
            fused = is_fused(self.base_optimizer, group)
            if self.__dict__.get("_fused") is not None and not fused:
                raise ValueError(
                    f"group {count} asks {self.base_optimizer.__name__} for amsgrad or differentiable, which the other "
                    "groups do not; give the option to the constructor instead"
                )
        except (TypeError, ValueError):
            del self.param_groups[count:]
            raise

    def _describe(self, param: Tensor) -> str:
        """A parameter's name, or its place and shape, for messages."""
        for g, group in enumerate(self.param_groups):
            for i, other in enumerate(group["params"]):
                if other is param:
                    if "param_names" in group:
                        return f"parameter '{group['param_names'][i]}'"
                    return f"parameter {i} of group {g} (shape {tuple(param.shape)})"
        return f"a parameter of shape {tuple(param.shape)}"

    # ---- Segments --------------------------------------------------------------------------------------------------

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        ema = ("ema",) if uses_ema(group) else ()
        return ema + (self._fused.state_names(group) if self._fused else ())

    def _make_segments(self, group: dict[str, Any], params: list[Tensor]) -> list[Segment]:
        """Cuts parameters of one group by dtype and device, and gives each one its state."""
        segments = []
        for flat, members in self._by_kind(params).items():
            for param in members:
                check_parameter(param, self._describe)
                check_gradient(param, self._describe)
            flat.add(members)
            for name in self._state_names(group):
                start = 0.0 if name == "ema" and group["ema"] == "updated" else None
                flat.publish(name, members, self.state, start)
            flat.buffer("backup")
            backend = backends.resolve(self.backend, flat.device)
            segments.append(Segment(backend, flat, members))
        return segments

    def _by_kind(self, params: Sequence[Tensor]) -> dict[FlatState, list[Tensor]]:
        kinds: dict[tuple[Any, ...], list[Tensor]] = {}
        for param in params:
            key = (param.dtype, param.device, None if type(param) is Parameter else sharding(param))
            kinds.setdefault(key, []).append(param)
        for key in kinds:
            if key not in self._flats:
                self._flats[key] = FlatState(*key)
        return {self._flats[key]: members for key, members in kinds.items()}

    def _participants(self) -> list[Participant]:
        """Every parameter that has a gradient now, in segments. They are made anew only where something changed.

        NOTE [lists are checked, not trusted]
        Frameworks edit ``group["params"]`` and set gradients to None as they like, so every pass compares the lists,
        object by object, with those that the segments were made from.
        """
        result = []
        for number, group in enumerate(self.param_groups):
            names = self._state_names(group)
            segments, known_names = self._segments.get(number, ([], ()))
            grads = self._current_grads(segments, group["params"]) if names == known_names else None
            if grads is None:
                params = [param for param in group["params"] if param.grad is not None]
                for param in group["params"]:
                    distributed.check_not_replaced(param, self._describe)
                segments = self._make_segments(group, params)
                self._segments[number] = (segments, names)
                grads = [segment.current_grads(segment.params) for segment in segments]
            result.extend(Participant(group, *pair) for pair in zip(segments, grads, strict=True))
        if any(one.grads is None or one.segment.generation != one.segment.flat.generation for one in result):
            return self._participants()  # a group further down made a buffer grow
        return result

    def _find_meshes(self) -> dict[Any, torch.device]:
        """All meshes that parameters lie on, gradients or not: distributed.py, NOTE [who takes part in the norm]."""
        found: dict[Any, torch.device] = {}
        for number, group in enumerate(self.param_groups):
            segments, _ = self._segments[number]
            params = group["params"]
            if len(segments) == 1 and len(segments[0].params) == len(params):  # then it has them all
                if segments[0].flat.sharding is not None:
                    found.setdefault(segments[0].flat.sharding.mesh, segments[0].flat.device)
                continue
            known, meshes = self._meshes.get(number, ([], {}))
            if not same_objects(known, params):
                meshes = distributed.meshes_of(params)
                self._meshes[number] = (list(params), meshes)
            for mesh, device in meshes.items():
                found.setdefault(mesh, device)
        return found

    def _current_grads(self, segments: list[Segment], params: list[Tensor]) -> list[Sequence[Tensor]] | None:
        """The gradients of each segment, or None where the segments are not those of ``params``."""
        if len(segments) == 1:
            grads = [segments[0].current_grads(params)]
        else:
            kinds = self._by_kind([param for param in params if param.grad is not None])
            if [segment.flat for segment in segments] != list(kinds):
                return None
            grads = [segment.current_grads(kinds[segment.flat]) for segment in segments]
        return None if any(one is None for one in grads) else grads

    def _checked(self, segment: Segment, call: Callable[..., None], *args: Any) -> None:
        """Runs an op; where it refuses a gradient, the error tells which, in the name of the parameter."""
        try:
            call(*args)
        except RuntimeError:
            for param in segment.params:
                check_gradient(param, self._describe)
            raise

    # ---- The two passes --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturbs the weights along the noise of the present gradients, and updates the average.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: the weights are perturbed already, or a gradient cannot be used. Nothing has changed then.
        """
        if self._stage is not State.CLEAN:
            raise RuntimeError(
                "first_step was called twice: the weights are perturbed; call second_step() to finish the step, "
                "or restore()"
                if self._stage is State.PERTURBED
                else "first_step was called after `with perturbed():`; call step() to finish the step, or restore()"
            )
        for group in self.param_groups:
            check_options(group)
        participants = self._participants()
        self._measure_noise(participants)
        self._stage = State.PERTURBED
        self._record = []
        try:
            for participant in participants:
                self._perturb(*participant)
                # What was perturbed is what a restore brings back, whatever gradients exist by then.
                self._record.append(participant.segment)
        except BaseException:
            self.restore()
            raise
        if zero_grad:
            self.zero_grad()

    def _perturb(self, group: dict[str, Any], segment: Segment, grads: Sequence[Tensor]) -> None:
        """Pass B on one segment."""
        flat = segment.flat
        rho, rho_tensor = number_or_tensor(group["rho"], flat.device)
        ops.perturb(
            segment.backend,
            segment.rows,
            grads,
            segment.offsets,
            flat.buffers["ema"] if uses_ema(group) else None,
            flat.buffers["backup"],
            self._totals[flat.device],
            None,
            rho,
            rho_tensor,
            group["sigma"],
            group["lmbda"],
            group["perturb_eps"],
            group["adaptive"],
            group["ema"] == "updated",
        )
        segment.mark_written()

    def _measure_noise(self, participants: list[Participant]) -> None:
        """Pass A over all segments; leaves the sums over all of them, on all ranks, on every device."""
        meshes = self._find_meshes()
        sums = []
        devices: dict[torch.device, list[Participant]] = {}
        for participant in participants:
            devices.setdefault(participant.segment.flat.device, []).append(participant)
        self._totals = {}
        for device, members in devices.items():
            if device not in self._stats or len(self._stats[device][1]) != len(members):
                stats = torch.empty(len(members), ops.STATISTICS, dtype=torch.float64, device=device)
                self._stats[device] = stats, list(stats)
            stats, rows = self._stats[device]
            for (group, segment, grads), row in zip(members, rows, strict=True):
                self._checked(
                    segment,
                    ops.noise_norm,
                    segment.backend,
                    segment.rows,
                    grads,
                    segment.offsets,
                    segment.flat.buffers["ema"] if uses_ema(group) else None,
                    None,
                    group["sigma"],
                    group["lmbda"],
                    group["adaptive"],
                    group["ema"] == "updated",
                    segment.flat.partials,
                    row,
                )
            if meshes:
                sums += [(one.segment.flat.sharding, row) for one, row in zip(members, rows)]
            else:
                self._totals[device] = rows[0] if len(rows) == 1 else stats.sum(0)
        if meshes:
            total = distributed.total(meshes, sums, ops.STATISTICS)
            self._totals = {device: total.to(device) for device in (*devices, total.device)}
        elif len(self._totals) > 1:
            first, *others = self._totals
            total = sum((self._totals[d].to(first) for d in others), self._totals[first])
            self._totals = {device: total.to(device) for device in self._totals}

    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and lets the base optimizer update them with the present gradients.

        Args:
            zero_grad: clear the gradients afterwards.

        Raises:
            RuntimeError: no first step was made, or a gradient cannot be used.
        """
        if self._stage is State.CLEAN:
            raise RuntimeError("second_step was called without first_step; call first_step() first")
        self.step()  # through step, so that hooks and LR schedulers see one step
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes or finishes one training step.

        Args:
            closure: computes the loss, calls backward and returns the loss. Without perturbed weights it is called
                twice; after first_step() it is called once, for the second pass. Gradients are cleared before each
                call. If it raises, the weights are restored and the exception goes on.

        Returns:
            The closure's first loss: the one at the unperturbed weights (after first_step(): the perturbed one).

        Raises:
            RuntimeError: there is no closure and no first step was made, which other optimizers would take for a plain
                step; or a closure was given after ``with perturbed():``.
        """
        loss = None
        if closure is None:
            if self._stage is State.CLEAN and checkpoints.asks_for_state(self.state, self.param_groups):
                return self._make_state()
            if self._stage is State.CLEAN:
                raise RuntimeError(
                    "step() was called without first_step and without a closure, which would be a plain step of the "
                    "base optimizer; call first_step() before the second backward, or pass a closure"
                )
        else:
            if self._stage is State.ASCENDED:
                raise RuntimeError(
                    "step(closure) was called after `with perturbed():`, whose second gradient it would replace; call "
                    "step() without a closure"
                )
            evaluate = torch.enable_grad()(closure)
            if self._stage is State.CLEAN:
                self.zero_grad()
                loss = evaluate()
                self.first_step(zero_grad=True)
                self._evaluate_perturbed(evaluate)
            else:
                self.zero_grad()
                loss = self._evaluate_perturbed(evaluate)
        self._finish()
        return loss

    def _make_state(self) -> None:
        """Gives every parameter its state, as before its first step."""
        self._participants()
        if self._generic is not None:
            self._generic.step(self.state, self.param_groups)

    def _evaluate_perturbed(self, evaluate: Callable[[], Any]) -> Any:
        try:
            return evaluate()
        except BaseException:
            self.restore()
            raise

    def _finish(self) -> None:
        """Pass C: the restore of what was perturbed, and the base update of what has a gradient now."""
        participants = self._participants()
        if len(participants) > 1:  # an op checks its own segment before it writes; nobody checks the later ones
            for participant in participants:
                for param in participant.segment.params:
                    check_gradient(param, self._describe)
        in_one_pass = self._fused is not None and same_objects([one.segment for one in participants], self._record)
        if not in_one_pass:
            self._restore_recorded()
        if self._fused is None:
            self._step_generic()
            for participant in participants:
                participant.segment.mark_written()
        else:
            for group, segment, grads in participants:
                self._checked(
                    segment,
                    self._fused.update,
                    segment,
                    grads,
                    segment.flat.buffers["backup"] if in_one_pass else None,
                    self._total(segment.flat.device),
                    group,
                )
                segment.mark_written()
        self._record = []
        self._stage = State.CLEAN

    def _step_generic(self) -> None:
        """The step of a base that is not fused.

        It cannot be predicated on the device, so this one path reads on the host whether the ascent was finite; not
        with ``capturable``, where a host cannot read.
        """
        assert self._generic is not None
        finite = self.capturable or all(bool(t[0].isfinite()) for t in self._totals.values())
        if finite:
            self._generic.step(self.state, self.param_groups)

    def _total(self, device: torch.device) -> Tensor:
        """The sums of pass A on a device; zeros where no gradient took part in the ascent."""
        if device not in self._totals:
            known = next(iter(self._totals.values()), torch.zeros(ops.STATISTICS, dtype=torch.float64))
            self._totals[device] = known.to(device)
        return self._totals[device]

    def _restore_recorded(self) -> None:
        for segment in self._record:
            ops.restore(segment.backend, segment.rows, segment.offsets, segment.flat.buffers["backup"])
            segment.mark_written()
        self._record = []

    @torch.no_grad()
    def restore(self) -> None:
        """Undoes an ascent: the weights are what they were before it, bit for bit.

        For a step that is given up. The average keeps the gradient it has seen. Safe to call at any time.
        """
        self._restore_recorded()
        self._stage = State.CLEAN

    @contextmanager
    def perturbed(self, zero_grad: bool = True) -> Iterator[None]:
        """Within the block the weights are perturbed; after it they are restored, exceptions included.

        Inside, compute the second gradient. After the block, clip or unscale it as you like and call ``step()``, which
        is then the plain update of the base optimizer. After an exception the step is given up.

        Args:
            zero_grad: clear the first gradient on entry.

        Raises:
            RuntimeError: as :meth:`first_step`.
        """
        self.first_step(zero_grad=zero_grad)
        try:
            yield
        except BaseException:
            self.restore()
            raise
        if self._stage is State.PERTURBED:  # otherwise the block has finished or given up the step itself
            with torch.no_grad():
                self._restore_recorded()
            self._stage = State.ASCENDED

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients; those that ``flatten_parameters`` laid out are zeroed in place, in one pass."""
        if not len(REGISTRY):
            return super().zero_grad(set_to_none)
        flattened: dict[FlatParameters, list[Tensor]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                flat = REGISTRY.get(param)
                if flat is not None and flat.grad is not None:
                    flattened.setdefault(flat, []).append(param)
                elif param.grad is not None:
                    param.grad = None if set_to_none else param.grad.detach().zero_()
        for flat, params in flattened.items():
            flat.zero_grad(params)

    # ---- What it measured ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def stats(self) -> dict[str, Tensor]:
        """What the last ascent measured, as 0-d float64 tensors on the parameters' device (``found_inf``: bool).

        Returns:
            ``noise_norm``: |d|, adaptive: ||w| d|; ``grad_norm``: |g|; ``ema_norm``: |m| before the ascent;
            ``cosine``: of g and m before the ascent, NaN where one of them is zero; ``found_inf``: the ascent was
            not finite, nothing was perturbed.

        Reading a value waits for the device; calling this does not.

        Raises:
            RuntimeError: there was no ascent yet.
        """
        if not self._totals:
            raise RuntimeError("stats() was called before the first ascent; call first_step() or step(closure) first")
        noise_sq, grad_sq, dot, ema_sq, _ = next(iter(self._totals.values())).unbind()
        return {
            "noise_norm": noise_sq.sqrt(),
            "grad_norm": grad_sq.sqrt(),
            "ema_norm": ema_sq.sqrt(),
            "cosine": dot / (grad_sq.sqrt() * ema_sq.sqrt()),
            "found_inf": ~noise_sq.isfinite(),
        }

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def _refuse_while_perturbed(self, what: str) -> None:
        if self.__dict__.get("_stage") is State.PERTURBED:
            raise RuntimeError(
                f"{what} was called while the weights are perturbed; call it after second_step(), or call restore() "
                "first"
            )

    def state_dict(self) -> dict[str, Any]:
        """The complete state: the average and the base optimizer's state, never a backup.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._refuse_while_perturbed("state_dict()")
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of this class, of the official F-SAM code, or of a plain torch optimizer.

        Options and state that a checkpoint lacks keep their present value, or start anew. Dtypes are kept: torch
        itself would round the float32 state of bfloat16 parameters.

        Raises:
            RuntimeError: the weights are perturbed.
            ValueError: the checkpoint does not fit; nothing has changed then.
        """
        self._refuse_while_perturbed("load_state_dict()")
        translated = checkpoints.translate(state_dict, self.param_groups)
        entries = checkpoints.entries(translated, self.param_groups)
        for param, name, value in entries:
            if name in checkpoints.SHAPED and value.shape != param.shape:
                raise ValueError(
                    f"state '{name}' of {self._describe(param)} has shape {tuple(value.shape)} in the checkpoint; load "
                    "one that was saved with this model"
                )
        # Copies, because the checkpoint's tensors may be another optimizer's; in their own dtype.
        copies = [(param, name, self._loaded(param, name, value)) for param, name, value in entries]
        super().load_state_dict(translated)
        for param, name, value in copies:
            self.state[param][name] = value

    def _loaded(self, param: Tensor, name: str, value: Tensor) -> Tensor:
        if value.shape == param.shape and name != "step":
            return distributed.placed_like(param, value)
        return value.detach().to(device=value.device if name == "step" else param.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_while_perturbed("A copy or pickle of the optimizer")
        return {
            **super().__getstate__(),
            "base_optimizer": self.base_optimizer,
            "backend": self.backend,
            "capturable": self.capturable,
            "_fused": self._fused,
            "_generic": self._generic,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()


class SAM(FriendlySAM):
    """Sharpness-Aware Minimization (Foret et al., ICLR 2021), and ASAM (Kwon et al., ICML 2021) where ``adaptive``.

    :class:`FriendlySAM` with sigma = 0: the perturbation follows the gradient itself, and no average is kept.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] = SGD,
        rho: float | Tensor = 0.05,
        adaptive: bool = False,
        *,
        perturb_eps: float = 1e-12,
        backend: str | None = None,
        capturable: bool = False,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(
            params,
            base_optimizer,
            rho,
            sigma=0.0,
            adaptive=adaptive,
            perturb_eps=perturb_eps,
            backend=backend,
            capturable=capturable,
            **base_kwargs,
        )
