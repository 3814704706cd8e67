"""The README and the site: their code runs, their diffs turn one program that trains into another, their links lead
somewhere, and no page and no public name is left out."""

from __future__ import annotations

import ast
import gc
import importlib.util
import re
import sys
from contextlib import contextmanager
from types import ModuleType
from urllib.parse import urlsplit

import pytest
import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

import fsam_ext
from fsam_ext import FriendlySAM

from .official import OfficialFriendlySAM
from .pages import DOCS, PAGES, ROOT, Block, anchors, blocks, links

BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN_HERE = [block for block in BLOCKS if block.language in ("python", "diff") and not block.note]
SNIPPETS = [block for block in RUN_HERE if block.language == "python"]
DIFFS = [block for block in RUN_HERE if block.language == "diff"]


class Theirs(OfficialFriendlySAM):
    """F-SAM and SAM behind the names that the official code and davda54/sam give them."""

    def __init__(self, params, base_optimizer, **options) -> None:
        super().__init__(params, base_optimizer, **options)
        self.base_optimizer = self.base

    def first_step(self, zero_grad: bool = False) -> None:
        super().first_step()
        if zero_grad:
            self.base.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        super().second_step()
        if zero_grad:
            self.base.zero_grad()


@contextmanager
def their_modules():
    """`from sam import SAM` and `from utils import FriendlySAM` work."""
    sam, utils = ModuleType("sam"), ModuleType("utils")
    sam.SAM = lambda *args, **options: Theirs(*args, sigma=0.0, **options)
    utils.FriendlySAM = Theirs
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "sam", sam)
        patch.setitem(sys.modules, "utils", utils)
        yield


def trained(block: Block, text: str) -> dict:
    """The names that a program leaves, after its three steps."""
    steps: list = []
    hook = register_optimizer_step_post_hook(lambda *args: steps.append(args))
    torch.manual_seed(0)
    try:
        with their_modules():
            names = block.run(text)
    finally:
        hook.remove()
    assert len(steps) == 3
    assert all(bool(torch.isfinite(param).all()) for param in names["model"].parameters())
    return names


def weights(names: dict) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in names["model"].parameters()])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("block", SNIPPETS, ids=str)
def test_a_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        assert_whole(block.run())
    finally:
        if dist.is_initialized():
            gc.collect()  # a DDP among what ran: test_gpu_training.py, one_rank
            dist.destroy_process_group()


def assert_whole(names: dict) -> None:
    """No optimizer among these variables is within a step, and all its weights are numbers."""
    for value in names.values():
        if isinstance(value, FriendlySAM):
            assert not value.is_perturbed
            assert all(bool(torch.isfinite(p).all()) for group in value.param_groups for p in group["params"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("block", DIFFS, ids=str)
def test_both_sides_of_a_diff_train(block):
    before, after = trained(block, block.before()), trained(block, block.after())
    assert isinstance(after["optimizer"], FriendlySAM)
    if block.heading.startswith("From davda54") or block.heading.startswith("From the official"):
        torch.testing.assert_close(weights(after), weights(before), rtol=1e-5, atol=1e-7)
    elif block.heading == "With BatchNorm":
        assert torch.equal(weights(after), weights(before))
        assert [int(names["model"][1].num_batches_tracked) for names in (before, after)] == [6, 3]
    else:
        assert not torch.allclose(weights(after), weights(before), rtol=1e-5, atol=1e-7)


def test_there_are_diffs_for_each_kind_of_newcomer():
    assert {"From davda54/sam", "From the official F-SAM code", "From a plain loop"} <= {b.heading for b in DIFFS}
    assert any(block.page == "README.md" for block in DIFFS)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.note], ids=str)
def test_a_block_that_is_not_run_here_says_who_runs_it_or_why_nobody(block):
    kind, rest = re.fullmatch(r"(not run|run by):? (.+)", block.note).groups()
    if kind == "run by":
        name = block.page.removeprefix("docs/").removesuffix(".md").partition("-")[0]
        assert name in (ROOT / rest).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith(("http:", "https:")):
            parts = urlsplit(link)
            assert parts.scheme == "https" and re.fullmatch(r"[\w.-]+\.\w+", parts.netloc), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def listed() -> list[str]:
    """The pages in the trees of contents."""
    trees = [block.text for block in blocks(DOCS / "index.md") if block.language == "{toctree}"]
    lines = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    names = [re.sub(r".*<(.+)>", r"\1", line) for line in lines]
    return [page.stem for name in names for page in DOCS.glob(f"{name}.md")]


def test_each_page_is_in_one_tree_of_contents():
    assert sorted(listed()) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


def public(module: str) -> set[str]:
    """The classes, functions and constants that a module defines, by their whole names."""
    path = ROOT / "fsam_ext" / (module.replace(".", "/") + ".py")
    tree = ast.parse(path.read_text())
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    names += [target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return {f"fsam_ext.{module}.{name}" for name in names if not name.startswith("_")}


def test_the_api_page_has_every_public_name():
    page = (DOCS / "api.md").read_text()
    documented = set(re.findall(r"^\.\. auto\w+:: (\S+)", page, re.MULTILINE))
    expected = {f"fsam_ext.{name}" for name in fsam_ext.__all__ if name != "__version__"}
    for framework in ("accelerate", "composer", "lightning", "timm", "transformers"):
        expected |= public(f"integrations.{framework}")
    expected |= public("info") | {"fsam_ext.checkpoint.LoadPlanner", "fsam_ext.convert.main"}
    assert documented == expected
    assert "`fsam_ext.__version__`" in page


def test_ci_builds_the_site():
    assert "make docs\n" in (ROOT / ".ci/run").read_text()


def compatibility() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compatibility", DOCS / "compatibility.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_on_compatibility_is_what_its_data_make():
    page = (DOCS / "compatibility.md").read_text()
    assert compatibility().filled(page) == page
    with pytest.raises(ValueError, match="torch:begin"):
        compatibility().filled("a page without tables")


def test_the_frameworks_that_are_installed_for_the_tests_are_those_of_the_data():
    pinned = dict(re.findall(r"([\w-]+)==([\w.]+)", (ROOT / "Makefile").read_text()))
    packages = {"Composer": "mosaicml", "Ignite": "pytorch-ignite"}
    rows = [row for row in compatibility().rows() if row["table"] == "framework"]
    for row in rows:
        assert row["version"] == pinned.pop(packages.get(row["what"], row["what"].lower()))
    assert pinned.keys() == {"peft", "torchmetrics"}
