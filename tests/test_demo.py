"""The demo on tiny settings and bundled data: verified data, honest noise, exact resume, its files.

No test here touches the network, and none reads the folder where a user keeps Fashion-MNIST.
"""

from __future__ import annotations

import csv
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
for extra in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(extra, reason="the demo's extras are not installed: pip install .[demo]")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPT = EXAMPLES / "fashion_mnist.py"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(autouse=True)
def one_thread():
    """These matrices are too small to share; threads waiting for each other waste a busy core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--dataset", "digits", "--out", str(out), *options]


def environment() -> dict[str, str]:
    """The demo's process imports from where the tests do, and has one thread as they have."""
    path = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def demo(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *options), env=environment(), capture_output=True, text=True, timeout=300)


# ---- data -------------------------------------------------------------------------------------


@pytest.fixture
def four_files(monkeypatch):
    """Tiny IDX files that pass for Fashion-MNIST; no source but the cache is asked."""
    import data

    files = {}
    for name in data.SHA256:
        rank, count = (3, 30) if "images" in name else (1, 30)
        shape = np.array([count, 4, 4][:rank], ">i4").tobytes()
        body = bytes(i % 10 for i in range(count * (16 if rank == 3 else 1)))
        files[name] = bytes([0, 0, 8, rank]) + shape + body
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(data, "SHA256", sums)
    sources = data._sources
    monkeypatch.setattr(data, "_sources", lambda *a: [next(iter(sources(*a)))])
    return files


def write(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_verified_files_are_taken(four_files, tmp_path):
    import data

    write(four_files, tmp_path)
    assert data.fashion_mnist_files(tmp_path, say=lambda _: None) == four_files


def test_wrong_sha256_is_refused_and_named(four_files, tmp_path):
    import data

    write(four_files, tmp_path)
    name = "t10k-labels-idx1-ubyte"
    tampered = four_files[name][:-1] + b"\x07"
    (tmp_path / name).write_bytes(tampered)
    with pytest.raises(data.Unavailable) as refused:
        data.fashion_mnist_files(tmp_path, say=lambda _: None)
    for part in (name, "refused", hashlib.sha256(tampered).hexdigest(), data.SHA256[name]):
        assert part in str(refused.value)


def test_the_next_source_is_asked_and_its_files_are_kept(four_files, tmp_path, monkeypatch):
    import data

    bad = {name: content + b"!" for name, content in four_files.items()}
    cache = tmp_path / "cache"
    roads = [("the first", bad.__getitem__), ("the second", four_files.__getitem__)]
    monkeypatch.setattr(data, "_sources", lambda *a: roads)
    said = []
    assert data.fashion_mnist_files(cache, said.append) == four_files
    refusal, taken = said
    assert "from the first refused" in refusal
    assert taken == "Fashion-MNIST from the second, sha256 verified"
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == four_files


def test_fallback_on_digits_is_said_aloud(monkeypatch):
    import data

    monkeypatch.setattr(data, "_sources", lambda *a: [])
    said = []
    assert data.load("auto", said.append).name == "digits"
    assert "NOT those of Fashion-MNIST" in "".join(said)
    with pytest.raises(data.Unavailable):
        data.load("fashion-mnist", said.append)


def test_truncated_download_is_refused():
    import gzip

    import data

    with pytest.raises(data.Unavailable, match="not a whole gzip file"):
        data._decompress(gzip.compress(bytes(1000))[:-9], "somewhere")


def test_idx_arrays_have_their_shape(four_files):
    import data

    images = data.read_idx(four_files["train-images-idx3-ubyte"])
    assert images.shape == (30, 4, 4) and images.dtype == np.uint8
    assert images.reshape(-1)[:12].tolist() == [*range(10), 0, 1]
    with pytest.raises(ValueError, match="not an IDX file"):
        data.read_idx(b"\x1f\x8b\x08\x00")


def test_label_noise_is_symmetric_exact_and_reproducible():
    import data

    count = 40_000
    clean = data.Split(torch.arange(count).float()[:, None], torch.arange(count) % data.CLASSES)
    noisy = data.noisy_subset(clean, count, 0.4, seed=3)
    truth = noisy.images[:, 0].long() % data.CLASSES  # an image is its own index here
    assert noisy.images[:, 0].sort().values.equal(clean.images[:, 0])
    assert int((noisy.labels != truth).sum()) == 16_000

    # Symmetric: of 16,000 wrong labels each of the 90 (true, wrong) pairs has a 90th. With 89
    # degrees of freedom chi squared passes 150 for one seed in 17,000, and this seed is fixed.
    wrong = noisy.labels != truth
    pairs = torch.bincount(truth[wrong] * 10 + noisy.labels[wrong], minlength=100).view(10, 10)
    assert pairs.diagonal().sum() == 0
    expected = 16_000 / 90
    off_diagonal = pairs[~torch.eye(10, dtype=torch.bool)].double()
    assert ((off_diagonal - expected) ** 2 / expected).sum() < 150

    again, other = (data.noisy_subset(clean, count, 0.4, seed=seed) for seed in (3, 4))
    assert again.images.equal(noisy.images) and again.labels.equal(noisy.labels)
    assert not other.labels.equal(noisy.labels)
    assert data.noisy_subset(clean, 100, 0.0, seed=3).labels.shape == (100,)


# ---- sharpness --------------------------------------------------------------------------------


def exact_hessian(loss, params: list[torch.Tensor]) -> torch.Tensor:
    gradient = torch.autograd.grad(loss(), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(g, params, retain_graph=True) for g in flat]
    return torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])


