"""The passes of one training step: measure, perturb, finish, over the participants of a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..backends import ops
from ..backends.capture import capturing
from ..state import keys
from ..state.shards import local, placed_gradient
from ..state.tensors import check_gradients, name_of
from .accumulation import BackwardCount
from .amp import Scaler
from .base_update import FusedBase, GenericBase, number_or_tensor
from .casts import forget_casts
from .diagnostics import EffectWatch, effective_norm_and_cosine, total_effect, warn_user
from .layout import Layout, Participant
from .norm import Norm, average
from .reuse import Reuse
from .rho import rho_of
from .rounding import Rounding
from .segments import Guards, Segment
from .transaction import Stage, Transaction, Update

# (grad_scale, found_inf) that a GradScaler hands over for the time of a step, each a tensor or None.
Scaling = tuple[Any, Any]


class Passes:
    """The passes of an optimizer, which hands over its groups and its state with each call.

    Args:
        base: what updates the weights.
        backend: name of the backend that has to serve, or None.
        seed: of stochastic rounding.
    """

    def __init__(self, base: FusedBase | GenericBase, backend: str | None, seed: int) -> None:
        self.base = base
        self.is_fused = isinstance(base, FusedBase)
        self.ascent_sync = True  # whether data-parallel ranks make one ascent together
        self.layout = Layout(backend, base if isinstance(base, FusedBase) else None)
        self.transaction = Transaction()
        self.backward_count = BackwardCount()
        self.scaler: Scaler | None = None
        self.norm = Norm()
        self.reuse = Reuse()
        self._rounding = Rounding(seed)
        self._effects: list[Tensor] = []
        self._effect_watch = EffectWatch()
        self._warnings: list[str] = []  # of the step that is open, for its end
        self._said: set[str] = set()

    # ---- The ascent ------------------------------------------------------------------------------------------------

    def ascend(self, groups: list[dict[str, Any]], state: Any, scaler: Scaler | None) -> None:
        """Passes A and B. What raises has perturbed nothing."""
        participants = [one for one in self._participants(groups, state, True) if one.group["perturb"]]
        radii = {id(group): rho_of(group) for group in groups if group["perturb"]}
        meshes = self.layout.meshes(groups)
        if meshes and not self.ascent_sync:
            raise RuntimeError(
                "ascent_sync=False needs gradients of this rank alone, which sharded parameters do not have; leave it "
                "out, or use DistributedDataParallel"
            )
        if not self.ascent_sync and any(map(keys.uses_reuse, groups)):
            raise RuntimeError("reuse needs one ascent of all ranks; set ascent_sync to True, or reuse to 0")
        scales: dict[torch.device, Tensor | None] = {}
        if scaler is not None:
            devices = {one.segment.flat.device for one in participants}
            scales = {device: scaler.ascent_scale(device) for device in devices}
        _run(groups, self.norm.measure, participants, meshes, scales)
        if scaler is not None:
            scaler.count_overflow(self.norm.totals)
        segments = [one.segment for one in participants]
        perturb = [partial(self._perturb, groups, one, radii[id(one.group)], scales) for one in participants]
        try:
            _run(groups, self.transaction.ascend, segments, perturb)
            self._note_ascent(groups, segments, scaler)
        except BaseException:
            self.give_up(groups)
            raise
        forget_casts()

    def _note_ascent(self, groups: list[dict[str, Any]], segments: list[Segment], scaler: Scaler | None) -> None:
        """What the second pass, and whoever asks, has to know of an ascent."""
        for segment in segments:
            segment.written()
        if scaler is not None:
            self.scaler = scaler
            scaler.forget_unscaling()
        self._effects = [segment.effect for segment in segments if segment.effect is not None]
        if self._effects:
            self._warn_later(self._effect_watch.look(self._effects, partial(_forward_dtypes, groups)))
        if segments:
            self.backward_count.ascended(segments[0].params[0])

    def _perturb(
        self,
        groups: list[dict[str, Any]],
        participant: Participant,
        rho: float | Tensor,
        scales: dict[torch.device, Tensor | None],
    ) -> None:
        """Pass B on one segment."""
        group, segment, grads = participant
        flat = segment.flat
        ops.perturb(
            segment.backend,
            segment.rows,
            grads,
            segment.offsets,
            *average(group, segment),
            flat.saved(),
            self.norm.totals[flat.device],
            scales.get(flat.device),
            *number_or_tensor(rho, flat.device),
            group["sigma"],
            group["lmbda"],
            group["perturb_eps"],
            group["adaptive"],
            group["ema"] == "updated",
            group["ema_source"] == "ascent",
            ops.FORWARD[group["forward_dtype"]],
            segment.effect,
            self.transaction.journal.cell,
            self.reuse.kept(participant, groups),
        )

    # ---- The update ------------------------------------------------------------------------------------------------

    def finish(self, groups: list[dict[str, Any]], state: Any, scaling: Scaling, reuses: Callable[[int], bool]) -> None:
        """Pass C: the restore of what was perturbed, and the base update of what has a gradient now.

        ``reuses``: tells whether the step of a number lies between two that have an ascent.
        """
        stage, number, journal = self.transaction.stage, groups[0][keys.STEP], self.transaction.journal
        if stage is Stage.UPDATING:
            return _run(groups, self.transaction.resume)
        self.transaction.check_whole()
        plain = stage is Stage.CLEAN
        participants = self._participants(groups, state, plain)
        if len(participants) > 1:  # an op checks its own segment before it writes; nobody checks the later ones
            check_gradients(groups)
        segments = [one.segment for one in participants]
        perturbed = [segment for segment in segments if segment.flat.kind.perturbed]
        in_one_pass = self.is_fused and self.transaction.is_ascent_of(perturbed)
        if not in_one_pass:
            self.restore_weights(groups)
        guards = {device: self._guards(device, plain, *scaling) for device in {one.flat.device for one in segments}}
        first, settle, settled = [], None, lambda: None
        if any(map(keys.uses_reuse, groups)) and (not plain or reuses(number)):
            ascended, meshes = None if plain else self.transaction.ascended, self.layout.meshes(groups)
            what = (groups, state, participants, meshes, guards, ascended, self.norm, journal.cell)
            first, settle, settled = _run(groups, self.reuse.plan, *what)
        first += [
            partial(self._feed, *one, guards[one.segment.flat.device])
            for one in participants
            if (plain or one.group["ema_source"] == "descent") and keys.uses_ema(one.group)
            if not (settle and keys.uses_reuse(one.group))
        ]
        plan = self._plan_fused if self.is_fused else self._plan_generic
        run, updates, written = plan(groups, state, participants, guards, in_one_pass, settle)
        start = journal.count()
        update = Update(
            first + run,
            [None] * len(first) + updates,
            lambda: journal.count() - start + written(),
            partial(self._conclude, groups, state, segments, number + 1, run != [], settled),
        )
        _run(groups, self.transaction.update, update)

    def _plan_fused(
        self,
        groups: list[dict[str, Any]],
        state: Any,
        participants: list[Participant],
        guards: dict[torch.device, Guards],
        in_one_pass: bool,
        settle: Callable[[], None] | None,
    ) -> tuple[list[Callable[[], None]], list[Segment | None], Callable[[], int]]:
        """(the ops of an update, the segment that each one updates, how many have written without the journal)."""
        run: list[Callable[[], None]] = []
        updates: list[Segment | None] = []
        for participant in participants:
            group, segment, grads = participant
            flat = segment.flat
            restores = in_one_pass and flat.kind.perturbed
            saved = flat.saved() if restores or flat.masters else None
            step = group[keys.STEP]
            rounding = self._rounding.on(flat.device, step) if group["stochastic_rounding"] else None
            adopts, journal = flat.masters and not restores, self.transaction.journal
            reused = self.reuse.reused(participant, groups) if settle else None
            made = self.base.ops(segment, grads, saved, guards[flat.device], group, rounding, adopts, journal, reused)
            run += made if settle is None else [partial(_after, settle, op) for op in made]
            updates += [None] * (len(made) - 1) + [segment]
        return run, updates, lambda: 0

    def _plan_generic(
        self,
        groups: list[dict[str, Any]],
        state: Any,
        participants: list[Participant],
        guards: dict[torch.device, Guards],
        in_one_pass: bool,
        settle: Callable[[], None] | None,
    ) -> tuple[list[Callable[[], None]], list[Segment | None], Callable[[], int]]:
        """The same for a base that is not fused: its step, on weights that are restored.

        It cannot be predicated on the device, so this one path reads on the host whether the gradients were finite. A
        host cannot read while a CUDA graph is captured: there the step is undone on the device.
        """
        applied = None
        if participants:  # all devices have the same sums: one of them tells for all
            device = participants[0].segment.flat.device
            applied = guards[device].applied(torch.ones((), device=device))
            if not capturing(device):
                if not isinstance(applied, FakeTensor) and not applied:
                    return [], [], lambda: 0
                applied = None
        for _, segment, _ in participants:
            grad_scale = guards[segment.flat.device].grad_scale
            if grad_scale is not None:
                grads = [local(placed_gradient(param)) for param in segment.params]
                torch._foreach_div_(grads, grad_scale)
        written = self.base.prepare(state, groups)
        return [partial(self.base.step, applied)], [None], written

    def _conclude(
        self,
        groups: list[dict[str, Any]],
        state: Any,
        segments: list[Segment],
        number: int,
        updated: bool,
        settled: Callable[[], None],
    ) -> None:
        """The step is over: what follows from that, and may be done twice."""
        settled()
        if updated and not self.is_fused:  # else it has the groups of an earlier step
            self.base.merge(state, groups)
        for segment in segments:
            segment.written()
        if self.scaler is not None and self.norm.totals and self.ascent_sync:
            self.scaler.report_overflow(next(iter(self.norm.totals.values()))[0])
        self._warn_later(self.backward_count.finished())
        if segments:
            self.backward_count.used(segments[0].params[0])
        self._rounding.advance()
        forget_casts()
        for group in groups:
            group[keys.STEP] = number
        self.scaler = None

    def _guards(self, device: torch.device, plain: bool, grad_scale: Any, found_inf: Any) -> Guards:
        """What the second gradient is scaled by, and what may have its update skipped.

        Not this rank's ascent where the others made another one: all have to make the same update.
        """
        stats = None if plain or not self.ascent_sync else self.norm.on(device)
        return Guards(stats, _on(device, grad_scale), _on(device, found_inf))

    def _feed(self, group: dict[str, Any], segment: Segment, grads: Sequence[Tensor], guards: Guards) -> None:
        """Lets the average see a gradient that no ascent shows it."""
        ops.update_ema(
            segment.backend,
            segment.rows,
            grads,
            segment.offsets,
            *average(group, segment),
            *guards,
            group["lmbda"],
            self.transaction.journal.cell,
        )

    # ---- What both share -------------------------------------------------------------------------------------------

    def _participants(self, groups: list[dict[str, Any]], state: Any, in_place: bool) -> list[Participant]:
        """Who takes part; ``in_place``: watch.py, NOTE [one look at places a step]."""
        while (found := self.layout.current(groups, state, in_place)) is None:
            self.layout.check(groups, state)
            self.restore_weights(groups)  # while it is known how what was perturbed lay
            self.layout.renew(groups, state)
        return found

    @torch.no_grad()  # not a block in perturbed(): an interrupt on its last line would leave gradients off
    def restore_weights(self, groups: list[dict[str, Any]]) -> None:
        """Brings the weights back; the step goes on, with the second gradient in place.

        Raises:
            RuntimeError: a parameter was resized while it was perturbed; all others are restored.
        """
        resized = self.transaction.restore_weights()
        forget_casts()
        _refuse_resized(resized, groups)

    def give_up(self, groups: list[dict[str, Any]]) -> None:
        """Ends a step that is given up: NOTE [an interrupt at any moment] in transaction.py.

        Raises:
            RuntimeError: a parameter was resized while it was perturbed; all others are restored.
        """
        self._rounding.interrupted()
        if self.transaction.ascended:
            self.reuse.dropped(self.norm)
        resized = self.transaction.give_up()
        self.backward_count.given_up()
        if self.scaler is not None:
            self.scaler.forget_unscaling()
            self.scaler = None
        forget_casts()
        _refuse_resized(resized, groups)

    def make_state(self, groups: list[dict[str, Any]], state: Any) -> None:
        """Gives every parameter its state, as before its first step."""
        self._participants(groups, state, True)
        if isinstance(self.base, GenericBase):
            self.base.prepare(state, groups)
            self.base.step()
            self.base.merge(state, groups)

    # ---- What it measured ------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Tensor]:
        """What the last ascent measured: :meth:`fsam_ext.FriendlySAM.stats`."""
        known = next(iter(self.norm.totals.values()), None)
        sums = torch.full((ops.STATISTICS,), torch.nan, dtype=torch.float64) if known is None else known
        noise_sq, grad_sq, dot, ema_sq, _ = sums.unbind()
        effect = {}
        if self._effects:
            pair = effective_norm_and_cosine(total_effect(self._effects))
            effect = dict(zip(("effective_norm", "effective_cosine"), pair, strict=True))
        return {
            "noise_norm": noise_sq.sqrt(),
            "grad_norm": grad_sq.sqrt(),
            "ema_norm": ema_sq.sqrt(),
            "cosine": dot / (grad_sq.sqrt() * ema_sq.sqrt()),
            "found_inf": noise_sq.new_zeros((), dtype=torch.bool) if known is None else ~noise_sq.isfinite(),
            **effect,
        }

    def warn_once(self, message: str) -> None:
        """Has a message said at the end of the step, if it never was."""
        if message not in self._said:
            self._said.add(message)
            self._warn_later(message)

    def _warn_later(self, message: str | None) -> None:
        if message is not None:
            self._warnings.append(message)

    def warn(self) -> None:
        """Says what there is to warn of, now that the step is over: a warning may be an error somewhere."""
        while self._warnings:
            warn_user(self._warnings.pop())


def _run(groups: list[dict[str, Any]], call: Callable[..., Any], *args: Any) -> Any:
    """Calls what runs ops; where one refuses a gradient, the error tells which, in the name of the parameter."""
    try:
        return call(*args)
    except RuntimeError:
        check_gradients(groups)
        raise


def _on(device: torch.device, value: Any) -> Tensor | None:
    """What a GradScaler hands over; where no parameter has a gradient, its sum over none is the number 0."""
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else None


def _after(settle: Callable[[], None], op: Callable[[], None]) -> None:
    """Runs an op that needs what ``settle`` makes."""
    settle()
    op()


def _forward_dtypes(groups: list[dict[str, Any]]) -> str:
    """What forward passes see rounded weights in, for messages."""
    dtypes = {group["forward_dtype"] or param.dtype for group in groups for param in group["params"]}
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes & {*keys.LOW_PRECISION}))


def _refuse_resized(resized: list[Tensor], groups: list[dict[str, Any]]) -> None:
    if resized:
        raise RuntimeError(
            f"{name_of(groups, resized[0])} was resized while it was perturbed and cannot be restored (all others "
            "are); resize parameters between steps"
        )
