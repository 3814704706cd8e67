"""Distributed checkpoints of plain optimizers, other SAM code and earlier releases: a planner for torch's ``dcp.load``.

A module of its own, which nothing here imports: importing torch.distributed.checkpoint takes half a second.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from .state.checkpoints import OTHERS_STATE, origin
from .state.flat_state import FILL
from .state.keys import EMA, FORMAT, FORMER_NAMES, MASTER, OWN_OPTIONS, OWN_STATE, PREFIX

__all__ = ["LoadPlanner"]

_PARTS = ("state", "param_groups")
# State of ours -> what others call it, by the origin of the checkpoint.
_ELSEWHERE = {
    "fsam_ext": {ours: former for former, ours in FORMER_NAMES.items()},
    "sam": {ours: other for other, ours in OTHERS_STATE.items() if ours is not None},
    "torch": {},
}


class _Key(NamedTuple):
    """A key of a flattened state_dict that is part of an optimizer's: ``o.state.0.weight.exp_avg``."""

    root: str  # "o."
    part: str  # "state" or "param_groups"
    entry: str  # "o.state.0.weight."
    name: str  # "exp_avg"


def _key(path: tuple[Any, ...]) -> _Key | None:
    """What a path in nested dicts is of an optimizer, whose own dict may be flattened already."""
    *root, last = map(str, path)
    part, _, rest = last.partition(".")
    name = rest.rpartition(".")[2]
    if part not in _PARTS or not name:
        if len(path) < 3 or path[-3] not in _PARTS:
            return None
        *root, part, _, name = map(str, path)
    whole = ".".join(map(str, path))
    return _Key("".join(f"{key}." for key in root), part, whole[: len(whole) - len(name)], name)


class LoadPlanner(DefaultLoadPlanner):
    """Loads what a checkpoint has of a FriendlySAM or SAM, whoever wrote it::

        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=path, planner=fsam_ext.checkpoint.LoadPlanner())
        set_optimizer_state_dict(model, optimizer, state["optimizer"])

    Checkpoints of a plain torch optimizer (the base), of the official F-SAM code and other SAM implementations, of
    :class:`fsam_ext.SAM`, and of every format of this package. What they lack of ours starts anew: an average has seen
    no gradient (NaN), masters are made from the weights, options keep their present value. Where SAM implementations
    save no state of the base optimizer, that starts anew too. Anything else that is missing is an error as ever.

    Raises:
        RuntimeError: by ``dcp.load``: a key is missing.
        ValueError: by ``dcp.load``: the checkpoint's average is int8 and the optimizer's is not.
    """

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads: the default planner's plan, but for names and for what starts anew."""
        assert self.metadata is not None
        keys = {fqn: key for fqn in self.state_dict if (key := _key(self.mappings.get(fqn, (fqn,)))) is not None}
        origins = {root: self._origin(root) for root in {key.root for key in keys.values()}}
        sources = {fqn: self._source(key, origins[key.root]) for fqn, key in keys.items()}
        self._widen({fqn: sources[fqn] for fqn, key in keys.items() if key.name == EMA})
        anew = {fqn: self.state_dict.pop(fqn) for fqn, source in sources.items() if source is None}
        renamed = {fqn: source for fqn, source in sources.items() if source not in (None, fqn)}
        metadata, stored = self.metadata, self._stored()
        names = {fqn: value for fqn, value in stored.items() if fqn not in renamed.values()}
        names.update((fqn, stored[source]) for fqn, source in renamed.items() if source in stored)
        self.metadata = replace(metadata, state_dict_metadata=names)
        try:
            plan = super().create_local_plan()
        finally:
            self.metadata = metadata
        for fqn, value in anew.items():
            _start_anew(keys[fqn].name, value)
        return replace(plan, items=[_read_as(item, renamed) for item in plan.items])

    def _origin(self, root: str) -> str:
        """Who wrote the optimizer at a root of the checkpoint: "fsam_ext", "sam" or "torch"."""
        options = {fqn.rpartition(".")[2] for fqn in self._stored() if fqn.startswith(f"{root}param_groups.")}
        return origin({"param_groups": [dict.fromkeys(options)]})

    def _stored(self) -> dict[str, Any]:
        assert self.metadata is not None
        return self.metadata.state_dict_metadata

    def _source(self, key: _Key, writer: str) -> str | None:
        """The checkpoint's name of a value; None where it lacks it and the value starts anew."""
        stored, same = self._stored(), key.entry + key.name
        if key.part == "param_groups":
            if f"{key.entry}{FORMAT}" not in self.state_dict:  # another optimizer's
                return same
            if writer == "torch" and key.name in OWN_OPTIONS:
                return None
            if writer == "torch" and key.name.removeprefix(PREFIX) in OWN_OPTIONS:
                return key.entry + key.name.removeprefix(PREFIX)
            return same if same in stored or key.name not in OWN_OPTIONS else None
        if same in stored:
            return same
        if key.name in OWN_STATE:
            other = key.entry + _ELSEWHERE[writer].get(key.name, key.name)
            return other if other in stored and other not in self.state_dict else None
        saved_by_sam = writer == "sam" and any(key.entry + name in stored for name in OTHERS_STATE)
        return None if saved_by_sam else same

    def _widen(self, averages: dict[str, str | None]) -> None:
        """Makes room for a float average where an int8 one is wanted: it is quantised when the optimizer loads it.

        Raises:
            ValueError: it is the other way round.
        """
        for fqn, source in averages.items():
            stored, mine = self._stored().get(source or fqn), self.state_dict[fqn]
            if not isinstance(stored, TensorStorageMetadata) or not isinstance(mine, Tensor):
                continue
            saved, wanted = stored.properties.dtype, mine.dtype
            if wanted == torch.int8 and saved != torch.int8:
                *path, name = self.mappings.get(fqn, (fqn,))
                holder: Any = self.original_state_dict
                for part in path:
                    holder = holder[part]
                holder[name] = self.state_dict[fqn] = torch.zeros_like(mine, dtype=torch.float32)
            elif saved == torch.int8 and wanted != torch.int8:
                raise ValueError(
                    f"{fqn} is int8 in the checkpoint and {wanted} in the optimizer; load it into one with "
                    "ema_dtype=torch.int8, whose state_dict() this optimizer's load_state_dict() takes"
                )


def _read_as(item: ReadItem, renamed: dict[str, str | None]) -> ReadItem:
    """What is to be read, under the checkpoint's name."""
    name = renamed.get(item.storage_index.fqn)
    return item if name is None else replace(item, storage_index=replace(item.storage_index, fqn=name))


@torch.no_grad()
def _start_anew(name: str, value: Any) -> None:
    """Makes a part of an optimizer's state what it is before the first step; options stay as they are."""
    if isinstance(value, Tensor) and name in FILL:
        value.fill_(math.nan if name == MASTER else FILL[name] if value.is_floating_point() else 0)