def test_power_iteration_finds_the_top_of_the_exact_spectrum():
    from sharpness import top_hessian_eigenvalue

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
    inputs, labels = torch.randn(40, 5, dtype=torch.double), torch.randint(3, (40,))
    params = list(model.parameters())

    def loss():
        return torch.nn.functional.cross_entropy(model(inputs), labels)

    top = torch.linalg.eigvalsh(exact_hessian(loss, params))[-1].item()
    # The estimate's error is of the order of its last change times (ratio of the two largest
    # eigenvalues squared) / (1 - that), so 1e-10 of change is ample for 1e-6 of error.
    found = top_hessian_eigenvalue(loss, params, tolerance=1e-10, max_iterations=5000)
    assert found == pytest.approx(top, rel=1e-6)
    assert all(p.grad is None for p in params)


def test_power_iteration_is_not_fooled_by_a_large_negative_eigenvalue():
    from sharpness import top_hessian_eigenvalue

    w = torch.tensor([0.3, -0.2, 0.5], dtype=torch.double, requires_grad=True)
    curvature = torch.tensor([-9.0, 2.0, 4.0], dtype=torch.double)
    found = top_hessian_eigenvalue(lambda: (curvature * w * w).sum() / 2, [w], tolerance=1e-12, max_iterations=1000)
    assert found == pytest.approx(4.0, rel=1e-6)


def test_power_iteration_of_a_loss_that_is_not_finite_is_nan():
    from sharpness import top_hessian_eigenvalue

    w = torch.tensor([float("inf"), 1.0], requires_grad=True)
    assert torch.tensor(top_hessian_eigenvalue(lambda: (w**4).sum(), [w])).isnan()


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

    options = ("--method", "fsam", "--rho", "0.05", "--epochs", "60")
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
    assert 0 < half["epoch"] < 60 and half["top_eigenvalue"] is None

    resumed = demo(cut, "--resume")  # with the options that it was started with
    assert resumed.returncode == 0, resumed.stderr
    assert fashion_mnist.main(["--dataset", "digits", "--out", str(whole), *options]) == 0
    assert_same_bits(load(checkpoint), load(whole / "checkpoints" / name))


