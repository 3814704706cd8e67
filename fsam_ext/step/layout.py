"""Who takes part in a pass: the parameters that have a gradient now, in segments, each with its state.

It tells whether what it knows is still so, and makes anew what is not; that nothing is perturbed then is its caller's
business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import backends
from ..backends.capture import check_state_may_be_made
from ..state import entries, keys, shards
from ..state.flat_state import FlatState, Kind
from ..state.tensors import check_disjoint, check_gradient, check_kept, check_parameter, is_uninitialized, name_of
from ..state.watch import Watch
from .base_update import FusedBase
from .held import swaps
from .segments import Segment, same_objects

# NOTE [lists are checked, not trusted]
# Frameworks edit ``group["params"]`` and set gradients to None as they like, so every pass compares the lists, object
# by object, with those that the segments were made from. Parameters may be cast, moved or reshaped through ``p.data``;
# tensors in ``state`` may be replaced, and then count, or removed, and then start anew.


_LAYOUT_OF = itemgetter(*keys.LAYOUT)


class Participant(NamedTuple):
    """A segment that takes part in a pass, its options and its gradients, row by row."""

    group: dict[str, Any]
    segment: Segment
    grads: Sequence[Tensor]


@dataclass(frozen=True)
class Known:
    """What the segments were made from, replaced as a whole: NOTE [layouts are replaced, not changed]."""

    flats: dict[Kind, FlatState] = field(default_factory=dict)
    # of each group: its segments, and the options that they depend on
    segments: dict[int, tuple[list[Segment], tuple[Any, ...]]] = field(default_factory=dict)
    state: Watch | None = None
    swaps: bool = False


class Layout:
    """The participants of an optimizer's passes.

    Args:
        backend: name of the backend that has to serve, or None.
        fused: the base's update, or None where the base is not fused.
    """

    def __init__(self, backend: str | None, fused: FusedBase | None) -> None:
        self._backend = backend
        self._fused = fused
        self._known = Known()
        self._meshes: dict[int, tuple[list[Tensor], dict[Any, torch.device]]] = {}

    @property
    def flats(self) -> dict[Kind, FlatState]:
        """The flat buffers, by what the parameters in each have in common."""
        return self._known.flats

    def segments_of(self, number: int) -> list[Segment]:
        """The segments that a group was last cut into."""
        return self._known.segments.get(number, ([], ()))[0]

    # ---- What is still so ------------------------------------------------------------------------------------------

    def current(self, groups: list[dict[str, Any]], state: Any, in_place: bool) -> list[Participant] | None:
        """Every parameter that has a gradient now, or None where the segments are not theirs: :meth:`renew`.

        ``in_place``: NOTE [one look at places a step].
        """
        if self._known.swaps != swaps() or not self._state_is_known(state, in_place):
            self._known = Known(self._known.flats)
        result: list[Participant] = []
        for number, group in enumerate(groups):
            found = self._current_of(number, group)
            if found is None:
                return None
            result += found
        return result

    def _current_of(self, number: int, group: dict[str, Any]) -> list[Participant] | None:
        """Those of one group, or None where the segments are not the group's."""
        segments, structure = self._known.segments.get(number, ([], ()))
        if structure != self._structure(group):
            return None
        params = group["params"]
        if len(segments) != 1 or len(segments[0].params) != len(params):
            params = [param for param in params if param.grad is not None]
        shares = [params]  # of each segment; where there is one, it tells whether it is theirs
        if len(segments) != 1:
            kinds = self._by_kind(group, params)
            if [segment.flat for segment in segments] != [self._known.flats.get(kind) for kind in kinds]:
                return None
            shares = list(kinds.values())
        result = []
        for segment, share in zip(segments, shares):
            grads = segment.current_grads(share)
            if grads is None:
                return None
            result.append(Participant(group, segment, grads))
        return result

    def _structure(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The options that decide which state a group has and how it is kept."""
        base = self._fused.state_names(group) if self._fused else ()
        return keys.uses_ema(group), keys.uses_reuse(group), base, _LAYOUT_OF(group)

    def kind_of(self, group: dict[str, Any], param: Tensor) -> Kind:
        """What a parameter has in common with those whose flat buffers it shares."""
        dtype, sharding = param.dtype, None if type(param) is Parameter else shards.sharding(param)
        masters, in_order = keys.has_masters(group, dtype), keys.draws(group, dtype)
        ema, reuse = keys.ema_dtype(group, dtype), keys.reuse_dtype(group, dtype)
        return Kind(dtype, param.device, ema, masters, bool(group["perturb"]), reuse, sharding, in_order)

    def _by_kind(self, group: dict[str, Any], params: Sequence[Tensor]) -> dict[Kind, list[Tensor]]:
        kinds: dict[Kind, list[Tensor]] = {}
        for param in params:
            kinds.setdefault(self.kind_of(group, param), []).append(param)
        return kinds

    def _state_is_known(self, state: Any, in_place: bool) -> bool:
        """Whether ``state`` holds the tensors that were put there."""
        return not state if self._known.state is None else self._known.state.holds(state, in_place)

    def forget(self) -> None:
        """``state`` is another one: nothing of what was known of it is so."""
        self._known = Known()

    # ---- What is made anew -----------------------------------------------------------------------------------------

    def _stale(self, groups: list[dict[str, Any]]) -> set[int]:
        return {number for number, group in enumerate(groups) if self._current_of(number, group) is None}

    def check(self, groups: list[dict[str, Any]], state: Any) -> None:
        """Raises for a parameter, its gradient or its state that could not be cut anew, before anything changes."""
        for number in self._stale(groups):
            describe = partial(name_of, groups)
            _check_members(groups[number], state, self._fused, describe)

    def renew(self, groups: list[dict[str, Any]], state: Any) -> None:
        """Cuts the groups that have changed anew. All of it is made aside before anything changes.

        To be called after :meth:`check`.

        Raises:
            ValueError: parameters share memory.
            RuntimeError: a graph is being captured, whose replays would do this again.
        """
        stale = self._stale(groups)
        members = [self._members(n, group, n in stale) for n, group in enumerate(groups)]
        for kind in {kind for number in stale for kind in members[number]}:
            check_state_may_be_made(kind.device)
        flats = self._extended(groups, members, state)
        for number, kinds in enumerate(members):
            if any(self.flats.get(kind) is not flats[kind] for kind in kinds):
                stale.add(number)
        segments = {n: pair for n, pair in self._known.segments.items() if n < len(groups) and n not in stale}
        found: list[tuple[Tensor, dict[str, Any], dict[str, Any]]] = []
        for number in stale:
            group = groups[number]
            for kind, params in members[number].items():
                found += self._take_over(group, flats[kind], params, state)
            cut = [self._segment(group, flats[kind], params) for kind, params in members[number].items()]
            segments[number] = (cut, self._structure(group))
        by_device: dict[torch.device, list[Tensor]] = {}
        for cut, _ in segments.values():
            for segment in cut:
                by_device.setdefault(segment.flat.device, []).extend(segment.params)
        for params in by_device.values():
            check_disjoint(params, partial(name_of, groups))
        for param, entry, group in found:
            entries.adopt(state[param], entry, group)
        self._publish(flats, segments, state)

    def _publish(self, flats: dict[Kind, FlatState], segments: dict[int, Any], state: Any) -> None:
        """Leaves the buffers to ``state``, and replaces what is known."""
        for flat in flats.values():
            flat.release()
        parts = [part for flat in flats.values() for part in flat.parts.values()]
        # A base that is not fused may replace what is its own in every step.
        own = tuple(name for name in keys.OWN_STATE if any(flat.find(name) is not None for flat in flats.values()))
        self._known = Known(flats, segments, Watch(state, None if self._fused else own, parts), swaps())

    def _extended(
        self, groups: list[dict[str, Any]], members: list[dict[Kind, list[Tensor]]], state: Any
    ) -> dict[Kind, FlatState]:
        """The flat buffers with room for all members, those of ``state`` that still serve among them."""
        everyone = [param for group in groups for param in group["params"]]
        flats = {kind: flat for kind, flat in self.flats.items() if not flat.is_mostly_unused(everyone)}
        for kind in self._entangled(members, state):
            flats.pop(kind, None)
        for kind in {kind: None for kinds in members for kind in kinds}:
            having = [(group, kinds[kind]) for group, kinds in zip(groups, members) if kind in kinds]
            params = [param for _, params in having for param in params]
            if kind.in_order:  # NOTE [which bits an element draws]
                params = [p for g in groups for p in g["params"] if p.requires_grad and self._is_of(kind, g, p)]
                if kind in flats and not flats[kind].follows(params):
                    del flats[kind]
            names = {name: None for group, _ in having for name in self._buffers(group, kind)}
            flats[kind] = flats.get(kind, FlatState(kind)).extended(params, names)
        return flats

    def _is_of(self, kind: Kind, group: dict[str, Any], param: Tensor) -> bool:
        return not is_uninitialized(param) and self.kind_of(group, param) == kind

    def _members(self, number: int, group: dict[str, Any], stale: bool) -> dict[Kind, list[Tensor]]:
        """Those of a group that have a gradient, by kind."""
        if stale:
            return self._by_kind(group, [param for param in group["params"] if param.grad is not None])
        return {segment.flat.kind: segment.params for segment in self.segments_of(number)}

    def _buffers(self, group: dict[str, Any], kind: Kind) -> tuple[str, ...]:
        """The flat buffers that a group's parameters of a kind need."""
        has_backup = kind.perturbed and not kind.masters
        return (*self._state_names(group, kind), *(("backup",) if has_backup else ()))

    def _state_names(self, group: dict[str, Any], kind: Kind) -> tuple[str, ...]:
        quantized = kind.ema_dtype == torch.int8
        ema = () if not keys.uses_ema(group) else (keys.EMA, keys.EMA_SCALE) if quantized else (keys.EMA,)
        own = ema + ((keys.MASTER,) if kind.masters else ()) + ((keys.REUSE,) if kind.reuse_dtype else ())
        return own + (self._fused.state_names(group) if self._fused else ())

    def _entangled(self, members: list[dict[Kind, list[Tensor]]], state: Any) -> set[Kind]:
        """The kinds whose state moves to new buffers.

        Some of it lies where another parameter's is to be; or somebody keeps a tensor that was in ``state``, which is
        theirs now and must not be written to.
        """
        found = set()
        for kinds in members:
            for kind, params in kinds.items():
                flat = self.flats.get(kind)
                if flat is None:
                    continue
                entries_of = ((param, state.get(param, {})) for param in params)
                if any(flat.is_taken(param, entry) for param, entry in entries_of):
                    found.add(kind)
        return found

    def _take_over(
        self, group: dict[str, Any], flat: FlatState, params: list[Tensor], state: Any
    ) -> list[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
        """Fills slices with what ``state`` holds, or starts from; returns what is to be put there."""
        before = self.flats.get(flat.kind)
        start = 0.0 if group["ema"] == "updated" else None
        found = []
        for param in params:
            there = state.get(param, {})
            values, entry = {**there, **entries.converted(there, param, group)}, {}
            for name in self._state_names(group, flat.kind):
                value = entry[name] = values.get(name)
                if flat.holds(name, param, value):
                    continue
                if name == keys.MASTER:
                    value = _master(param, value, before)
                elif value is None and name in (keys.EMA, keys.EMA_SCALE):
                    value = start
                flat.fill(name, param, value)
                entry[name] = flat.entry(name, param)
            if keys.EMA_SCALE in entry:
                entry[keys.EMA_SCALE].fsam_shape = param.shape  # of the average that these scales belong to
            found.append((param, entry, group))
        return found

    def _segment(self, group: dict[str, Any], flat: FlatState, params: list[Tensor]) -> Segment:
        segment = Segment(backends.resolve(self._backend, flat.device), flat, params)
        rounds = flat.kind.dtype in keys.LOW_PRECISION or group["forward_dtype"] is not None
        if flat.kind.perturbed and rounds:
            segment.measure_effect()
        return segment

    def meshes(self, groups: list[dict[str, Any]]) -> dict[Any, torch.device]:
        """All meshes that parameters of ascents lie on: distributed.py, NOTE [who takes part in the norm]."""
        found: dict[Any, torch.device] = {}
        for number, group in enumerate(groups):
            if not group["perturb"]:
                continue
            segments = self.segments_of(number)
            params = group["params"]
            if len(segments) == 1 and len(segments[0].params) == len(params):  # then it has them all
                sharding = segments[0].flat.kind.sharding
                if sharding is not None:
                    found.setdefault(sharding.mesh, segments[0].flat.device)
                continue
            known, meshes = self._meshes.get(number, ([], {}))
            if not same_objects(known, params):
                meshes = shards.meshes_of(params)
                self._meshes[number] = (list(params), meshes)
            for mesh, device in meshes.items():
                found.setdefault(mesh, device)
        return found


def _master(param: Tensor, value: Tensor | None, before: FlatState | None) -> Tensor:
    """The master of a parameter, which one that was put into ``state`` since the last step overrules."""
    if value is None:
        return param.detach()
    if before is not None and param in before.offset and not before.begins(keys.MASTER, param, value):
        shards.local(param).copy_(shards.local(value))  # before the master is in place: an interrupt has it done again
    return value


def _check_members(group: dict[str, Any], state: Any, fused: FusedBase | None, describe: shards.Describe) -> None:
    check_kept(group, fused is not None, describe)
    names = keys.OWN_STATE + (fused.state_names(group) if fused is not None else ())
    for param in group["params"]:
        shards.check_not_replaced(param, describe)
        if param.grad is None:
            continue
        check_parameter(param, describe)
        check_gradient(param, describe)
        try:
            entries.check_entry(state.get(param, {}), param, names, describe)
        except entries.Refused as refusal:
            raise RuntimeError(f"{refusal}; `del optimizer.state[parameter]` to let its state start anew") from None
