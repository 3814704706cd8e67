"""Killed with SIGKILL: what goes on from the last checkpoint gives the numbers of a run that nobody disturbed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ..conformance import identical
from .ranks import Group, run
from .test_fsdp import sharded
from .training import backward, batches, make, shard, vector

STEPS = 8
EVERY = 2  # steps from checkpoint to checkpoint
FATAL = 5  # the step, counted from 0, that the run does not survive


class Deadly(dcp.FileSystemWriter):
    """Writes this rank's data, and dies before the checkpoint is complete."""

    def write_data(self, plan, planner):
        super().write_data(plan, planner).wait()
        os.kill(os.getpid(), signal.SIGKILL)


def go_on(folder, base, moment=None, victims=()):
    """From the last complete checkpoint, if there is one, to the end, or to the moment at which the victims die."""
    folder = Path(folder)
    model = sharded()
    optimizer = make(model, base)
    done = max((int(path.parent.name) for path in folder.glob("*/.metadata")), default=0)
    if done:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        dcp.load(states, checkpoint_id=folder / str(done))
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    dies = dist.get_rank() in victims
    for step, batch in enumerate(batches(STEPS - done, first=done), start=done):
        backward(model, shard(batch))
        optimizer.first_step(zero_grad=True)
        if dies and moment == "between the steps" and step == FATAL:
            os.kill(os.getpid(), signal.SIGKILL)
        backward(model, shard(batch))
        optimizer.second_step(zero_grad=True)
        if (step + 1) % EVERY == 0:
            states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
            where = folder / str(step + 1)
            deadly = dies and moment == "in a save" and step == FATAL
            dcp.save(states, storage_writer=(Deadly if deadly else dcp.FileSystemWriter)(where))
    return done, vector(model.parameters())


@pytest.mark.parametrize("victims", [(1,), (0, 1)], ids=["one_rank", "both"])
@pytest.mark.parametrize("moment, base", [("between the steps", "sgd"), ("in a save", "adamw")])
def test_killed(base, moment, victims, tmp_path):
    undisturbed = run(2, go_on, str(tmp_path / "undisturbed"), base)
    folder = str(tmp_path / "killed")
    group = Group(2)
    with pytest.raises(AssertionError, match="the process ended"):
        group.run(go_on, (folder, base, moment, victims))
    assert not (Path(folder) / str(FATAL + 1) / ".metadata").exists()
    for (_, expected), (done, weights) in zip(undisturbed, run(2, go_on, folder, base)):
        assert done == FATAL - FATAL % EVERY
        assert identical(weights, expected)
