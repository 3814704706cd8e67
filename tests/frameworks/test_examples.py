"""The examples of frameworks: they learn, their logs have what people look at, and a picture can be drawn of it."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_lightning_digits(tmp_path, monkeypatch):
    pytest.importorskip("lightning.pytorch")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["lightning_digits.py", "--epochs", "3", "--runs", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "lightning_digits.py"), run_name="__main__")
    with open(tmp_path / "lightning_digits/version_0/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert float([row["accuracy"] for row in rows if row["accuracy"]][-1]) > 0.85
    assert sum(bool(row["fsam/cosine"]) for row in rows) == 3 * 23 // 10
    pytest.importorskip("matplotlib")
    picture = tmp_path / "pictures" / "curves.svg"
    log = tmp_path / "lightning_digits/version_0/metrics.csv"
    monkeypatch.setattr(sys, "argv", ["log_curves.py", str(log), str(picture)])
    runpy.run_path(str(EXAMPLES / "log_curves.py"), run_name="__main__")
    drawn = picture.read_text()
    for said in ("fsam/cosine", "fsam/grad_norm", "fsam/noise_norm", "fsam/found_inf in 0 of 6 logged steps", "loss"):
        assert f"<!-- {said}" in drawn
    assert "effective_cosine" not in drawn  # weights of float32 are not rounded


def test_trainer_digits(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["trainer_digits.py", "--epochs", "4", "--runs", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "trainer_digits.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert said.count("fsam/cosine") == 4
    assert float(said.rpartition("'eval_accuracy': '")[2].partition("'")[0]) > 0.5
