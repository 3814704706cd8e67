"""The table that the tests of frameworks end with: framework, version, case, difference."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

import pytest

from . import torchvision_on_cpu  # noqa: F401  before timm and torchmetrics, which import torchvision

FRAMEWORKS = ("lightning", "transformers", "peft", "accelerate", "timm", "mosaicml")
FRAMEWORKS += ("skorch", "fastai", "pytorch-ignite", "keras", "torchtitan")
ROWS = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[ROWS] = []


@pytest.fixture
def record(request):
    """record(package, case, difference, limit=0.0): a row of the table, and the assertion that goes with it."""

    def row(package: str, case: str, difference: float, limit: float = 0.0) -> None:
        request.config.stash[ROWS].append((package, version(package), case, difference))
        assert difference <= limit, f"{package}, {case}: {difference} from the loop written by hand"

    return row


@pytest.fixture(autouse=True)
def _quiet():
    """What frameworks warn of among themselves is nothing of ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def pytest_terminal_summary(terminalreporter, config):
    rows = [("framework", "version", "case", "difference")]
    rows += [(package, number, case, f"{value:.3g}") for package, number, case, value in config.stash[ROWS]]
    if len(rows) > 1:
        widths = [max(map(len, column)) for column in zip(*rows)]
        terminalreporter.section("against the two passes written by hand")
        for row in rows:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for package in FRAMEWORKS:
        try:
            version(package)
        except PackageNotFoundError:
            terminalreporter.write_line(f"{package} is NOT INSTALLED, so nothing of it was tested", red=True)
