"""Calls that belong together."""

from __future__ import annotations

from functools import partial


def in_one_go(*calls: partial) -> None:
    """Calls functions written in C one after the other, without a moment in between at which Python sees a signal."""
    list(map(partial.__call__, calls))
