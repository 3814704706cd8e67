"""Started as users start it: torchrun, a script, and nothing of this suite in the processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from fsam_ext import FriendlySAM, clip_grad_norm_

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
generator = torch.Generator().manual_seed(0)
x, y = (torch.randn(12, n, generator=generator, dtype=torch.float64) for n in (6, 1))

def weights(parallel, rows):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    model = parallel(model)
    optimizer = FriendlySAM(model.parameters(), torch.optim.SGD, rho=0.2, lr=0.05, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x[rows]) - y[rows]).square().mean().backward()
        with optimizer.perturbed():
            (model(x[rows]) - y[rows]).square().mean().backward()
        assert clip_grad_norm_(model.parameters(), 0.3) > 0.3
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])

alone = weights(lambda model: model, slice(None))
for parallel in (DistributedDataParallel, fully_shard):
    found = weights(parallel, slice(rank * 12 // world, (rank + 1) * 12 // world))
    assert (found - alone).abs().max() < 1e-13, parallel
if rank == 0:
    print("equal on", world, "ranks", flush=True)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # torch's own threads may abort a process that ends while they do: "terminate called", one run in eight
"""


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.large)])
def test_torchrun(ranks, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(script)]
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"equal on {ranks} ranks" in done.stdout
