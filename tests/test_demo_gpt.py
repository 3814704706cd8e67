"""The language models at tiny settings: texts, tokens, quantization, forks, exact resume, and the command.

No test here touches the network, and none reads the folder where a user keeps texts.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
for extra in ("matplotlib", "tqdm"):
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


@pytest.fixture(autouse=True)
def one_thread():
    """These matrices are too small to share; threads waiting for each other waste a busy core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- texts ------------------------------------------------------------------------------------


def compressed(data: bytes, widest: int = 16, clear_at: int | None = None) -> bytes:
    """What compress(1) writes after its header; the table is cleared once it has ``clear_at`` entries."""
    table = {bytes([byte]): byte for byte in range(256)}
    size, width, bits, section = 257, 9, "", 0

    def pad() -> str:
        missing = -(len(bits) - section) % (8 * width)
        return bits + "0" * missing

    def put(code: int) -> str:
        return bits + format(code, f"0{width}b")[::-1]

    phrase = b""
    for byte in data:
        longer = phrase + bytes([byte])
        if longer in table:
            phrase = longer
            continue
        bits = put(table[phrase])
        if size < 1 << widest:
            table[longer] = size
            size += 1
        # A decoder knows an entry one code later, and it is the decoder's count that widens codes.
        if size - 1 >= 1 << width and width < widest:
            bits = pad()
            section, width = len(bits), width + 1
        if clear_at is not None and size >= clear_at:
            bits = put(256)
            bits = pad()
            section, width, size = len(bits), 9, 257
            table = {entry: code for entry, code in table.items() if code < 256}
            clear_at = None
        phrase = longer[-1:]
    bits = put(table[phrase]) if phrase else bits
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))


@pytest.mark.parametrize("clear_at", [None, 300, 1000])
@pytest.mark.parametrize("letters", [1, 4, 256])
def test_what_compress_packed_is_unpacked(letters, clear_at):
    import gpt_texts

    data = bytes(random.Random(letters).choices(range(letters), k=6000))
    packed = compressed(data, clear_at=clear_at)
    assert gpt_texts.lzw(packed) == data
    if shutil.which("gzip"):  # judges the test's own packing
        judged = subprocess.run(["gzip", "-dc"], input=b"\x1f\x9d\x90" + packed, capture_output=True)
        assert judged.stdout == data, judged.stderr


def bible(windows: list[bytes]) -> bytes:
    packed = [compressed(window) for window in windows]
    begins = [92 + 4 * len(packed) + sum(map(len, packed[:i])) for i in range(len(packed))]
    numbers = b"".join(number.to_bytes(4, "big") for number in [len(packed), *begins])
    return b"EC02Compressed Data File".ljust(88, b"\0") + numbers + b"".join(packed)


def deb(files: dict[str, bytes], compression: str = "xz") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": packed.getvalue()}
    out = b"!<arch>\n"
    for name, content in members.items():
        out += b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (name.encode(), 0, 0, 0, b"100644", len(content))
        out += content + b"\n" * (len(content) % 2)
    return out


FILES = {"docs/b.rst.txt": b"second", "docs/a.rst.txt": b"first ", "docs/a.html": b"no", "docs.rst.txt": b"no"}


def package(urls: list[Path], text: bytes = b"first second", **changes):
    import gpt_texts

    sha256 = hashlib.sha256(text).hexdigest()
    known = gpt_texts.Package("docs", "a text", 1, tuple(u.as_uri() for u in urls), "docs", ".rst.txt", bytes, sha256)
    return known._replace(**changes)


def test_the_next_source_is_asked_and_its_text_is_kept(tmp_path):
    import gpt_texts

    missing, other, right = (tmp_path / name for name in ("missing.deb", "other.deb", "right.deb"))
    other.write_bytes(deb({**FILES, "docs/a.rst.txt": b"changed"}))
    right.write_bytes(deb(FILES))
    said: list[str] = []
    assert gpt_texts.load(package([missing, other, right]), say=said.append) == b"first second"
    assert len(said) == 3 and all("fetching a text" in line for line in said)
    assert gpt_texts.load(package([]), say=said.append) == b"first second" and len(said) == 3


