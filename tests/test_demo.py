"""The demo on tiny settings and bundled data: exact resume, its rows, its files.

No test here touches the network, and none reads the folder where a user keeps Fashion-MNIST.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for extra in ("numpy", "matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(extra, reason="the demo's extras are not installed: pip install .[demo]")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / "fashion_mnist.py"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--dataset", "digits", "--out", str(out), *options]


def environment() -> dict[str, str]:
    """The demo's process imports from where the tests do, and has one thread as they have."""
    path = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def demo(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *options), env=environment(), capture_output=True, text=True, timeout=300)


# ---- resume -----------------------------------------------------------------------------------


def assert_same_bits(a: object, b: object, where: str = "checkpoint") -> None:
    """Everything but the wall-clock seconds."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds"}:
            assert_same_bits(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8)), where
    else:
        assert a == b, where


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_sigint_then_resume_gives_the_bits_of_an_undisturbed_run(tmp_path):
    """Real processes and a real signal, at whatever step it happens to land."""
    import fashion_mnist

    options = ("--method", "fsam", "--rho", "0.05", "--every", "--reuse", "--epochs", "30")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    name = "fsam-rho0.05-seed0.pt"
    checkpoint = cut / "checkpoints" / name

    process = subprocess.Popen(command(cut, *options), env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "--resume" in said and str(checkpoint) in said
    half = load(checkpoint)
    assert 0 < half["epoch"] < 30 and half["top_eigenvalue"] is None

    resumed = demo(cut, "--resume")  # with the options that it was started with
    assert resumed.returncode == 0, resumed.stderr
    assert fashion_mnist.main(["--dataset", "digits", "--out", str(whole), *options]) == 0
    assert_same_bits(load(checkpoint), load(whole / "checkpoints" / name))


@pytest.mark.parametrize(("method", "arch"), [("base", "mlp"), ("sam", "mlp"), ("fsam", "mlp"), ("fsam", "cnn")])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("at", ["first pass", "second pass", "last step of an epoch"])
def test_interrupt_inside_a_step_resumes_bit_for_bit(method, arch, base, at, tmp_path, monkeypatch):
    """The signal comes from inside the forward of a chosen pass: the worst moment, every time."""
    import data
    import training

    monkeypatch.setattr(training, "TRAIN_SIZE", 300)
    rho = None if method == "base" else 0.1
    fsam = {"sigma": 1.0, "lmbda": 0.9} if method == "fsam" else {}
    run = training.Run("digits", method, 0, base, 0.01, 5e-4, 3, 0.4, rho, arch=arch, **fsam)
    digits = data.load("digits")

    def fit(trainer: training.Trainer, path: Path) -> training.Result:
        with training.DeferredInterrupt() as interrupt:
            return trainer.fit(path, interrupt)

    undisturbed = tmp_path / "undisturbed.pt"
    expected = fit(training.Trainer(run, digits), undisturbed)

    passes = 1 if method == "base" else 2
    trainer = training.Trainer(run, digits)
    assert trainer.steps_per_epoch == 3
    # Counted from 1, across epochs; in the last one, whose mean loss and batch order then rest on the checkpoint.
    step = 9 if at == "last step of an epoch" else 8
    fatal_call = passes * (step - 1) + (1 if at == "first pass" else passes)
    calls = 0

    def interrupt_in_forward(module, inputs):
        nonlocal calls
        calls += module.training
        if module.training and calls == fatal_call:
            signal.raise_signal(signal.SIGINT)

    trainer.model.register_forward_pre_hook(interrupt_in_forward)
    cut = tmp_path / "cut.pt"
    with pytest.raises(training.Interrupted):
        fit(trainer, cut)
    assert load(cut)["epoch"] * 3 + load(cut)["step"] == step
    assert calls == passes * step

    resumed = training.Trainer(run, digits)
    resumed.load(cut)
    result = fit(resumed, cut)
    assert_same_bits(load(cut), load(undisturbed))
    assert result.curve == expected.curve
    assert result.top_eigenvalue == expected.top_eigenvalue


def test_interrupt_during_the_eigenvalue_keeps_the_training(tmp_path, monkeypatch):
    import data
    import training

    run = training.Run("digits", "base", 0, "sgd", 0.05, 5e-4, 1, 0.4)
    digits = data.load("digits")
    trainer = training.Trainer(run, digits)
    eigenvalue = training.top_hessian_eigenvalue

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return eigenvalue(*args, **kwargs)

    path = tmp_path / "run.pt"
    monkeypatch.setattr(training, "top_hessian_eigenvalue", interrupted)
    with training.DeferredInterrupt() as interrupt, pytest.raises(training.Interrupted):
        trainer.fit(path, interrupt)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    resumed = training.Trainer(run, digits)
    resumed.load(path)
    assert resumed.epoch == 1 and resumed.top_eigenvalue is None
    with training.DeferredInterrupt() as interrupt:
        assert resumed.fit(path, interrupt).top_eigenvalue > 0


def test_a_second_interrupt_does_not_wait():
    from training import DeferredInterrupt

    with pytest.raises(KeyboardInterrupt), DeferredInterrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        signal.raise_signal(signal.SIGINT)


# ---- the command ------------------------------------------------------------------------------


def test_table_csv_and_picture_of_a_tiny_run(tmp_path, capsys):
    import fashion_mnist
    import report

    options = ["--dataset", "digits", "--out", str(tmp_path)]
    few = ["--every", "--reuse", "--longer"]
    assert fashion_mnist.main([*options, *few, "--epochs", "2", "--seeds", "2", "--rho", "0.05"]) == 0
    said = capsys.readouterr().out
    for text in ("SGD tuned", "F-SAM rho 0.05", "F-SAM rho 0.05 - SAM rho 0.05", "paired by seed", "±"):
        assert text in said
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["seed"]) for row in rows] == [
        (label, seed) for seed in "01" for label in ("SGD", "SGD tuned", "SAM rho 0.05", "F-SAM rho 0.05")
    ]
    with (tmp_path / "curves.csv").open() as file:
        curves = list(csv.DictReader(file))
    assert len(curves) == len(rows) * 2
    last = {(c["label"], c["seed"]): c["test_accuracy"] for c in curves if c["epoch"] == "2"}
    assert all(last[row["label"], row["seed"]] == row["test_accuracy"] for row in rows)
    # The table's figure is the mean of what the CSV says.
    mean = sum(100 * float(row["test_accuracy"]) for row in rows if row["label"] == "SGD") / 2
    table = said[said.index("-----") :]
    line = next(line for line in table.splitlines() if line.startswith("SGD  "))
    assert f"{mean:.2f} ±" in line
    read = report.read_csv(tmp_path)
    assert [str(run.rho or "") for run, _ in read] == [row["rho"] for row in rows]
    assert [result.curve[-1] for _, result in read] == [float(row["test_accuracy"]) for row in rows]
    assert report.table(read) in said
    picture = tmp_path / "results.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert str(picture) in said

    # A finished run resumes to the same table without training again, and grows by a seed.
    assert fashion_mnist.main([*options, "--resume", "--seeds", "3"]) == 0
    with (tmp_path / "results.csv").open() as file:
        grown = list(csv.DictReader(file))
    assert grown[: len(rows)] == rows and len(grown) == 12


def test_the_rows_of_make_demo(tmp_path):
    import fashion_mnist

    options = ["--dataset", "digits", "--backend", "reference", "--rho", "0.05", "--epochs", "2"]
    assert fashion_mnist.main([*options, "--out", str(tmp_path)]) == 0
    with (tmp_path / "results.csv").open() as file:
        rows = {row["label"].replace(" rho 0.05", ""): row for row in csv.DictReader(file)}
    # A step has two passes where it ascends and else one. The digits make 11 steps an epoch.
    ascents = {
        "SGD": 0,
        "SGD tuned": 0,
        "SGD, 2 x epochs": 22,
        "SGD tuned, 2 x epochs": 22,
        "SAM": 22,
        "F-SAM": 22,
        "F-SAM, every 2": 11,
        "F-SAM, every 5": 5,
        "F-SAM, every 2, reuse 0.4": 11,
        "F-SAM, every 5, reuse 0.3": 5,
        "F-SAM, every 10, reuse 0.3": 3,
    }
    passes = {label: float(row["passes"]) for label, row in rows.items()}
    assert passes == pytest.approx({label: 1 + n / 22 for label, n in ascents.items()})
    assert list(rows) == list(ascents)
    assert len({row["train_loss"] for row in rows.values()}) == len(rows)  # each one trained in its own way
    with (tmp_path / "curves.csv").open() as file:
        epochs = [row["label"] for row in csv.DictReader(file)]
    assert epochs.count("SGD, 2 x epochs") == 4 and epochs.count("SGD") == 2
    # The rows are part of what --resume finds again.
    before = (tmp_path / "results.csv").read_text()
    assert fashion_mnist.main(["--resume", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "results.csv").read_text() == before


def test_the_convolutional_net_sees_each_batch_once_in_its_statistics(tmp_path):
    import fashion_mnist

    options = ["--dataset", "digits", "--arch", "cnn", "--method", "base", "sam", "fsam", "--noise", "0.2"]
    few = ["--every", "--longer", "--reuse", "5:0.3", "--rho", "0.2", "--backend", "reference", "--epochs", "1"]
    assert fashion_mnist.main([*options, *few, "--out", str(tmp_path)]) == 0
    names = ("base", "sam-rho0.2", "fsam-rho0.2", "fsam-rho0.2-every-5-reuse-0.3")
    for name in names:
        state = load(tmp_path / "checkpoints" / f"{name}-seed0.pt")
        batches = [value for key, value in state["model"].items() if key.endswith("num_batches_tracked")]
        assert len(batches) == 3 and set(map(int, batches)) == {11}, name  # of passes there are up to 22
        assert state["run"]["arch"] == "cnn" and state["run"]["noise"] == 0.2


def test_a_checkpoint_of_the_time_before_there_were_nets_to_choose_resumes(tmp_path):
    import data
    import training

    run = training.Run("digits", "base", 0, "sgd", 0.05, 5e-4, 3, 0.4)
    digits = data.load("digits")
    path = tmp_path / "run.pt"
    trainer = training.Trainer(run, digits)
    trainer.train_step()
    trainer.save(path)
    state = load(path)
    for name in ("arch", "longer", "reuse"):
        del state["run"][name]
    torch.save(state, path)
    resumed = training.Trainer(run, digits)
    resumed.load(path)
    assert resumed.step == 1


def test_schedules_and_averages_are_runs_of_their_own(tmp_path, capsys):
    import fashion_mnist

    options = ["--dataset", "digits", "--method", "fsam", "--rho", "0.05", "--epochs", "2", "--out", str(tmp_path)]
    changes = ["--every", "1", "2", "5", "--reuse", "--last", "0.3", "--average", "bfloat16", "int8"]
    assert fashion_mnist.main([*options, *changes]) == 0
    said = capsys.readouterr().out
    with (tmp_path / "results.csv").open() as file:
        rows = {row["label"].removeprefix("F-SAM rho 0.05"): row for row in csv.DictReader(file)}
    names = ["", ", every 2", ", every 5", ", last 30%", ", bfloat16 average", ", int8 average"]
    assert list(rows) == names
    # A step has two passes where it ascends and else one. The digits make 11 steps an epoch.
    steps = 22
    ascents = [steps, 11, 5, 7, steps, steps]
    assert [float(row["passes"]) for row in rows.values()] == [1 + n / steps for n in ascents]
    assert len({row["train_loss"] for row in rows.values()}) == len(names)  # each one trained in its own way
    for name in names[1:]:
        assert f"F-SAM rho 0.05{name} - F-SAM rho 0.05 " in said
    assert (tmp_path / "checkpoints" / "fsam-rho0.05-last-30%-seed0.pt").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--method", "fsam", "--rho", "-1"], "rho"),
        (["--method", "fsam", "--lmbda", "1.5"], "lmbda"),
        (["--method", "sam", "--backend", "abacus"], "abacus"),
        (["--last", "1.5"], "1.5 is not in [0, 1]"),
        (["--lmbda", "0.9995", "--average", "int8"], "int8"),
        (["--epochs", "0"], "0 is not a positive whole number"),
        (["--method", "tuned", "--base", "adam"], "tuned is for --base sgd only"),
        (["--resume"], "there is no run in"),
        (["--arch", "vgg"], "'vgg' (choose from"),
        (["--noise", "1.5"], "1.5 is not in [0, 1]"),
        (["--noise", "much"], "much is not a number in [0, 1]"),
        (["--every", "2.5"], "2.5 is not a positive whole number"),
        (["--longer", "0"], "0 is not a positive whole number"),
        (["--reuse", "5"], "5 is not STEPS:SHARE, as in 5:0.3"),
        (["--reuse", "0:0.3"], "0:0.3 is not STEPS:SHARE"),
        (["--reuse", "5:-0.3"], "reuse"),
        (["--reuse", "1:0.3"], "every"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, sentence, tmp_path, monkeypatch, capsys):
    import fashion_mnist

    with pytest.raises(SystemExit) as stopped:
        fashion_mnist.main(["--dataset", "digits", "--out", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert sentence in last
    assert not (tmp_path / "out").exists()


def test_a_resume_of_another_run_is_refused_in_one_sentence(tmp_path, capsys):
    import fashion_mnist

    options = ["--dataset", "digits", "--out", str(tmp_path), "--method", "base", "--longer", "--epochs", "1"]
    assert fashion_mnist.main(options) == 0

    def refusal(*others: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            fashion_mnist.main(["--out", str(tmp_path), "--resume", *others])
        assert stopped.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    checkpoint = tmp_path / "checkpoints" / "base-seed0.pt"
    before = checkpoint.read_bytes()
    for option, was, now in (("arch", "mlp", "cnn"), ("noise", "0.4", "0.2"), ("lr", "0.05", "0.3"), ("epochs", 1, 2)):
        sentence = f"base-seed0.pt was written with {option}={was}, but this command says {option}={now}: leave out"
        assert sentence in refusal(f"--{option}", str(now))
    assert "epochs=1, noise=0.4, but this command says epochs=3, noise=0.1" in refusal(
        "--epochs", "3", "--noise", "0.1"
    )
    (tmp_path / "options.json").write_text("{")
    assert "options.json is not what this demo writes" in refusal()
    assert checkpoint.read_bytes() == before


def test_a_fresh_start_keeps_the_checkpoints_of_the_run_before(tmp_path, capsys):
    import fashion_mnist

    options = ["--dataset", "digits", "--out", str(tmp_path), "--method", "base", "--epochs"]
    assert fashion_mnist.main([*options, "1"]) == 0
    assert fashion_mnist.main([*options, "2"]) == 0
    assert "checkpoints.previous" in capsys.readouterr().out
    assert load(tmp_path / "checkpoints.previous" / "base-seed0.pt")["epoch"] == 1
    assert load(tmp_path / "checkpoints" / "base-seed0.pt")["epoch"] == 2


def test_help_names_every_option(capsys):
    import fashion_mnist

    with pytest.raises(SystemExit) as stopped:
        fashion_mnist.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    names = "method rho sigma lmbda every reuse longer last average base lr weight-decay tuned"
    names += " arch noise epochs dataset seeds backend device"
    for name in [*names.split(), "out", "resume"]:
        assert f"--{name}" in said
