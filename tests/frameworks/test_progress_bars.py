"""The frameworks' progress bars count batches and steps, not passes."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("accumulate", (1, 2))
def test_lightning(accumulate, tmp_path):
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import TQDMProgressBar

    from .test_lightning import Module, fit

    class Bar(TQDMProgressBar):
        seen: list[tuple[int, int, float]] = []

        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            bar = self.train_progress_bar
            self.seen.append((bar.n, bar.total, trainer.global_step))

    Bar.seen = []
    fit(tmp_path, Module(), Bar(), accumulate_grad_batches=accumulate, enable_progress_bar=True)
    assert Bar.seen == [(8, 8, 8 // accumulate), (8, 8, 16 // accumulate)]


@pytest.mark.parametrize("accumulate", (1, 2))
def test_trainer(accumulate, tmp_path):
    pytest.importorskip("transformers")
    from transformers import ProgressCallback

    from fsam_ext.integrations.transformers import FriendlySAMTrainer

    from .test_transformers import FSAM, Classifier, arguments, dataset

    class Bar(ProgressCallback):
        seen: list[tuple[int, int]] = []

        def on_epoch_end(self, *args, **kwargs):
            self.seen.append((self.training_bar.n, self.training_bar.total))

    Bar.seen = []
    args = arguments(tmp_path, gradient_accumulation_steps=accumulate)
    FriendlySAMTrainer(Classifier(), args, train_dataset=dataset(), fsam=FSAM, callbacks=[Bar()]).train()
    assert Bar.seen == [(8 // accumulate, 16 // accumulate), (16 // accumulate, 16 // accumulate)]