def test_a_text_that_is_nowhere_has_a_reason_for_each_source(tmp_path):
    import gpt_texts

    files = {"page.html": b"<html>", "cut.deb": deb(FILES)[:-150], "other.deb": deb({"docs/a.rst.txt": b"changed"})}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(gpt_texts.Unavailable) as refused:
        gpt_texts.load(package([tmp_path / name for name in files]), say=lambda _: None)
    lines = str(refused.value).splitlines()
    assert "Debian's docs" in lines[0] and len(lines) == 4
    for line, name, reason in zip(
        lines[1:], files, ("not a Debian package", "not a whole archive", "sha256"), strict=True
    ):
        assert name in line and reason in line


def test_bible_data_is_read_window_by_window(tmp_path):
    import gpt_texts

    windows = [b"In the beginning God created " * 40, b"the heaven and the earth." * 9]
    path = tmp_path / "kjv.deb"
    path.write_bytes(deb({"usr/lib/bible.data": bible(windows)}, "gz"))
    known = package([path], b"".join(windows), root="usr/lib/bible.data", suffix="", decode=gpt_texts.uncompressed)
    assert gpt_texts.load(known, say=lambda _: None) == b"".join(windows)
    with pytest.raises(gpt_texts.Unavailable, match="EC02"):
        gpt_texts.uncompressed(gzip.compress(b"another format"))


# ---- tokens -----------------------------------------------------------------------------------


