"""Frameworks whose ranks exchange gradients in first passes, and so cannot make ascents of their own."""

from __future__ import annotations

from ..optimizer import FriendlySAM


def refuse_local_ascents(optimizer: FriendlySAM, framework: str) -> None:
    """Raises ValueError for ``ascent_sync=False``, which would be without effect."""
    if not optimizer.ascent_sync:
        raise ValueError(
            f"ascent_sync must be True with {framework}, whose loop has ranks exchange gradients in first passes too; "
            "leave it out, or write the loop with fsam_ext.SecondPass"
        )