@pytest.mark.parametrize("method", ["base", "sam", "fsam"])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("at", ["first pass", "second pass", "last step of an epoch"])
def test_interrupt_inside_a_step_resumes_bit_for_bit(method, base, at, tmp_path, monkeypatch):
    """The signal comes from inside the forward of a chosen pass: the worst moment, every time."""
    import data
    import training

    monkeypatch.setattr(training, "TRAIN_SIZE", 300)
    rho = None if method == "base" else 0.1
    fsam = {"sigma": 1.0, "lmbda": 0.9} if method == "fsam" else {}
    run = training.Run("digits", method, 0, base, 0.01, 5e-4, 3, 0.4, rho, **fsam)
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


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    import dataclasses

    import data
    import training

    run = training.Run("digits", "base", 0, "sgd", 0.05, 5e-4, 3, 0.4)
    digits = data.load("digits")
    training.Trainer(run, digits).save(tmp_path / "run.pt")
    other = training.Trainer(dataclasses.replace(run, lr=0.1), digits)
    with pytest.raises(training.OtherSettings, match=r"lr=0\.05.*lr=0\.1"):
        other.load(tmp_path / "run.pt")


# ---- the command ------------------------------------------------------------------------------


def test_table_csv_and_picture_of_a_tiny_run(tmp_path, capsys):
    import fashion_mnist

    options = ["--dataset", "digits", "--out", str(tmp_path)]
    assert fashion_mnist.main([*options, "--epochs", "2", "--seeds", "2", "--rho", "0.05"]) == 0
    said = capsys.readouterr().out
    for text in ("SGD tuned", "F-SAM rho 0.05", "F-SAM rho 0.05 - SAM rho 0.05, paired by seed", "±"):
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
    picture = tmp_path / "results.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert str(picture) in said

    # A finished run resumes to the same table without training again, and grows by a seed.
    assert fashion_mnist.main([*options, "--resume", "--seeds", "3"]) == 0
    with (tmp_path / "results.csv").open() as file:
        grown = list(csv.DictReader(file))
    assert grown[: len(rows)] == rows and len(grown) == 12


def test_paired_differences_and_standard_errors():
    import report
    from training import Result, Run

    def finished(method: str, rho: float, accuracies: list[float]) -> report.Finished:
        return [
            (
                Run("digits", method, seed, "sgd", 0.05, 5e-4, 1, 0.4, rho),
                Result(accuracy, [accuracy], 1.0, 2.0, 2.0, 3.0),
            )
            for seed, accuracy in enumerate(accuracies)
        ]

    runs = finished("sam", 0.2, [0.5, 0.6, 0.7]) + finished("fsam", 0.2, [0.51, 0.62, 0.73])
    differences = report.paired_differences(runs + finished("fsam", 0.4, [0.9]))
    (names,) = differences  # rho 0.4 has no SAM to be compared with
    assert names == "F-SAM rho 0.2 - SAM rho 0.2"
    assert differences[names] == pytest.approx([1, 2, 3])
    estimate = report.Estimate.of(differences[names])
    assert estimate == pytest.approx((2.0, 1 / 3**0.5))  # stdev 1, three seeds
    assert "+2.00 ± 0.58 points" in report.table(runs)


def test_schedules_and_averages_are_runs_of_their_own(tmp_path, capsys):
    import fashion_mnist

    options = ["--dataset", "digits", "--method", "fsam", "--rho", "0.05", "--epochs", "2", "--out", str(tmp_path)]
    changes = ["--every", "1", "2", "5", "--last", "0.3", "--average", "bfloat16", "int8"]
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
        assert f"F-SAM rho 0.05{name} - F-SAM rho 0.05, paired by seed" in said
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
    names = "method rho sigma lmbda every last average base lr weight-decay epochs seeds noise dataset backend device"
    for name in [*names.split(), "out", "resume"]:
        assert f"--{name}" in said
