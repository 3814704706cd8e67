"""The demo on tiny settings and bundled data: verified data, honest noise, exact resume, its rows and files.

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


def test_held_out_examples_are_not_trained_on_and_have_true_labels():
    import data

    count = 1000
    clean = data.Split(torch.arange(count).float()[:, None], torch.arange(count) % data.CLASSES)
    trained, held_out = data.noisy_subset(clean, 400, 0.4, seed=7), data.held_out(clean, 400, seed=7)
    assert held_out.labels.equal(held_out.images[:, 0].long() % data.CLASSES)
    assert len({*trained.images[:, 0].tolist(), *held_out.images[:, 0].tolist()}) == 800
    with pytest.raises(data.Unavailable, match="too few of 1000"):
        data.held_out(clean, 501, seed=7)


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


def finished(method: str, accuracies: list[float], passes: float = 2.0, top: float = 2.0, **settings) -> list:
    """Made-up results, one for each seed."""
    from training import Result, Run

    shared = {"dataset": "digits", "base": "sgd", "lr": 0.05, "weight_decay": 5e-4, "epochs": 1, "noise": 0.4}
    return [
        (Run(method=method, seed=seed, **shared | settings), Result(value, [value], 1.0, top, passes, 3.0))
        for seed, value in enumerate(accuracies)
    ]


def test_paired_differences_and_standard_errors():
    import report

    runs = finished("sam", [0.5, 0.6, 0.7], rho=0.2) + finished("fsam", [0.51, 0.62, 0.73], rho=0.2)
    differences = report.paired_differences(runs + finished("fsam", [0.9], rho=0.4))
    (names,) = differences  # rho 0.4 has no SAM to be compared with
    assert names == "F-SAM rho 0.2 - SAM rho 0.2"
    assert differences[names] == pytest.approx([1, 2, 3])
    estimate = report.Estimate.of(differences[names])
    assert estimate == pytest.approx((2.0, 1 / 3**0.5))  # stdev 1, three seeds
    assert "F-SAM rho 0.2 - SAM rho 0.2  +2.00 ± 0.58" in report.table(runs)


def test_reuse_is_compared_with_all_ascents_and_with_none_reused():
    import report

    runs = finished("fsam", [0.6], rho=0.2)
    runs += finished("fsam", [0.5], 1.2, rho=0.2, every=5) + finished("fsam", [0.59], 1.2, rho=0.2, every=5, reuse=0.3)
    differences = report.paired_differences(runs)
    assert differences == {
        "F-SAM rho 0.2, every 5 - F-SAM rho 0.2": pytest.approx([-10]),
        "F-SAM rho 0.2, every 5, reuse 0.3 - F-SAM rho 0.2": pytest.approx([-1]),
        "F-SAM rho 0.2, every 5, reuse 0.3 - F-SAM rho 0.2, every 5": pytest.approx([9]),
    }


def test_the_rows_of_make_demo(tmp_path, capsys):
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


def test_the_convolutional_net_sees_each_batch_once_in_its_statistics(tmp_path):
    import fashion_mnist

    options = ["--dataset", "digits", "--arch", "cnn", "--method", "base", "sam", "fsam", "--noise", "0.2"]
    few = ["--every", "--longer", "--reuse", "5:0.3", "--backend", "reference", "--epochs", "1"]
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


# ---- pictures, several runs side by side, the search --------------------------------------------


def boxes_of_labels(axis) -> list:
    axis.figure.canvas.draw()
    labels = [label for label in axis.get_ticklabels(which="both") if label.get_text()]
    return sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)


@pytest.mark.parametrize("tops", [(1.9, 26.8), (0.7, 240.0), (16.0, 21.0), (1.0, 4.1), (0.01, 3000.0)])
def test_tick_labels_of_the_eigenvalues_do_not_overlap(tops):
    import pictures

    plt = pictures._pyplot()
    runs = [run for top in tops for run in finished("fsam", [0.5], top=top, rho=top)]
    figure, axes = plt.subplots(figsize=(3, 5))
    pictures._top_eigenvalues(axes, runs)
    boxes = boxes_of_labels(axes.xaxis)
    assert axes.get_xscale() == ("log" if tops[1] > 4 * tops[0] else "linear")
    assert 2 <= len(boxes) <= 8
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    plt.close(figure)


def test_accuracy_against_passes_shows_every_way_of_spending_them():
    import pictures

    plt = pictures._pyplot()
    runs = finished("base", [0.70, 0.72], 1.0) + finished("base", [0.71, 0.73], 2.0, longer=2)
    runs += finished("fsam", [0.84, 0.86], 2.0, rho=0.2)
    runs += finished("fsam", [0.80, 0.80], 1.2, rho=0.2, every=5)
    runs += finished("fsam", [0.83, 0.84], 1.2, rho=0.2, every=5, reuse=0.3)
    runs += finished("fsam", [0.10, 0.10], 2.0, rho=0.2, average="int8")  # as many passes: not a way of its own
    figure, axes = plt.subplots()
    pictures.accuracy_against_passes(axes, runs)
    lines = {}
    for container in axes.containers:
        line, _, (bars,) = container
        lines[container.get_label()] = line.get_xydata().tolist(), [b[1, 1] - b[0, 1] for b in bars.get_segments()]
    points = {name: sum(xy, []) for name, (xy, _) in lines.items()}
    assert points == {
        "SGD": pytest.approx([1, 71, 2, 72]),
        "F-SAM": pytest.approx([2, 85]),
        "F-SAM in every k-th step": pytest.approx([1.2, 80, 2, 85]),
        "the same, with reuse between": pytest.approx([1.2, 83.5, 2, 85]),
    }
    # Two standard errors long: of (83, 84) half a point each way, of (84, 86) one.
    assert lines["the same, with reuse between"][1] == pytest.approx([1, 2])
    plt.close(figure)


def test_regimes_side_by_side(tmp_path, capsys):
    import regimes
    import report

    for name, noise, rho in (("clean", 0.0, 0.1), ("noisy", 0.4, 0.2)):
        (tmp_path / name).mkdir()
        runs = finished("base", [0.5, 0.7], 1.0, noise=noise) + finished("fsam", [0.6, 0.9], rho=rho, noise=noise)
        if noise:
            runs += finished("fsam", [0.6, 0.8], 1.2, rho=rho, noise=noise, every=5, reuse=0.3)
        report.write_csv(runs, tmp_path / name)
    picture = tmp_path / "passes.svg"
    assert regimes.main([str(tmp_path / "clean"), str(tmp_path / "noisy"), "--picture", str(picture)]) == 0
    accuracy, difference, eigenvalue, _ = capsys.readouterr().out.split("\n\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in accuracy.splitlines()]
    assert cells[0] == [
        "test accuracy %",
        "passes a step",
        "clean labels, 2 seeds, rho 0.1",
        "40% wrong labels, 2 seeds, rho 0.2",
    ]
    assert cells[2:] == [
        ["SGD", "1.00", "60.00 ± 10.00", "60.00 ± 10.00"],
        ["F-SAM", "2.00", "75.00 ± 15.00", "75.00 ± 15.00"],
        ["F-SAM, every 5, reuse 0.3", "1.20", "", "70.00 ± 10.00"],
    ]
    assert "-15.00 ± 5.00" in difference and "-5.00 ± 5.00" in difference
    assert "2.00 ± 0.00" in eigenvalue
    assert "40% wrong labels" in picture.read_text()
    with pytest.raises(SystemExit):
        regimes.main([str(tmp_path)])
    assert f"{tmp_path} is no folder of a run of the demo" in capsys.readouterr().err


def test_the_search_asks_every_method_the_same(monkeypatch, capsys):
    import search
    import training

    runs = search.runs("digits", "mlp", 0.4, 1, ["base", "sam", "fsam"])
    asked = {}
    for run in runs:
        asked.setdefault((run.method, run.rho), []).append((run.lr, run.weight_decay))
    assert len({tuple(pairs) for pairs in asked.values()}) == 1
    assert {rho for method, rho in asked if method == "sam"} == {rho for method, rho in asked if method == "fsam"}

    for module in (search, training):
        monkeypatch.setattr(module, "TRAIN_SIZE", 300)
    assert search.main(["--dataset", "digits", "--arch", "cnn", "--method", "base", "--epochs", "1"]) == 0
    *rows, best = capsys.readouterr().out.splitlines()[1:]
    accuracies = [float(row.split()[-1]) for row in rows]
    assert len(rows) == len(search.LEARNING_RATES) * len(search.WEIGHT_DECAYS)
    assert best.startswith("best for base: lr ") and best.endswith(f"({max(accuracies):.2f} %)")

    monkeypatch.setattr(search, "TRAIN_SIZE", 1000)
    with pytest.raises(SystemExit):
        search.main(["--dataset", "digits"])
    assert "1000 examples to train on leave too few" in capsys.readouterr().err
