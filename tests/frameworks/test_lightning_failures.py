"""What may go wrong in Lightning around FriendlySAMCallback, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from fsam_ext import FriendlySAM

from .reference import SIZE, batches, difference, network, rows, train

pytest.importorskip("lightning.pytorch")
from lightning.pytorch.plugins import MixedPrecision

from fsam_ext.integrations.lightning import FriendlySAMCallback

from .test_lightning import OPTIONS, Module, by_hand, fit, loader, trainer


class Pops(Module):
    """Takes its batch apart."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch.pop("x"), batch.pop("y")), batch_idx)


def test_a_training_step_that_takes_its_batch_apart(tmp_path, record):
    module = Pops()
    data = DataLoader([{"x": x, "y": y} for x, y in rows()], batch_size=SIZE)
    trainer(tmp_path).fit(module, data)
    record("lightning", "a batch taken apart", difference(module.net, by_hand()[0]))


class Skips(Module):
    """Has no loss in some micro-batches."""

    def __init__(self, *skipped):
        super().__init__()
        self.skipped = skipped

    def training_step(self, batch, batch_idx):
        return None if batch_idx in self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("scaled", (False, True), ids=("", "fp16"))
def test_a_training_step_without_a_loss(scaled, tmp_path, record):
    """As Lightning does: such a micro-batch adds nothing, and with a GradScaler a window that ends with one is lost."""
    module = Skips(1, 2, 3, 5)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0))] if scaled else []
    made = fit(tmp_path, module, accumulate_grad_batches=2, plugins=plugins, max_epochs=1)
    assert not made.optimizers[0].is_perturbed
    model = network()
    optimizer = FriendlySAM(model.parameters(), **OPTIONS)
    data = [batches()[i] for i in ((6, 7) if scaled else (0, 4, 6, 7))]
    how = {"divide": lambda window: 2, "grad_scaler": torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None}
    how["autocast"] = torch.half if scaled else None
    for window in [data] if scaled else [data[:1], data[1:2], data[2:]]:
        train(model, optimizer, window, accumulate=2, **how)
    record("lightning", f"training_step returns None{', fp16' if scaled else ''}", difference(module.net, model))


@pytest.mark.parametrize("where", ("second pass", "before the step"))
def test_an_exception_leaves_the_weights_restored(where, tmp_path):
    class Fails(Module):
        def training_step(self, batch, batch_idx):
            if where == "second pass" and batch_idx == 2 and self.optimizers().is_perturbed:
                raise ArithmeticError("on purpose")
            return super().training_step(batch, batch_idx)

        def configure_gradient_clipping(self, *args, **kwargs):
            if self.trainer.global_step == 2:
                raise ArithmeticError("on purpose")

    module, made = Fails(), trainer(tmp_path)
    with pytest.raises(ArithmeticError):
        made.fit(module, loader())
    model = network()
    train(model, FriendlySAM(model.parameters(), **OPTIONS), batches()[:2])
    assert difference(module.net, model) == 0
    assert vars(module).keys().isdisjoint({"log", "log_dict"})
    retried = trainer(tmp_path, max_epochs=1)
    retried.fit(good := Module(), loader())
    assert difference(good.net, by_hand(epochs=1)[0]) == 0


def refused(tmp_path, module, error, match, data=None):
    before = [param.clone() for param in module.parameters()]
    with pytest.raises(error, match=match):
        trainer(tmp_path).fit(module, data or loader())
    assert all(map(torch.equal, before, module.parameters()))


def test_what_is_refused(tmp_path):
    class Plain(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Two(Module):
        def configure_optimizers(self):
            return [FriendlySAM(layer.parameters(), **OPTIONS) for layer in (self.net[0], self.net[4])]

    class Manual(Module):
        automatic_optimization = False

    class Draws(Module):
        def training_step(self, dataloader_iter):
            raise AssertionError

    refused(tmp_path, Plain(), TypeError, "optimizer must be a fsam_ext.FriendlySAM or SAM, not SGD")
    refused(tmp_path, Two(), RuntimeError, "multiple optimizers is only supported with manual")  # Lightning's own
    refused(tmp_path, Manual(), ValueError, "needs automatic_optimization=True")
    refused(tmp_path, Module(ascent_sync=False), ValueError, "ascent_sync must be True with Lightning")
    refused(tmp_path, Draws(), TypeError, r"training_step\(dataloader_iter\) draws its batches itself")
    used_up = DataLoader(rows(), batch_size=SIZE, collate_fn=lambda some: (row for row in some))
    refused(tmp_path, Module(), TypeError, "a batch of type generator is used up by the first pass", used_up)


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr("fsam_ext.integrations.versions.version", lambda package: "2.60.0")
    with pytest.raises(ImportError, match=r"tested with lightning 2\.6, and 2\.60\.0 may"):
        FriendlySAMCallback()
