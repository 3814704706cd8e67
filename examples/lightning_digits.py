"""F-SAM in Lightning by one callback, on scikit-learn's digits: no download, a few seconds.

pip install "fsam_ext[lightning]" scikit-learn
python examples/lightning_digits.py               the log is in runs/lightning_digits
"""

from __future__ import annotations

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from fsam_ext import FriendlySAM
from fsam_ext.integrations.lightning import FriendlySAMCallback


class Digits(LightningModule):
    """A small network; nothing in it knows of two passes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)
        )
        self.accuracy = MulticlassAccuracy(10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        loss = cross_entropy(self.net(images), digits)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, digits = batch
        self.accuracy(self.net(images), digits)
        self.log("accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> FriendlySAM:
        return FriendlySAM(self.parameters(), torch.optim.AdamW, rho=0.1, lr=3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(",")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--runs", default="runs", help="where the log goes")
    options = parser.parse_args()
    seed_everything(0)
    images, digits = load_digits(return_X_y=True)
    rows = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits))
    train, test = random_split(rows, [0.8, 0.2])
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="auto",
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        logger=CSVLogger(options.runs, "lightning_digits"),
        callbacks=[FriendlySAMCallback()],
    )
    trainer.fit(Digits(), DataLoader(train, 64, shuffle=True), DataLoader(test, 256))


if __name__ == "__main__":
    main()
