"""Two checkouts' steps in turn: bench/compare.py by its command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def compare(*arguments, cwd):
    command = [sys.executable, str(ROOT / "bench" / "compare.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def other(tmp_path):
    """A checkout of the same package in another place."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "fsam_ext").symlink_to(ROOT / "fsam_ext", target_is_directory=True)
    return tmp_path / "other"


def test_it_prints_the_ratio_of_a_checkout_to_another(other, tmp_path):
    ended = compare(other, "--cases", "tensors_1000 sgd flat", "--pairs", 1, "--seconds", 0, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    first, _, line = ended.stdout.splitlines()
    assert first == f"this: {ROOT}; other: {other}"
    match = re.fullmatch(
        r"tensors_1000 sgd flat +([\d.]+) +([\d.]+) +([\d.]+) \(([\d.]+)-([\d.]+)\) +[\d.]+ +([\d.]+)", line
    )
    this, that, median, q20, q80, of_the_pair = map(float, match.groups())
    assert this > 0 and that > 0
    assert q20 <= median <= q80 and of_the_pair == median


def test_a_checkout_that_fails_ends_it_with_its_name(tmp_path):
    (tmp_path / "broken" / "fsam_ext").mkdir(parents=True)
    (tmp_path / "broken" / "fsam_ext" / "__init__.py").write_text("raise RuntimeError('no library')")
    ended = compare(tmp_path / "broken", "--cases", "tensors_1000 sgd flat", cwd=tmp_path)
    assert ended.returncode == 1
    assert f"tensors_1000 sgd flat: {tmp_path / 'broken'} failed" in ended.stderr and "no library" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((".",), "OTHER_CHECKOUT .: there is no fsam_ext in it"),
        ((ROOT, "--cases", "gpt9"), "--cases gpt9: no case holds"),
    ],
)
def test_a_wrong_argument_is_said_in_one_sentence(tmp_path, arguments, said):
    ended = compare(*arguments, cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.startswith(said) and len(ended.stderr.splitlines()) == 1
