"""What may go wrong in the Trainer around FriendlySAMTrainer, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fsam_ext import FriendlySAM

from .reference import difference, train

pytest.importorskip("transformers")
from transformers import TrainerCallback

from fsam_ext.integrations.transformers import FriendlySAMTrainer

from .test_transformers import FSAM, Classifier, adamw, arguments, data, dataset, loss_of


@pytest.mark.parametrize("where", ("second pass", "before the step"))
def test_an_exception_leaves_the_weights_restored(where, tmp_path):
    class Fails(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if where == "before the step" and state.global_step == 2:
                raise ArithmeticError("on purpose")

    model = Classifier()
    trainer = FriendlySAMTrainer(model, arguments(tmp_path), train_dataset=dataset(), fsam=FSAM, callbacks=[Fails()])

    def fail(module, inputs):
        if where == "second pass" and trainer.state.global_step == 2 and trainer.optimizer.optimizer.is_perturbed:
            raise ArithmeticError("on purpose")

    model.net.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        trainer.train()
    other = Classifier()
    train(other, adamw(other, FSAM), data()[:2], loss=loss_of)
    assert difference(model, other) == 0


def test_what_is_refused(tmp_path):
    def refused(error, match, **options):
        model = Classifier()
        optimizers = options.pop("optimizers", lambda model: (None, None))(model)
        fsam = options.pop("fsam", FSAM)
        own = {name: options.pop(name, None) for name in ("data_collator", "optimizer_cls_and_kwargs")}
        with pytest.raises(error, match=match):
            FriendlySAMTrainer(
                model,
                arguments(tmp_path, **options),
                train_dataset=dataset(),
                optimizers=optimizers,
                fsam=fsam,
                **own,
            ).train()
        assert difference(model, Classifier()) == 0

    def plain(model):
        return torch.optim.SGD(model.parameters(), lr=0.1), None

    def ours(model):
        return FriendlySAM(model.parameters(), lr=0.1), None

    refused(TypeError, "optimizer must be a fsam_ext.FriendlySAM or SAM, not SGD", optimizers=plain, fsam=None)
    refused(ValueError, "fsam= and optimizers= were both given", optimizers=ours)
    of_a_model = (lambda: lambda model: None), {}
    refused(ValueError, "is made of a whole model", optimizer_cls_and_kwargs=of_a_model)
    schedule_free = type("ScheduleFree", (torch.optim.SGD,), {"train": lambda self: None}), {"lr": 0.1}
    refused(ValueError, "ScheduleFree moves the weights", optimizer_cls_and_kwargs=schedule_free)
    refused(ValueError, "rho", fsam={"rho": -1.0})
    refused(ValueError, "ascent_sync must be True with the Trainer", fsam={"ascent_sync": False})
    refused(TypeError, "a batch of type generator is used up", data_collator=lambda some: {"x": (row for row in some)})


def test_another_version_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("fsam_ext.integrations.versions.version", lambda package: "6.0.0")
    with pytest.raises(ImportError, match=r"tested with transformers 5\.24, and 6\.0\.0 may"):
        FriendlySAMTrainer(Classifier(), arguments(tmp_path))