def plain_pairs(text: bytes, vocabulary: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Byte pairs without arrays: (merges, tokens)."""
    from gpt_tokens import WORD

    words = [list(word) for word in WORD.findall(text)]
    merges = []
    while 256 + len(merges) < vocabulary:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in words:
            for i in range(len(word)):
                if tuple(word[i : i + 2]) == pair:
                    word[i : i + 2] = [256 + len(merges)]
        merges.append(pair)
    return merges, [token for word in words for token in word]


def test_byte_pairs_are_those_of_the_plain_algorithm():
    import gpt_tokens

    text = (ROOT / "docs" / "bases.md").read_bytes()[:3000] + b"aaaaa aaaa  ----- \xff\x00\xff\x00" * 9
    words = gpt_tokens.Words.of(text)
    merges, tokens = plain_pairs(text, 300)
    assert gpt_tokens.learn(words, 300) == merges
    assert gpt_tokens.encode(words, merges).tolist() == tokens
    assert len(tokens) < len(text)


def test_tokens_of_another_text_spell_it():
    import gpt_tokens

    merges = gpt_tokens.learn(gpt_tokens.Words.of(b"the theme of the thesis " * 20), 262)
    spelling = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        spelling.append(spelling[left] + spelling[right])
    for text in (b"", b"x", b"the other\n\n  thing\t\x80", bytes(range(256))):
        tokens = gpt_tokens.encode(gpt_tokens.Words.of(text), merges)
        assert b"".join(spelling[token] for token in tokens) == text


def test_what_is_held_out_is_not_trained_on():
    import gpt_tokens

    context, count = 4, 20
    tokens = np.arange(8000, dtype=np.int16)  # each is its own place
    text = gpt_tokens.Text.of(tokens, context, count)
    assert text.held_out.shape == (count, context + 1)
    assert text.held_out.diff(dim=1).eq(1).all()
    held = set(text.held_out.flatten().tolist())
    assert len(held) == count * (context + 1) and held.isdisjoint(text.train.tolist())
    assert len(text.train) == 8000 - 12 * 40  # of 200 pieces of eight windows, 12 are held out


# ---- measures ---------------------------------------------------------------------------------


def tiny_recipe(**changes):
    from gpt_training import Recipe

    settings = {"vocabulary": 40, "layers": 2, "width": 16, "context": 8, "batch": 3, "steps": 10, "finetune": 6}
    return Recipe(**settings | {"held_out": 5} | changes)


def some_tokens(count: int = 600) -> torch.Tensor:
    return torch.randint(40, (count,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bits", [3, 4])
def test_rounding_is_to_the_nearest_level_of_each_block(bits):
    from gpt_measure import rounded

    torch.manual_seed(0)
    weight = torch.randn(6, 48) * torch.tensor([1.0, 100.0]).repeat_interleave(3)[:, None]
    weight.view(-1)[64:128] = 0  # the second block
    found = rounded(weight, bits)
    last = 2 ** (bits - 1) - 1
    for block, to in zip(weight.flatten().split(64), found.flatten().split(64), strict=True):  # the last has 32
        scale = float(block.abs().max()) / last
        nearest = [min(range(-last, last + 1), key=lambda level: abs(level * scale - float(w))) for w in block]
        torch.testing.assert_close(to, torch.tensor(nearest) * scale)


def test_only_the_matrices_of_blocks_are_quantized():
    from gpt_measure import quantized

    model = tiny_recipe().model(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rough = quantized(model, 4).state_dict()
    changed = {name for name in before if not rough[name].equal(before[name])}
    assert changed == {name for name in before if name.startswith("blocks.") and before[name].dim() == 2}
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_loss_is_the_mean_over_tokens():
    from gpt_measure import loss

    model = tiny_recipe().model(0)
    windows = some_tokens(9 * 50).view(50, 9)
    logits = model(windows[:, :-1])
    chosen = logits.log_softmax(-1).gather(-1, windows[:, 1:, None])
    assert loss(model, windows) == pytest.approx(-float(chosen.detach().double().mean()), rel=1e-5)


def test_a_token_does_not_see_what_comes_after_it():
    model = tiny_recipe().model(0)
    windows = some_tokens(16).view(2, 8)
    changed = windows.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 40
    torch.testing.assert_close(model(windows)[:, :5], model(changed)[:, :5])
    assert not torch.allclose(model(windows)[:, 5:], model(changed)[:, 5:])


def test_forgetting_at_a_loss_is_interpolated():
    from gpt_measure import Point, forgetting, forgetting_at

    curve = [Point(0, 3.0, 5.0), Point(100, 3.2, 4.0), Point(200, 3.6, 3.5)]
    assert forgetting(curve) == pytest.approx(0.6)
    assert [forgetting_at(curve, at) for at in (5.0, 4.5, 4.0, 3.75, 3.5)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.6])
    assert forgetting_at(curve, 3.4) != forgetting_at(curve, 3.4)  # nan: not reached


# ---- training ---------------------------------------------------------------------------------


def trained(stretch, steps: int | None = None, end=None, first: int = 0, seed: int = 1):
    from gpt_training import Training

    training = Training(stretch, tiny_recipe(), seed, some_tokens(), first)
    if end is not None:
        training.fork(end)
    for _ in range(stretch.steps if steps is None else steps):
        training.train_step()
    return training


def same_bits(a, b) -> bool:
    return all(value.equal(b.state_dict()[name]) for name, value in a.state_dict().items())


def test_a_fork_goes_on_with_the_weights_and_moments_of_its_trunk(tmp_path):
    from gpt_training import Stretch

    whole = trained(Stretch("adamw", 16, 0, 3e-3))
    end = trained(Stretch("adamw", 10, 0, 3e-3)).save(tmp_path / "trunk.pt")
    fork = trained(Stretch("adamw", 6, 0, 3e-3), end=end, first=10)
    assert same_bits(fork.model, whole.model) and fork.passes == 16

    # F-SAM with rho 0 is AdamW, so what differs is whether the moments have come with the weights.
    sharp = trained(Stretch("fsam", 6, 0, 3e-3, rho=0.0), end=end, first=10)
    for name, value in sharp.model.state_dict().items():
        torch.testing.assert_close(value, whole.model.state_dict()[name])
    other = trained(Stretch("fsam", 6, 0, 3e-3, rho=0.1), end=end, first=10)
    assert not torch.allclose(other.model.embedding.weight, whole.model.embedding.weight)


def test_the_learning_rate_falls_linearly_to_zero():
    from gpt_training import Stretch

    rates = [Stretch("adamw", 2, 4, 8.0).lr_at(step) for step in range(7)]
    assert rates == [8, 8, 8, 6, 4, 2, 0]
    training = trained(Stretch("sam", 0, 4, 8e-3, rho=0.1), steps=3)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(4e-3)


def test_passes_are_counted_and_batches_are_the_seeds():
    from gpt_training import arms, batch

    recipe, tokens = tiny_recipe(steps=50), some_tokens()
    found = {name: trained(arm).passes for name, arm in arms(recipe).items()}
    assert found == {
        "short": 10, "middle": 20, "long": 40, "late": 40, "sam": 40, "fsam": 40, "every": 24, "reuse": 24
    }  # fmt: skip
    windows = batch(tokens, recipe, 1, 7)
    assert windows.shape == (3, 9) and windows.equal(batch(tokens, recipe, 1, 7))
    assert not windows.equal(batch(tokens, recipe, 1, 8)) and not windows.equal(batch(tokens, recipe, 2, 7))


@pytest.mark.parametrize("arm", ["late", "sam", "reuse"])
def test_interrupt_inside_a_step_resumes_bit_for_bit(arm, tmp_path):
    """The signal comes from inside a forward of the second half, where v and the average are there."""
    from gpt_training import Interrupted, Training, arms
    from training import DeferredInterrupt

    recipe, tokens, path = tiny_recipe(steps=40), some_tokens(), tmp_path / "arm.pt"
    stretch = arms(recipe)[arm]
    end = trained(stretch, steps=0).save(tmp_path / "trunk.pt")
    whole = trained(stretch, end=end)

    def begun() -> Training:
        training = Training(stretch, recipe, 1, tokens)
        training.fork(end)
        return training

    cut = begun()
    calls = 0

    def interrupt_in_forward(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 13:
            signal.raise_signal(signal.SIGINT)

    cut.model.register_forward_pre_hook(interrupt_in_forward)
    with DeferredInterrupt() as interrupt, pytest.raises(Interrupted):
        cut.fit(path, interrupt, lambda: None)
    assert 0 < cut.step < stretch.steps
    resumed = begun()
    resumed.load(path)
    assert resumed.step == cut.step
    with DeferredInterrupt() as interrupt:
        resumed.fit(path, interrupt, lambda: None)
    assert resumed.passes == whole.passes
    assert same_bits(resumed.model, whole.model)


# ---- the command ------------------------------------------------------------------------------


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
    assert first[0]["loss"] < np.log(280) and first[0]["loss3"] != first[0]["loss"]
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

    def row(arm: str, seed: int, loss: float, ends: float) -> Row:
        curve = [[0, loss, 5.0], [6, loss + 0.5, ends]]
        return Row(arm, seed, 10, loss, loss + 0.25, loss + 1, [curve, curve])

    rows = [row("sam", 0, 3.0, 4.0), row("fsam", 0, 3.1, 4.5), row("sam", 1, 2.0, 4.0), row("fsam", 1, 2.3, 4.0)]
    found = gpt_report.values([*rows, row("short", 2, 1.0, 1.0)])
    assert found["sam"][0]["matched at 1e-4"] == pytest.approx(0.25)  # halfway to 4.0
    assert found["fsam"][0]["matched at 1e-4"] == pytest.approx(0.5)
    assert found["sam"][1]["matched at 3e-4"] == pytest.approx(0.5)
    assert found["sam"][1]["4 bits add"] == pytest.approx(0.25)
    text = gpt_report.report(rows, tiny_recipe(steps=50))
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
