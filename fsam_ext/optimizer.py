"""FriendlySAM and SAM: the param groups, the state and the state machine around the three passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from . import amp, backends, checkpoints, distributed, ops, options
from .accumulation import BackwardCount, as_list, evaluate
from .base_update import GenericBase, base_defaults, fused_base, host_may_read, is_fused, number_or_tensor
from .diagnostics import EffectWatch, effective_norm_and_cosine, total_effect
from .distributed import Sharding
from .flat_state import FlatState
from .flatten import REGISTRY, FlatParameters, check_disjoint
from .options import (
    FORMAT,
    LOW_PRECISION,
    STEP,
    check_gradient,
    check_options,
    check_parameter,
    uses_ema,
)
from .schedule import Boundary, Schedule
from .segments import Guards, KnownTensors, Segment, same_objects

# NOTE [steps are not compiled]
# A step is op calls that are fused already, around state that a graph cannot hold. torch.compile of a training step
# breaks its graph at the methods that torch._disable_dynamo marks, as at those of torch's own Optimizer; it compiles a
# model that a closure calls as ever.

PERTURB_EPS = 1e-12


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
    float64), and so is the state unless an option says otherwise. Nothing in a step waits for the device, unless the
    base optimizer is not fused: whether its step counts is read on the host.

    With ``every``, ``start`` or ``end`` only some steps make an ascent (``ascends`` tells); the others are plain steps
    of the base optimizer, by ``step(closure)``, or by ``step()`` after one backward.

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
        every, start, end: ascend in every ``every``-th step only, from step ``start`` on and before step ``end``,
            counted from 0; ``start`` and ``end`` may be functions of the step's number that tell whether they are
            reached. The average sees a gradient in every step.
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
        perturb_eps: float = PERTURB_EPS,
        every: int = 1,
        start: Boundary = None,
        end: Boundary = None,
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
        base = base_defaults(base_optimizer, {k: v for k, v in base_kwargs.items() if k != "eps"})
        if "eps" in base_kwargs:
            if "eps" in base:
                base = base_defaults(base_optimizer, base_kwargs)
            elif perturb_eps != PERTURB_EPS:
                raise ValueError(
                    f"eps is another name of perturb_eps for {base_optimizer.__name__}, and both were given; leave out "
                    "eps"
                )
            else:
                perturb_eps = base_kwargs.pop("eps")
        taken = sorted(base.keys() & {*options.NAMES, STEP, FORMAT})
        if taken:
            raise ValueError(
                f"base_optimizer {base_optimizer.__name__} has an option named {taken[0]}, which would get F-SAM's "
                "value; give it another name in a subclass"
            )
        if "capturable" in base:
            base["capturable"] = capturable
        self.base_class = base_optimizer
        self.backend = backend
        self.capturable = capturable
        self.ascent_sync = ascent_sync
        self.rounding_seed = rounding_seed
        self.schedule = Schedule(every, start, end)
        self._generic: GenericBase | None = None
        self._start()
        f_sam = {
            "rho": rho,
            "sigma": sigma,
            "lmbda": lmbda,
            "adaptive": adaptive,
            "ema": ema,
            "perturb_eps": perturb_eps,
        }
        layout = (ema_dtype, master_weights, stochastic_rounding, forward_dtype, ema_source)
        counts = {STEP: 0, FORMAT: checkpoints.CURRENT_FORMAT}
        super().__init__(params, {**base, **f_sam, **dict(zip(options.LAYOUT, layout, strict=True)), **counts})
        self._make_base(base_kwargs)

    # ---- Construction and options ----------------------------------------------------------------------------------

    def _start(self) -> None:
        """What holds before the first step, and again whenever the state has been replaced."""
        self._stage = State.CLEAN
        self._flats: dict[tuple[Any, ...], FlatState] = {}
        self._meshes: dict[int, tuple[list[Tensor], dict[Any, torch.device]]] = {}
        self._rounding: dict[torch.device, Tensor] = {}
        self._segments: dict[int, tuple[list[Segment], tuple[Any, ...]]] = {}
        self._known_state: tuple[Any, ...] | None = None
        self._record: list[Segment] = []
        self._totals: dict[torch.device, Tensor] = {}
        self._stats: dict[torch.device, tuple[Tensor, list[Tensor]]] = {}
        self._effects: list[Tensor] = []
        self._grad_scaler: Any = None
        self._ascent_scale: dict[torch.device, Tensor | None] = {}
        self._effect_watch = EffectWatch()
        self.__dict__.setdefault("_backward_count", BackwardCount())  # keeps its hook

    def _make_base(self, base_kwargs: dict[str, Any]) -> None:
        fused = [is_fused(self.base_class, group) for group in self.param_groups]
        self._fused = fused_base(self.base_class) if all(fused) else None
        if self._fused is None:
            own = (*options.NAMES, STEP, FORMAT)
            groups = [{k: v for k, v in g.items() if k not in own} for g in self.param_groups]
            self._generic = GenericBase(self.base_class(groups, **base_kwargs))

    @property
    def base_optimizer(self) -> FriendlySAM:
        """The optimizer itself, whose groups, state and steps are the base's as well.

        The official script and davda54/sam attach their schedulers to this name.
        """
        return self

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
            fused = is_fused(self.base_class, group)
            if self.__dict__.get("_fused") is not None and not fused:
                raise ValueError(
                    f"group {count} asks {self.base_class.__name__} for amsgrad or differentiable, which the other "
                    "groups do not; give the option to the constructor instead"
                )
            options.check_group_dtypes(group, fused, self.base_class.__name__, self._describe)
            group[STEP] = self.param_groups[0][STEP]
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

    def _structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The options that decide which state a group has and how it is kept."""
        base = self._fused.state_names(group) if self._fused else ()
        return uses_ema(group), base, *(group[name] for name in options.LAYOUT)

    def _state_names(self, group: dict[str, Any], flat: FlatState) -> tuple[str, ...]:
        ema = () if not uses_ema(group) else ("ema", "ema_scale") if flat.quantized else ("ema",)
        return ema + (("master",) if flat.masters else ()) + (self._fused.state_names(group) if self._fused else ())

    def _check_members(self, group: dict[str, Any]) -> None:
        """Raises for a parameter, its gradient or its state that cannot be used, before anything changes."""
        for param in group["params"]:
            distributed.check_not_replaced(param, self._describe)
            if param.grad is None:
                continue
            check_parameter(param, self._describe)
            check_gradient(param, self._describe)
            if param in self.state:
                checkpoints.check_shapes(self.state[param], param, self._describe)

    def _make_segments(self, group: dict[str, Any], params: list[Tensor]) -> list[Segment]:
        """Cuts parameters of one group by dtype and device, and gives each one its state."""
        zero = (lambda param: 0.0) if group["ema"] == "updated" else None
        starts = {"ema": zero, "ema_scale": zero, "master": lambda param: param}
        segments = []
        for flat, members in self._by_kind(group, params).items():
            for param in members if uses_ema(group) else ():
                if param in self.state:
                    checkpoints.convert(self.state[param], param, group)
            flat.add(members)
            for name in self._state_names(group, flat):
                flat.publish(name, members, self.state, starts.get(name))
            flat.buffer(flat.saved)
            segment = Segment(backends.resolve(self.backend, flat.device), flat, members)
            if flat.dtype in LOW_PRECISION or group["forward_dtype"] is not None:
                segment.measure_effect()
            segments.append(segment)
        return segments

    def _by_kind(self, group: dict[str, Any], params: Sequence[Tensor]) -> dict[FlatState, list[Tensor]]:
        """Parameters of one group by what those that share flat buffers have in common."""
        kinds: dict[tuple[Any, ...], list[Tensor]] = {}
        for param in params:  # in every pass of a mixed group: nothing here that can be left for later
            shards = None if type(param) is Parameter else distributed.sharding(param)
            kinds.setdefault((param.dtype, param.device, shards), []).append(param)
        return {self._flat_state(group, *kind): members for kind, members in kinds.items()}

    def _flat_state(
        self, group: dict[str, Any], dtype: torch.dtype, device: torch.device, shards: Sharding | None
    ) -> FlatState:
        key = (dtype, device, options.ema_dtype(group, dtype), options.has_masters(group, dtype), shards)
        if key not in self._flats:
            self._flats[key] = FlatState(*key)
        return self._flats[key]

    def _participants(self) -> list[Participant]:
        """Every parameter that has a gradient now, in segments. They are made anew only where something changed.

        NOTE [lists are checked, not trusted]
        Frameworks edit ``group["params"]`` and set gradients to None as they like, so every pass compares the lists,
        object by object, with those that the segments were made from. Parameters may be cast or reshaped through
        ``p.data``; tensors in ``state`` may be replaced, and then count, or removed, and then start anew.
        """
        if self._stage is State.CLEAN and not self._state_is_known():
            self._segments.clear()
        found: dict[int, list[Sequence[Tensor]] | None] = {}
        for number, group in enumerate(self.param_groups):
            segments, structure = self._segments.get(number, ([], ()))
            found[number] = self._current_grads(group, segments) if structure == self._structure(group) else None
        stale = [number for number, grads in found.items() if grads is None]
        if stale:
            for number in stale:
                self._check_members(self.param_groups[number])
            self._restore_recorded()  # while it is known how what was perturbed lay
        for number in stale:
            group = self.param_groups[number]
            segments = self._make_segments(group, [param for param in group["params"] if param.grad is not None])
            self._segments[number] = (segments, self._structure(group))
            found[number] = [segment.current_grads(segment.params) for segment in segments]
        result = [
            Participant(self.param_groups[number], *pair)
            for number, grads in found.items()
            for pair in zip(self._segments[number][0], grads, strict=True)
        ]
        if any(one.grads is None or one.segment.generation != one.segment.flat.generation for one in result):
            return self._participants()  # another group made a buffer grow
        if stale:
            if self._stage is State.CLEAN and self._drop_unused():
                return self._participants()
            self._check_disjoint(result)
            self._known_state = self.state, KnownTensors(list(self.state)), self._entries(copied=True)
        return result

    def _entries(self, copied: bool = False) -> list[dict[str, Any]]:
        """What ``state`` holds of tensors that the flat buffers are behind."""
        if self._generic is None:
            entries = list(self.state.values())
            return [dict(entry) if isinstance(entry, dict) else entry for entry in entries] if copied else entries
        return [{name: entry.get(name) for name in checkpoints.OWN_STATE} for entry in self.state.values()]

    def _state_is_known(self) -> bool:
        """Whether ``state`` holds the tensors that were put there: segments.py, NOTE [lists compare themselves]."""
        if self._known_state is None:
            return not self.state
        state, params, entries = self._known_state
        try:
            return state is self.state and params.are(list(state)) and entries == self._entries()
        except RuntimeError:
            return False

    def _drop_unused(self) -> bool:
        """Gives up flat buffers that are mostly of parameters that are gone; the others move out of them."""
        params = [param for group in self.param_groups for param in group["params"]]
        unused = [key for key, flat in self._flats.items() if flat.is_mostly_unused(params)]
        for key in unused:
            del self._flats[key]
        if unused:
            self._segments.clear()
        return bool(unused)

    def _check_disjoint(self, participants: list[Participant]) -> None:
        """Raises ValueError where parameters, of different groups perhaps, lie over the same memory."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for participant in participants:
            by_device.setdefault(participant.segment.flat.device, []).extend(participant.segment.params)
        try:
            for params in by_device.values():
                check_disjoint(params, self._describe)
        except ValueError:
            self._segments.clear()  # or nobody would look at them again
            raise

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
        if found and not self.ascent_sync:
            raise RuntimeError(
                "ascent_sync=False needs gradients of this rank alone, which sharded parameters do not have; leave it "
                "out, or use DistributedDataParallel"
            )
        return found

    def _current_grads(self, group: dict[str, Any], segments: list[Segment]) -> list[Sequence[Tensor]] | None:
        """The gradients of each segment, or None where the segments are not those of the group."""
        params = group["params"]
        if len(segments) != 1 or len(segments[0].params) != len(params):
            params = [param for param in params if param.grad is not None]
        if len(segments) == 1:
            grads = [segments[0].current_grads(params)]
        else:
            kinds = self._by_kind(group, params)
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

    # GradScaler.step then leaves unscaling and skipping to step(): see fsam_ext/amp.py.
    _step_supports_amp_scaling = True

    # ---- The two passes --------------------------------------------------------------------------------------------

    @property
    def ascends(self) -> bool:
        """Whether the present step makes an ascent, or is a plain step of the base optimizer."""
        return self.schedule.ascends(self.param_groups[0][STEP])

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
        if self._stage is not State.CLEAN:
            raise RuntimeError(
                "first_step was called twice: the weights are perturbed; call second_step() to finish the step, "
                "or restore()"
                if self._stage is State.PERTURBED
                else "first_step was called after `with perturbed():`; call step() to finish the step, or restore()"
            )
        if not self.ascends:
            raise RuntimeError(
                f"first_step was called in a step without an ascent ({self._describe_schedule()}); call step() after "
                "one backward, and first_step() only where optimizer.ascends is true"
            )
        for group in self.param_groups:
            check_options(group)
        participants = self._participants()
        self._ascent_scale = {}
        if grad_scaler is not None:
            devices = {one.segment.flat.device for one in participants}
            self._ascent_scale = {device: amp.ascent_scale(grad_scaler, self, device) for device in devices}
        for one in participants:
            one.segment.adopt_changes()
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
        self._after_ascent(grad_scaler)
        if zero_grad:
            self.zero_grad()

    def _describe_schedule(self) -> str:
        return self.schedule.describe(self.param_groups[0][STEP])

    def _after_ascent(self, grad_scaler: Any) -> None:
        """What is noted of an ascent, for the second pass and for whoever asks."""
        if grad_scaler is not None:
            self._grad_scaler = grad_scaler
            amp.forget_unscaling(grad_scaler, self)
        self._effects = [segment.effect for segment in self._record if segment.effect is not None]
        self._effect_watch.look(self._effects, self._forward_dtypes)
        if self._record:
            self._backward_count.ascended(self._record[0].params[0])

    def _forward_dtypes(self) -> str:
        """What forward passes see rounded weights in, for messages."""
        dtypes = {group["forward_dtype"] or param.dtype for group in self.param_groups for param in group["params"]}
        return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes & {*LOW_PRECISION}))

    def _perturb(self, group: dict[str, Any], segment: Segment, grads: Sequence[Tensor]) -> None:
        """Pass B on one segment."""
        flat = segment.flat
        rho, rho_tensor = number_or_tensor(group["rho"], flat.device)
        ops.perturb(
            segment.backend,
            segment.rows,
            grads,
            segment.offsets,
            *self._average(group, flat),
            flat.buffers[flat.saved],
            self._totals[flat.device],
            self._ascent_scale.get(flat.device),
            rho,
            rho_tensor,
            group["sigma"],
            group["lmbda"],
            group["perturb_eps"],
            group["adaptive"],
            group["ema"] == "updated",
            group["ema_source"] == "ascent",
            ops.FORWARD[group["forward_dtype"]],
            segment.effect,
        )
        segment.written()

    @staticmethod
    def _average(group: dict[str, Any], flat: FlatState) -> tuple[Tensor | None, Tensor | None]:
        """The average of a group, and its scales where it is quantized."""
        return (flat.buffers["ema"], flat.buffers.get("ema_scale")) if uses_ema(group) else (None, None)

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
                    *self._average(group, segment.flat),
                    self._ascent_scale.get(device),
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

    @torch._disable_dynamo
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

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None, *, accumulate: Iterable[Any] | None = None) -> Any:
        """Makes or finishes one training step.

        Args:
            closure: computes the loss, calls backward and returns the loss. Without perturbed weights it is called
                twice (once where the schedule has no ascent); after first_step() it is called once, for the second
                pass. Gradients are cleared before each pass. If it raises, the weights are restored and the
                exception goes on.
            accumulate: micro-batches. The closure is then called as ``closure(batch)`` for each of them in both passes,
                and should divide its loss by their number; the losses are summed.

        Returns:
            The closure's first loss: the one at the unperturbed weights (after first_step(): the perturbed one).

        Raises:
            RuntimeError: there is no closure and no first step was made, which other optimizers would take for a plain
                step; a closure was given after ``with perturbed():``, or through ``GradScaler.step``; or a scaler was
                used in one of the two passes only.
            TypeError, ValueError: ``accumulate`` without a closure, or empty.
        """
        scaled = hasattr(self, "found_inf")  # GradScaler.step sets it for the time of the call
        loss = None
        if closure is None:
            if accumulate is not None:
                raise TypeError("step(accumulate=...) needs a closure, which it calls with each micro-batch")
            if self._stage is State.CLEAN and checkpoints.asks_for_state(self.state, self.param_groups):
                return self._make_state()
            if self._stage is State.CLEAN and self.ascends:
                raise RuntimeError(
                    "step() was called without first_step and without a closure, which would be a plain step of the "
                    "base optimizer; call first_step() before the second backward, or pass a closure"
                )
            self._check_scaler(scaled)
        else:
            if self._stage is State.ASCENDED:
                raise RuntimeError(
                    "step(closure) was called after `with perturbed():`, whose second gradient it would replace; call "
                    "step() without a closure"
                )
            if scaled or self._grad_scaler is not None:
                raise RuntimeError(
                    "step(closure) was called with a GradScaler, which does not see the closure's gradients; call "
                    "first_step(grad_scaler=scaler), make the second backward, then scaler.step(optimizer)"
                )
            batches = None if accumulate is None else as_list(accumulate)
            loss = self._evaluate(torch.enable_grad()(partial(evaluate, closure, batches)))
        try:
            self._finish()
        except BaseException:
            if closure is not None:  # nobody else knows that a step was begun
                self.restore()
            for name in ("grad_scale", "found_inf"):  # GradScaler.step removes them only where nothing is raised
                self.__dict__.pop(name, None)
            raise
        return loss

    def _make_state(self) -> None:
        """Gives every parameter its state, as before its first step."""
        self._participants()
        if self._generic is not None:
            self._generic.step(self.state, self.param_groups)

    def _evaluate(self, evaluate_pass: Callable[[], Any]) -> Any:
        """The passes of a closure: what is left of this step's two, or the one of a step without an ascent."""
        first = self._stage is State.CLEAN
        self.zero_grad()
        try:
            loss = evaluate_pass()
            if first and self.ascends:
                self.first_step(zero_grad=True)
                evaluate_pass()
        except BaseException:
            self.restore()
            raise
        return loss

    def _check_scaler(self, scaled: bool) -> None:
        """Raises where only one of the two gradients was scaled."""
        if self._stage is State.CLEAN or scaled == (self._grad_scaler is not None):
            return
        raise RuntimeError(
            "the second gradient came through scaler.step(optimizer) but the first did not: call "
            "first_step(grad_scaler=scaler), or the average would be of scaled gradients"
            if scaled
            else "first_step(grad_scaler=scaler) was called, so the second gradient is scaled as well; finish the step "
            "with scaler.step(optimizer)"
        )

    def _guards(self, device: torch.device) -> Guards:
        """What the second gradient is scaled by, and what may have its update skipped.

        Not this rank's ascent where the others made another one: all have to make the same update.
        """
        stats = self._total(device) if self._stage is not State.CLEAN and self.ascent_sync else None
        scaler = (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        # Where no parameter has a gradient, the scaler's sum over none is the number 0.
        return Guards(stats, *(t.to(device, non_blocking=True) if isinstance(t, Tensor) else None for t in scaler))

    def _finish(self) -> None:
        """Pass C: the restore of what was perturbed, and the base update of what has a gradient now."""
        plain = self._stage is State.CLEAN
        participants = self._participants()
        if len(participants) > 1:  # an op checks its own segment before it writes; nobody checks the later ones
            for participant in participants:
                for param in participant.segment.params:
                    check_gradient(param, self._describe)
        in_one_pass = self._fused is not None and same_objects([one.segment for one in participants], self._record)
        if not in_one_pass:
            self._restore_recorded()
        for group, segment, grads in participants:
            if self._stage is not State.PERTURBED:
                segment.adopt_changes()
            if uses_ema(group) and (plain or group["ema_source"] == "descent"):
                self._checked(segment, self._feed, group, segment, grads)
        if self._generic is not None:
            self._step_generic(participants)
        else:
            for group, segment, grads in participants:
                flat = segment.flat
                self._checked(
                    segment,
                    self._fused.update,
                    segment,
                    grads,
                    flat.buffers[flat.saved] if in_one_pass or flat.masters else None,
                    self._guards(flat.device),
                    group,
                    self._rounding_of(group, flat.device),
                )
                segment.written()
        self._conclude(plain)

    def _conclude(self, plain: bool) -> None:
        """The step is over."""
        if self._grad_scaler is not None and self._totals and self.ascent_sync:
            amp.report_overflow(self._grad_scaler, self, next(iter(self._totals.values()))[0])
        self._backward_count.finished()
        for counter in self._rounding.values():
            counter[1].add_(1)
        for group in self.param_groups:
            group[STEP] += 1
        self._clean()

    def _clean(self) -> None:
        self._record = []
        self._grad_scaler = None
        self._stage = State.CLEAN

    def _feed(self, group: dict[str, Any], segment: Segment, grads: Sequence[Tensor]) -> None:
        """Lets the average see a gradient that no ascent shows it."""
        ops.update_ema(
            segment.backend,
            segment.rows,
            grads,
            segment.offsets,
            *self._average(group, segment.flat),
            *self._guards(segment.flat.device),
            group["lmbda"],
        )

    def _rounding_of(self, group: dict[str, Any], device: torch.device) -> Tensor | None:
        """Seed and number of the step on a device, where a group is rounded stochastically."""
        if not group["stochastic_rounding"]:
            return None
        if device not in self._rounding:
            numbers = torch.tensor([self.rounding_seed, group[STEP]], dtype=torch.int64, device="cpu")
            self._rounding[device] = numbers.to(device)
        return self._rounding[device]

    def _step_generic(self, participants: list[Participant]) -> None:
        """The step of a base that is not fused.

        It cannot be predicated on the device, so this one path reads on the host whether the gradients were finite. A
        host cannot read while a CUDA graph is captured: there the step is undone on the device.
        """
        assert self._generic is not None
        applied = None
        if participants:  # all devices have the same sums: one of them tells for all
            device = participants[0].segment.flat.device
            applied = self._guards(device).applied(torch.ones((), device=device))
            if host_may_read(device):
                if not applied:
                    return
                applied = None
        for _, segment, _ in participants:
            grad_scale = self._guards(segment.flat.device).grad_scale
            if grad_scale is not None:
                grads = [distributed.local(distributed.placed_gradient(param)) for param in segment.params]
                torch._foreach_div_(grads, grad_scale)
        self._generic.step(self.state, self.param_groups, applied)
        for _, segment, _ in participants:
            segment.written()

    def _total(self, device: torch.device) -> Tensor:
        """The sums of pass A on a device; zeros where no gradient took part in the ascent."""
        if device not in self._totals:
            known = next(iter(self._totals.values()), torch.zeros(ops.STATISTICS, dtype=torch.float64, device="cpu"))
            self._totals[device] = known.to(device)
        return self._totals[device]

    @torch._disable_dynamo
    def _restore_recorded(self) -> None:
        record, self._record = self._record, []
        resized = []
        for segment in record:
            if segment.have_their_forms():
                ops.restore(segment.backend, segment.rows, segment.offsets, segment.flat.buffers[segment.flat.saved])
            else:
                resized += segment.restore_one_by_one()
            segment.written()
        if resized:
            raise RuntimeError(
                f"{self._describe(resized[0])} was resized while it was perturbed and cannot be restored (all others "
                "are); resize parameters between steps"
            )

    @torch._disable_dynamo
    @torch.no_grad()
    def restore(self) -> None:
        """Undoes an ascent: the weights are what they were before it, bit for bit.

        For a step that is given up. The average keeps the gradient it has seen. Safe to call at any time.

        Raises:
            RuntimeError: a parameter was resized while it was perturbed; all others are restored.
        """
        try:
            self._restore_recorded()
        finally:
            self._backward_count.forget()
            self._clean()

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
        self.first_step(zero_grad=zero_grad, grad_scaler=grad_scaler)
        try:
            yield
        except BaseException:
            self.restore()
            raise
        if self._stage is State.PERTURBED:  # otherwise the block has finished or given up the step itself
            with torch.no_grad():
                self._restore_recorded()
            self._stage = State.ASCENDED

    @torch._disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients; those that ``flatten_parameters`` laid out are zeroed in place, run by run."""
        self._backward_count.cleared()
        if not len(REGISTRY):
            return super().zero_grad(set_to_none)
        flattened: dict[FlatParameters, list[Tensor]] = {}
        for number, group in enumerate(self.param_groups):
            segments, _ = self._segments.get(number, ([], ()))
            if len(segments) == 1 and segments[0].zero_flat_grads(group["params"]):
                continue
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
            not finite, nothing was perturbed. Where weights are rounded (16-bit parameters, ``forward_dtype``), over
            these: ``effective_norm``, of what rounding leaves of the perturbation, and ``effective_cosine``, of that
            with the intended one. Of sharded parameters these two are about this rank's shards.

        Reading a value waits for the device; calling this does not.

        Raises:
            RuntimeError: there was no ascent yet.
        """
        if not self._totals:
            raise RuntimeError("stats() was called before the first ascent; call first_step() or step(closure) first")
        noise_sq, grad_sq, dot, ema_sq, _ = next(iter(self._totals.values())).unbind()
        effect = {}
        if self._effects:
            pair = effective_norm_and_cosine(total_effect(self._effects))
            effect = dict(zip(("effective_norm", "effective_cosine"), pair, strict=True))
        return {
            "noise_norm": noise_sq.sqrt(),
            "grad_norm": grad_sq.sqrt(),
            "ema_norm": ema_sq.sqrt(),
            "cosine": dot / (grad_sq.sqrt() * ema_sq.sqrt()),
            "found_inf": ~noise_sq.isfinite(),
            **effect,
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
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:  # as words: torch.distributed.checkpoint takes no dtype for an option
            group.update({name: str(value) for name, value in group.items() if isinstance(value, torch.dtype)})
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
        self._refuse_while_perturbed("load_state_dict()")
        translated = checkpoints.translate(state_dict, self.param_groups)
        for number, group in enumerate(translated["param_groups"]):
            check_options({**self.defaults, **group})
            if self._fused is not None and not is_fused(self.base_class, group):
                raise ValueError(
                    f"group {number} of the checkpoint is of {self.base_class.__name__} with amsgrad or "
                    "differentiable, which this optimizer was made without; give the option to the constructor"
                )
        whole = self._fused.state_names if self._fused else lambda group: ()
        entries = checkpoints.entries(translated, self.param_groups, whole, self._describe)
        # Copies, because the checkpoint's tensors may be another optimizer's; in their own dtype.
        copies = [(param, name, self._loaded(param, name, value)) for param, name, value in entries]
        super().load_state_dict(translated)
        for param, name, value in copies:
            self.state[param][name] = value
        for group in self.param_groups:
            for param in group["params"]:
                if param in self.state:
                    checkpoints.convert(self.state[param], param, group)

    def _loaded(self, param: Tensor, name: str, value: Tensor) -> Tensor:
        if value.shape == param.shape and name != "step":
            return distributed.placed_like(param, value)
        return value.detach().to(device=value.device if name == "step" else param.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_while_perturbed("A copy or pickle of the optimizer")
        return {
            **super().__getstate__(),
            "base_class": self.base_class,
            "backend": self.backend,
            "capturable": self.capturable,
            "ascent_sync": self.ascent_sync,
            "rounding_seed": self.rounding_seed,
            "schedule": self.schedule,
            "_fused": self._fused,
            "_generic": self._generic,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()


class SAM(FriendlySAM):
    """Sharpness-Aware Minimization (Foret et al., ICLR 2021), and ASAM (Kwon et al., ICML 2021) where ``adaptive``.

    :class:`FriendlySAM` with sigma = 0: the perturbation follows the gradient itself, and no average is kept. Takes the
    same options but for ``sigma`` and those of the average, which raise TypeError.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer] = SGD,
        rho: float | Tensor = 0.05,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        for name in ("sigma", "lmbda", "ema", "ema_dtype", "ema_source"):
            if name in kwargs:
                raise TypeError(f"SAM has no average, which {name} is an option of; leave it out, or use FriendlySAM")
        super().__init__(params, base_optimizer, rho, sigma=0.0, adaptive=adaptive, **kwargs)
