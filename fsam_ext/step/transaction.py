"""Where a training step stands, what is perturbed, and the one owner of "bring the weights back".

NOTE [an interrupt at any moment]
Ctrl-C raises between any two lines, and between a kernel's end and the line after it. So nothing here depends on a line
that follows a call. A plan is on record, by one assignment, before its first op runs; each op counts in the journal, on
the host and within its own call, that it has written. What was done of a plan is therefore known whenever one asks, and
from there:

- an ascent is undone: restores are copies, so doing one twice does no harm, and the record goes last;
- an update that has begun is finished: base state cannot be undone, so what is left of the plan runs. The step has
  then been made. One that has not begun leaves the weights perturbed, to be finished or restored.

What a backend written in Python has to do: fsam_ext/backends/README.md, 7.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..backends import ops
from .segments import Segment


class Stage(Enum):
    """Where a training step stands.

    CLEAN -> first_step -> PERTURBED -> second_step, or step() -> CLEAN. The block ``with perturbed():`` ends in
    ASCENDED, with the weights restored and the second gradient in place, from where step() is the plain base update.
    An update that was interrupted is UPDATING, until restore() or step() has finished it.
    """

    CLEAN = "clean"
    PERTURBED = "perturbed"
    ASCENDED = "ascended"
    UPDATING = "updating"


class Journal:
    """Counts, on the host, the ops that have written.

    Attributes:
        cell: int64 CPU tensor of one element, which each op gets.
        counts: whether ops write at all: fake tensors have no values, and nothing is ever perturbed.
    """

    def __init__(self) -> None:
        self._number = array("q", [0])
        fake = isinstance(torch.empty(0), FakeTensor)
        self.cell = torch.zeros(1, dtype=torch.int64) if fake else torch.frombuffer(self._number, dtype=torch.int64)
        self.counts = not fake

    def count(self) -> int:
        """How many there were."""
        return self._number[0]


class Ascent(NamedTuple):
    """What pass B perturbs: one op for each segment, in this order, from the journal's count ``start`` on.

    Attributes:
        saved: the buffer that each is restored from. ``state`` may be moved away meanwhile, and a backup with it.
    """

    segments: list[Segment]
    saved: Sequence[torch.Tensor]
    start: int
    restored: bool = False


class Update(NamedTuple):
    """What pass C does: ops in this order, and then ``conclude``, which may be done twice.

    Attributes:
        run: the ops.
        updates: the segment whose weights op i restores and updates, or None for an op beside that.
        done: how many of the ops have begun to write.
    """

    run: Sequence[Callable[[], None]]
    updates: Sequence[Segment | None]
    done: Callable[[], int]
    conclude: Callable[[], None]


class Open(NamedTuple):
    """A step that has begun: its ascent, unless it is a plain step, and its update, once there is a plan for it."""

    ascent: Ascent | None = None
    update: Update | None = None


class Transaction:
    """One training step, from its first write to its last: NOTE [an interrupt at any moment]."""

    def __init__(self) -> None:
        self.journal = Journal()
        self._open: Open | None = None

    @property
    def stage(self) -> Stage:
        """Where the step stands."""
        now = self._open
        if now is None:
            return Stage.CLEAN
        if now.update is not None and now.update.done() > 0:
            return Stage.UPDATING
        if now.ascent is None:
            return Stage.CLEAN
        return Stage.ASCENDED if now.ascent.restored else Stage.PERTURBED

    @property
    def has_perturbed(self) -> bool:
        """Whether there are weights that differ from what they will be restored to."""
        return bool(self._perturbed())

    @property
    def ascended(self) -> Sequence[Segment]:
        """The segments of the ascent that is open, restored or not; none where there is none."""
        now = self._open
        return () if now is None or now.ascent is None else now.ascent.segments

    def _perturbed(self) -> list[tuple[Segment, torch.Tensor]]:
        """The segments that are perturbed now, those that an update has begun on excepted, and the saved weights."""
        now = self._open
        if now is None or now.ascent is None or now.ascent.restored:
            return []
        perturbed = now.ascent.segments[: self.journal.count() - now.ascent.start]
        updated = set() if now.update is None else set(map(id, now.update.updates[: now.update.done()]))
        return [pair for pair in zip(perturbed, now.ascent.saved) if id(pair[0]) not in updated]

    def ascend(self, segments: list[Segment], run: Sequence[Callable[[], None]]) -> None:
        """Perturbs ``segments``, each by its op of ``run``."""
        self._open = Open(Ascent(segments, [segment.flat.saved() for segment in segments], self.journal.count()))
        for op in run:
            op()

    def check_whole(self) -> None:
        """Raises RuntimeError where an ascent was cut short, so that no update may follow it."""
        now = self._open
        if now is None or now.ascent is None or now.ascent.restored:
            return
        if self.journal.counts and self.journal.count() - now.ascent.start < len(now.ascent.segments):
            raise RuntimeError(
                "first_step was interrupted; call restore(), which brings the weights back, and begin anew"
            )

    def is_ascent_of(self, segments: list[Segment]) -> bool:
        """Whether just these segments are perturbed, so that their update may restore them in the same pass."""
        ascent = None if self._open is None else self._open.ascent
        return ascent is not None and not ascent.restored and ascent.segments == segments

    def restore_weights(self) -> list[torch.Tensor]:
        """Brings the weights back, bit for bit; returns the parameters that were resized meanwhile and cannot be."""
        resized = []
        for segment, saved in self._perturbed():
            if segment.have_their_forms():
                ops.restore(segment.backend, segment.rows, segment.offsets, saved)
            else:
                resized += segment.restore_one_by_one(saved)
            segment.written()
        now = self._open
        if now is not None and now.ascent is not None:
            self._open = Open(now.ascent._replace(restored=True), now.update)
        return resized

    def update(self, plan: Update) -> None:
        """Makes a step's update."""
        self._open = Open(self._open.ascent if self._open is not None else None, plan)
        self.finish()

    def resume(self) -> None:
        """Makes what is left of an update that was interrupted, with the gradients of now, and closes the step."""
        assert self._open is not None and self._open.update is not None
        for segment in self._open.update.updates:
            if segment is not None:  # csrc/held.h, NOTE [a look serves a pass]: what the last one found is old
                segment.have_their_forms()
        self.finish()

    def finish(self) -> None:
        """Makes what is left of an update, and closes the step."""
        assert self._open is not None and self._open.update is not None
        plan = self._open.update
        for op in plan.run[plan.done() :]:
            op()
        plan.conclude()
        self._open = None

    def close(self) -> None:
        """The step is over."""
        self._open = None

    def give_up(self) -> list[torch.Tensor]:
        """Undoes an ascent, or finishes an update that has begun: the state is then that before a step, or after it.

        Safe to call at any time. Returns the parameters that cannot be restored.
        """
        if self.stage is Stage.UPDATING:
            try:
                self.resume()
            except RuntimeError:  # an op refuses what is left of its plan: the rest is given up
                pass
            else:
                return []
        resized = self.restore_weights()
        self.close()
        return resized
