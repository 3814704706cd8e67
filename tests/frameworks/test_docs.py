"""What the pages say of frameworks, as it is written there: docs/getting-started.md and docs/frameworks.md."""

from __future__ import annotations

import re

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..pages import DOCS, Block, blocks

PAGES = [DOCS / "getting-started.md", DOCS / "frameworks.md"]
BLOCKS = [block for page in PAGES for block in blocks(page) if block.note.endswith("tests/frameworks/test_docs.py")]


def steps(block: Block, text: str) -> list:
    """Runs a block; which optimizers made a step."""
    made: list = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: made.append(optimizer))
    torch.manual_seed(0)
    try:
        block.run(text)
    finally:
        hook.remove()
    return made


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_runs(block, tmp_path, monkeypatch):
    known = "accelerate|composer|lightning|timm|transformers"
    for framework in re.findall(rf"(?:from|import|integrations\.) ?({known})\b", block.given + block.text):
        pytest.importorskip(framework)
    monkeypatch.chdir(tmp_path)
    if block.language == "diff":
        assert len(steps(block, block.before())) == len(steps(block, block.after())) == 3
    else:
        assert len(steps(block, block.text)) == (0 if block.heading == "timm" else 3)
