"""Graph capture: whether a device records what is launched in order to replay it, and what must not be recorded."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether the current stream of ``device`` records a graph. Only streams of accelerators do."""
    module = getattr(torch, device.type, None)
    return getattr(module, "is_current_stream_capturing", bool)()


# NOTE [state is made outside of graphs]
# What fills a new buffer, and what copies an old one into a larger one, would be recorded and run again in each replay:
# average and momentum would start anew every time, and nothing would tell. So a step that has state to make is
# refused during a capture, before anything is written.


def check_state_may_be_made(device: torch.device) -> None:
    """Raises RuntimeError during a capture: NOTE [state is made outside of graphs]."""
    if capturing(device):
        raise RuntimeError(
            "the optimizer has state to make or to lay out anew, and a graph would do that again in each replay; make "
            "one step, both passes, before the capture"
        )
