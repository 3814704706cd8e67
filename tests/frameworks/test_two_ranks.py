"""DistributedDataParallel on two gloo processes, in Lightning and in Trainer, against one process with both shares."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader, DistributedSampler

from fsam_ext import FriendlySAM

from .reference import SIZE, batches, difference, network, rows, train

# The average of two losses is the loss of both shares, but for the order in which floating-point numbers are added.
LIMIT = 1e-7


def as_lightning_shares(count=8):
    """Rank r gets rows r, r + 2, ...: its k-th batch and the other's are 2 SIZE rows of the data."""
    data = rows(count)
    both = [data[first : first + 2 * SIZE] for first in range(0, len(data), 2 * SIZE)]
    return [(torch.stack([x for x, _ in some]), torch.stack([y for _, y in some])) for some in both]


@pytest.mark.parametrize("accumulate", (1, 3))
def test_lightning(accumulate, tmp_path, record):
    lightning = pytest.importorskip("lightning.pytorch")
    from fsam_ext.integrations.lightning import FriendlySAMCallback

    from .test_lightning import OPTIONS, Module

    class Shared(Module):
        def train_dataloader(self):
            sampler = DistributedSampler(rows(), 2, self.global_rank, shuffle=False)
            return DataLoader(rows(), batch_size=SIZE, sampler=sampler)

    module = Shared()
    strategy = lightning.strategies.DDPStrategy(process_group_backend="gloo", start_method="fork")
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        default_root_dir=tmp_path,
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FriendlySAMCallback()],
    )
    trainer.fit(module)
    model = network()
    optimizer = FriendlySAM(model.parameters(), **OPTIONS)
    train(model, optimizer, as_lightning_shares(), epochs=2, accumulate=accumulate)
    assert not torch.equal(module.net[0].weight, network()[0].weight)
    record("lightning", f"DDP on 2 ranks, accumulation {accumulate}", difference(module.net, model), LIMIT)


def _trainer_rank(rank, port, accumulate, folder):
    from fsam_ext.integrations.transformers import FriendlySAMTrainer

    from .test_transformers import FSAM, Classifier, arguments, dataset

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    model = Classifier()
    args = arguments(folder, gradient_accumulation_steps=accumulate, ddp_backend="gloo", logging_steps=100)
    assert args.world_size == 2
    FriendlySAMTrainer(model, args, train_dataset=dataset(), fsam=FSAM).train()
    torch.save(model.state_dict(), folder / f"{rank}.pt")


@pytest.mark.parametrize("accumulate", (1, 3))
def test_trainer(accumulate, tmp_path: Path, record):
    pytest.importorskip("transformers")
    from .test_transformers import FSAM, Classifier, adamw, loss_of

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start_processes(_trainer_rank, (port, accumulate, tmp_path), nprocs=2, start_method="fork")
    ours, other, model = Classifier(), Classifier(), Classifier()
    ours.load_state_dict(torch.load(tmp_path / "0.pt"))
    other.load_state_dict(torch.load(tmp_path / "1.pt"))
    assert difference(ours, other) == 0
    data = batches()
    both = [
        {"x": torch.cat([one[0], two[0]]), "labels": torch.cat([one[1], two[1]])}
        for one, two in zip(data[::2], data[1::2])
    ]
    train(model, adamw(model, FSAM), both, epochs=2, accumulate=accumulate, divide=len, loss=loss_of)
    record("transformers", f"DDP on 2 ranks, accumulation {accumulate}", difference(ours, model), LIMIT)
