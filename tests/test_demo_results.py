"""What the demo makes of its runs: paired differences, pictures, regimes side by side; and the search of settings."""

from __future__ import annotations

from pathlib import Path

import pytest

for extra in ("numpy", "matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(extra, reason="the demo's extras are not installed: pip install .[demo]")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


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


def test_methods_with_a_rho_of_their_own_are_compared_and_share_rows_and_lines(tmp_path, capsys):
    import pictures
    import regimes
    import report

    runs = finished("sam", [0.5, 0.6], rho=0.2, lr=0.01) + finished("fsam", [0.51, 0.63], rho=0.1)
    assert report.paired_differences(runs) == {"F-SAM rho 0.1 - SAM rho 0.2": pytest.approx([1, 3])}
    report.write_csv(runs, tmp_path)
    assert regimes.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "| SAM " in said and "| F-SAM " in said and " rho 0" not in said
    assert "0.01, 0.0005, 0.2" in said and "0.05, 0.0005, 0.1" in said
    plt = pictures._pyplot()
    figure, axes = plt.subplots()
    pictures.accuracy_against_passes(axes, runs)
    assert [container.get_label() for container in axes.containers] == ["SAM", "F-SAM"]
    plt.close(figure)


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
        "F-SAM in every k-th step (k at the point)": pytest.approx([1.2, 80, 2, 85]),
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
        runs += finished("base", [0.5, 0.7, 0.1], 1.0, noise=noise)[2:]  # a third seed that was interrupted
        if noise:
            runs += finished("fsam", [0.6, 0.8], 1.2, rho=rho, noise=noise, every=5, reuse=0.3)
        report.write_csv(runs, tmp_path / name)
    picture = tmp_path / "passes.svg"
    assert regimes.main([str(tmp_path / "clean"), str(tmp_path / "noisy"), "--picture", str(picture)]) == 0
    accuracy, difference, eigenvalue, settings, _ = capsys.readouterr().out.split("\n\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in accuracy.splitlines()]
    assert cells[0] == [
        "test accuracy %",
        "passes a step",
        "clean labels, 2 seeds",
        "40% wrong labels, 2 seeds",
    ]
    assert cells[2:] == [
        ["SGD", "1.00", "60.00 ± 10.00", "60.00 ± 10.00"],
        ["F-SAM", "2.00", "75.00 ± 15.00", "75.00 ± 15.00"],
        ["F-SAM, every 5, reuse 0.3", "1.20", "", "70.00 ± 10.00"],
    ]
    assert "-15.00 ± 5.00" in difference and "-5.00 ± 5.00" in difference
    assert "2.00 ± 0.00" in eigenvalue
    # What has nothing to say has no line: F-SAM beside itself, and the settings of what differs by a change only.
    assert [line.strip("| ").split("  ")[0] for line in difference.splitlines()[2:]] == [
        "SGD",
        "F-SAM, every 5, reuse 0.3",
    ]
    assert "| F-SAM " in settings and "reuse" not in settings
    assert settings.split("0.05, 0.0005, 0.1 |")[1].split() == ["0.05,", "0.0005,", "0.2", "|"]
    drawn = picture.read_bytes()
    assert b"40% wrong labels" in drawn
    regimes.main([str(tmp_path / "clean"), str(tmp_path / "noisy"), "--picture", str(picture)])
    assert picture.read_bytes() == drawn  # a page's picture changes only where its figures do
    capsys.readouterr()
    with pytest.raises(SystemExit):
        regimes.main([str(tmp_path)])
    assert f"{tmp_path} is no folder of a run of the demo" in capsys.readouterr().err
    report.write_csv(finished("base", [0.5]) + finished("fsam", [0.1, 0.6], rho=0.2)[1:], tmp_path)
    with pytest.raises(SystemExit):
        regimes.main([str(tmp_path)])
    assert f"{tmp_path} has no seed with every row" in capsys.readouterr().err


def planned(*options: str) -> dict[str, tuple[float, float, float | None]]:
    """What the runs of a command would train with."""
    import fashion_mnist

    few = ["--every", "--reuse", "--longer"]
    runs = fashion_mnist.plan(fashion_mnist.build_parser().parse_args([*few, *options]), "digits")
    return {run.method: (run.lr, run.weight_decay, run.rho) for run in runs}


def test_settings_are_those_found_for_the_net_and_the_nearest_noise():
    from settings import FOUND

    for (arch, noise), found in FOUND.items():
        expected = {"base": (0.05, 5e-4, None), **{method: tuple(setting) for method, setting in found.items()}}
        if expected["tuned"] == expected["base"]:  # where nothing is better, there is no second row of the same
            del expected["tuned"]
        assert planned("--arch", arch, "--noise", str(noise)) == expected
        assert planned("--arch", arch, "--noise", str(noise + 0.05)) == expected
    assert planned("--noise", "0", "--method", "tuned") == {"tuned": (0.05, 5e-4, None)}
    asked = planned("--noise", "0.2", "--lr", "0.3", "--weight-decay", "0", "--tuned", "0.4", "1e-5", "--rho", "0.7")
    assert asked == {"base": (0.3, 0, None), "tuned": (0.4, 1e-5, None), "sam": (0.3, 0, 0.7), "fsam": (0.3, 0, 0.7)}
    rho = FOUND["cnn", 0.2]["fsam"].rho
    assert planned("--arch", "cnn", "--noise", "0.2", "--base", "adamw")["fsam"] == (1e-3, 5e-2, rho)


def test_the_search_asks_every_method_the_same(monkeypatch, capsys):
    import search
    import training

    runs = search.plan(search.build_parser().parse_args([]), "digits")
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

    # What is asked in part is part of the same search.
    again = ["--arch", "cnn", "--method", "base", "--epochs", "1", "--lr", "0.05", "--weight-decay", "5e-3"]
    assert search.main(["--dataset", "digits", *again]) == 0
    assert capsys.readouterr().out.splitlines()[1] in rows
    with pytest.raises(SystemExit):
        search.main(["--dataset", "digits", "--rho", "-1"])
    assert "rho must be" in capsys.readouterr().err.splitlines()[-1]

    monkeypatch.setattr(search, "TRAIN_SIZE", 1000)
    with pytest.raises(SystemExit):
        search.main(["--dataset", "digits"])
    assert "1000 examples to train on leave too few" in capsys.readouterr().err
