"""Which steps make an ascent: every k-th one, within a part of training."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

# A number of steps, or a function that is told the number of the step and says whether it is reached.
Boundary = int | Callable[[int], bool] | None


@dataclass(frozen=True)
class Schedule:
    """The steps between ``start`` and ``end`` whose number is a multiple of ``every``, counted from ``start``.

    Args:
        every: ascend in each ``every``-th step.
        start: number of the first step (counted from 0) that may ascend, or ``f(step) -> bool``.
        end: number of the first step that does not any more, or ``f(step) -> bool``.

    Raises:
        ValueError, TypeError: one of them cannot be used.
    """

    every: int = 1
    start: Boundary = None
    end: Boundary = None

    def __post_init__(self) -> None:
        if not isinstance(self.every, Integral) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(
                f"every must be a whole number of at least 1 (1: an ascent in each step), not {self.every!r}"
            )
        for name in ("start", "end"):
            value = getattr(self, name)
            if value is None or callable(value):
                continue
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number of steps or a function of it, not {value!r}")
            if value < 0:
                raise ValueError(f"{name} must be a number of steps of at least 0, not {value!r}")

    def ascends(self, step: int) -> bool:
        """Whether step number ``step`` makes an ascent."""
        return self._is_within(step) and self._is_due(step)

    def reuses(self, step: int) -> bool:
        """Whether step number ``step`` lies between two ascents."""
        return self._is_within(step) and not self._is_due(step)

    def _is_within(self, step: int) -> bool:
        return _reached(self.start, step, otherwise=True) and not _reached(self.end, step, otherwise=False)

    def _is_due(self, step: int) -> bool:
        first = 0 if self.start is None or callable(self.start) else self.start
        return (step - first) % self.every == 0

    def describe(self, step: int) -> str:
        """The schedule and the step, for messages."""
        options = [f"every={self.every}"] + [
            f"{name}={getattr(self, name)!r}" for name in ("start", "end") if getattr(self, name) is not None
        ]
        return f"{', '.join(options)}; this is step {step}, counted from 0"


class Progress:
    """Counts steps and ascents of an optimizer; when the optimizer goes, warns where it never made one.

    A schedule that never ascends is a plain run of the base optimizer, which nothing else tells from F-SAM.
    """

    def __init__(self, optimizer: Any, schedule: Schedule) -> None:
        self._counts = {"steps": 0, "ascents": 0}
        weakref.finalize(optimizer, _warn_of_no_ascent, self._counts, schedule)

    def ascended(self) -> None:
        """An ascent was made."""
        self._counts["ascents"] += 1

    def stepped(self) -> None:
        """A step was made."""
        self._counts["steps"] += 1


def _warn_of_no_ascent(counts: dict[str, int], schedule: Schedule) -> None:
    steps = counts["steps"]
    if steps and not counts["ascents"] and schedule.start is not None:
        warnings.warn(
            f"{steps} steps were made and none had an ascent (start={schedule.start!r}, end={schedule.end!r}), so this "
            "was the base optimizer alone; start earlier, or train longer",
            stacklevel=2,
        )


def _reached(boundary: Boundary, step: int, otherwise: bool) -> bool:
    if boundary is None:
        return otherwise
    return bool(boundary(step)) if callable(boundary) else step >= boundary
