"""What language models do: their loss and its measures, forks from a trunk, and stretches that resume bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

for extra in ("numpy", "matplotlib", "tqdm"):
    pytest.importorskip(extra, reason="the demo's extras are not installed: pip install .[demo]")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("FSAM_DATA", str(tmp_path / "cache"))


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
