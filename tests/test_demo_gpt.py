"""The command of the language models at tiny settings: tables, more seeds, resume, and what it refuses.

No test here touches the network, and none reads the folder where a user keeps texts.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

for extra in ("numpy", "matplotlib", "tqdm"):
    pytest.importorskip(extra, reason="the demo's extras are not installed: pip install .[demo]")

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "gpt.py"
SETTINGS = {"vocabulary": 280, "layers": 1, "width": 16, "context": 16, "batch": 4}
SETTINGS |= {"held-out": 8, "steps": 20, "finetune": 6}
TINY = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("FSAM_DATA", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path) -> list[str]:
    """Two real texts of this repository, as options."""
    files = {"one.txt": ROOT.glob("docs/*.md"), "two.txt": ROOT.glob("fsam_ext/*.py")}
    for name, parts in files.items():
        (tmp_path / name).write_bytes(b"".join(path.read_bytes() for path in sorted(parts))[:60_000])
    return ["--text1", str(tmp_path / "one.txt"), "--text2", str(tmp_path / "two.txt")]


def rows(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["rows"]


def test_tables_picture_and_more_seeds(texts, tmp_path, capsys):
    import gpt
    import gpt_report

    out, docs = tmp_path / "out", tmp_path / "page.md"
    options = [*texts, *TINY, "--out", str(out)]
    assert gpt.main(options) == 0
    said = capsys.readouterr().out
    for text in ("| AdamW, 4 steps of decay ", "F-SAM 0.1 in 8, every 5, reuse 0.3 - F-SAM 0.1 in 8", "1 seed"):
        assert text in said
    first = rows(out)
    assert [row["arm"] for row in first] == list(gpt.ARMS)
    assert [row["passes"] for row in first] == [24, 28, 36, 36, 36, 36, 30, 30]
    assert first[0]["loss"] < math.log(280) and first[0]["loss3"] != first[0]["loss"]
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")

    docs.write_text(f"before\n{gpt_report.BEGIN}\nold\n{gpt_report.END}\nafter\n")
    made = {path: path.stat().st_mtime_ns for path in (out / "checkpoints").glob("*-seed0.pt")}
    assert len(made) == 9
    assert gpt.main([*options, "--seeds", "2", "--arms", "short", "reuse", "--docs", str(docs)]) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert rows(out)[:8] == first
    assert [(row["arm"], row["seed"]) for row in rows(out)[8:]] == [("short", 1), ("reuse", 1)]
    page = docs.read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "2 seeds, mean ± standard error" in page
    assert capsys.readouterr().out.count("±") == page.count("±") > 2 * 5  # at the least both arms' first table
    assert docs.with_suffix(".svg").read_text().startswith("<?xml")


def test_differences_are_paired_and_matched_at_what_all_arms_reach():
    import gpt_report
    from gpt_results import Row
    from gpt_training import Recipe

    def row(arm: str, seed: int, loss: float, ends: float) -> Row:
        curve = [[0, loss, 5.0], [6, loss + 0.5, ends]]
        return Row(arm, seed, 10, loss, loss + 0.25, loss + 1, [curve, curve])

    rows = [row("sam", 0, 3.0, 4.0), row("fsam", 0, 3.1, 4.5), row("sam", 1, 2.0, 4.0), row("fsam", 1, 2.3, 4.0)]
    found = gpt_report.values([*rows, row("short", 2, 1.0, 1.0)])
    assert found["sam"][0]["matched at 1e-4"] == pytest.approx(0.25)  # halfway to 4.0
    assert found["fsam"][0]["matched at 1e-4"] == pytest.approx(0.5)
    assert found["sam"][1]["matched at 3e-4"] == pytest.approx(0.5)
    assert found["sam"][1]["4 bits add"] == pytest.approx(0.25)
    text = gpt_report.report(rows, Recipe(steps=50))
    (line,) = [line for line in text.splitlines() if "F-SAM 0.1 in 20 - SAM 0.1 in 20" in line and "±" in line][:1]
    assert "+0.200 ± 0.100" in line and "10 - 10" in line


def environment() -> dict[str, str]:
    """The demo's process imports from where the tests do, and has one thread as they have."""
    path = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_sigint_then_the_same_command_gives_the_figures_of_an_undisturbed_run(texts, tmp_path):
    """A real process and a real signal, at whatever step it happens to land."""
    import gpt

    options = [*texts, *TINY, "--steps", "100", "--arms", "short", "reuse"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [sys.executable, str(SCRIPT), *options, "--out", str(cut)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (cut / "checkpoints").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "the same command goes on" in said and len(rows(cut)) < 2
    for out in (cut, whole):
        assert gpt.main([*options, "--out", str(out)]) == 0
    assert rows(cut) == rows(whole) and len(rows(cut)) == 2


def refusal(options: list[str], capsys) -> str:
    """The one sentence of a command that does not run."""
    import gpt

    with pytest.raises(SystemExit) as left:
        gpt.main(options)
    assert left.value.code
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--arms", "adam"], "invalid choice: 'adam'"),
        (["--width", "15"], "--width 15 cannot be shared by --heads 2"),
        (["--vocabulary", "200"], "--vocabulary 200: give 256"),
        (["--steps", "4"], "--steps 4: a fork has a fifth of them"),
        (["--steps", "0"], "0 is not a positive whole number"),
        (["--rho", "-1"], "rho must be"),
        (["--docs", "nowhere.md"], "--docs nowhere.md: not a document with the lines"),
        (["--text1", "nowhere.txt"], "the text nowhere.txt cannot be read: No such file"),
        (["--held-out", "4000"], "the text one.txt"),
        (["--text1", str(ROOT / "LICENSE"), "--vocabulary", "4096"], "the text LICENSE"),
    ],
)
def test_bad_input_is_told_in_one_sentence(options, sentence, texts, tmp_path, capsys):
    said = refusal([*texts, *TINY, "--out", str(tmp_path / "out"), *options], capsys)
    assert sentence in said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_one_is_named(texts, tmp_path, capsys):
    said = refusal([*texts, *TINY, "--out", str(tmp_path / "one.txt")], capsys)
    assert f"--out {tmp_path / 'one.txt'}: no folder that can be written" in said


def test_a_short_second_text_is_named(texts, tmp_path, capsys):
    (tmp_path / "two.txt").write_bytes(b"")
    said = refusal([*texts, *TINY, "--out", str(tmp_path / "out")], capsys)
    assert "the text two.txt" in said and "too short: 0 tokens" in said


def test_results_and_checkpoints_of_another_recipe_are_refused(texts, tmp_path, capsys):
    import gpt

    out = tmp_path / "out"
    options = [*texts, *TINY, "--out", str(out), "--arms", "short"]
    assert gpt.main(options) == 0
    for other, sentence in ((["--rho", "0.2"], "--rho 0.1, and this command says 0.2"), (texts[:2], "--text1 one.txt")):
        (tmp_path / "one.txt").write_bytes((tmp_path / "one.txt").read_bytes() + b"." * (other == texts[:2]))
        assert sentence in refusal([*options, *other], capsys)
    (out / "results.json").unlink()
    assert "trunk-seed0.pt was made with --text1" in refusal(options, capsys)
    (out / "results.json").write_text("{}")
    assert "is not what this demo writes" in refusal(options, capsys)
