"""State and time of a step by parameters and ranks: predicted from the formulas of docs/scaling.md, and measured.

python bench/scaling.py                         # 1, 2 and 4 processes over gloo; prints the two tables
python bench/scaling.py --write docs/scaling.md # and puts them between the page's markers
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.fsdp import fully_shard

# This checkout's package, wherever the command is called from and whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.measure import HostClock, Triad, quantiles
from bench.plots import put_between_markers
from bench.rows import stamp
from fsam_ext import FriendlySAM
from fsam_ext.state.flat_state import ALIGNMENT_BYTES

LAYERS = 24
WIDTHS = (256, 512, 1024)
TINY = 8  # a width at which only the fixed cost is left


@dataclass(frozen=True)
class Base:
    """A base optimizer in float32: the bytes of its state, and those that a step moves, for each parameter."""

    cls: type[torch.optim.Optimizer]
    kwargs: dict[str, Any]
    state: int
    moved: int
    counts_steps: bool


BASES = {
    "sgd": Base(torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}, 4, 52, False),
    "adamw": Base(torch.optim.AdamW, {"lr": 1e-3}, 8, 60, True),
}
OURS = 4 + 4  # average and backup


def shapes(width: int) -> list[tuple[int, ...]]:
    return [(width, width), (width,)] * LAYERS


def predicted_bytes(width: int, ranks: int, base: Base) -> int:
    """State of the rank that holds most: rank 0, which gets the larger part of a dimension that does not divide."""
    unit = ALIGNMENT_BYTES // 4
    total = 0
    for rows, *rest in shapes(width):
        numel = -(-rows // ranks)
        for size in rest:
            numel *= size
        total += -(-numel // unit) * unit * (OURS + base.state) + (4 if base.counts_steps else 0)
    return total


def parameters(width: int) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes(width))


# ---- On a rank -------------------------------------------------------------------------------------------------------


def optimizer_of(width: int, base: Base) -> FriendlySAM:
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = FriendlySAM(model.parameters(), base.cls, **base.kwargs)
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e-3)
    return optimizer


def slowest(seconds: float) -> float:
    """Over all ranks: a step is done when the last one is."""
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def rounds_of(calls: list[Any], rounds: int) -> list[list[float]]:
    """Seconds of the slowest rank for each call, round by round: measure.py, NOTE [alternate, then compare pairs]."""
    clock = HostClock()
    samples = []
    for _ in range(rounds + 3):
        samples.append([])
        for call in calls:
            dist.barrier()
            samples[-1].append(slowest(clock.seconds(call)))
    return samples[3:]


def step_of(optimizer: FriendlySAM) -> Any:
    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


def on_rank(rank: int, ranks: int, rounds: int, store: str, answer: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    results: dict[str, Any] = {}
    for name, base in BASES.items():
        tiny = step_of(optimizer_of(TINY, base))
        fixed = quantiles([seconds for (seconds,) in rounds_of([tiny], 20 * rounds)]).median
        results[f"fixed {name}"] = fixed
        for width in WIDTHS:
            optimizer = optimizer_of(width, base)
            optimizer.first_step()
            optimizer.second_step()
            nbytes = sum(
                flat.buffer(name).nbytes for flat in optimizer._passes.layout.flats.values() for name in flat.names
            )
            share = parameters(width) / ranks
            # The bus, under the same conditions: all ranks at once, over as many bytes as the step touches.
            triad = Triad((int(2 * 4 * share) + nbytes) // 3, torch.device("cpu"))
            samples = rounds_of([step_of(optimizer), triad], rounds)
            expected = [fixed + share * base.moved * bus / triad.bytes for _, bus in samples]
            results[f"{width} {name}"] = {
                "bytes": nbytes,
                "seconds": quantiles([step for step, _ in samples]).median,
                "expected": quantiles(expected).median,
                "ratio": quantiles([step / model for (step, _), model in zip(samples, expected)]).median,
                "bus": triad.bytes / quantiles([bus for _, bus in samples]).median,
            }
            del optimizer, triad
    if rank == 0:
        Path(answer).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


# ---- The tables ------------------------------------------------------------------------------------------------------


def measure(ranks: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        store, answer = os.path.join(folder, "store"), os.path.join(folder, "answer")
        torch.multiprocessing.spawn(on_rank, (ranks, rounds, store, answer), nprocs=ranks)
        return json.loads(Path(answer).read_text())


def tables(rank_counts: list[int], rounds: int) -> str:
    lines = [
        "| base | parameters | ranks | state per rank, predicted | measured | step, predicted | measured | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    constants = ["| ranks | fixed cost, SGD | fixed cost, AdamW | bus per rank |", "|---:|---:|---:|---:|"]
    rows: dict[tuple[str, int, int], str] = {}
    for ranks in rank_counts:
        found = measure(ranks, rounds)
        cells = {(name, width): found[f"{width} {name}"] for name in BASES for width in WIDTHS}
        bus = [cell["bus"] / 1e9 for cell in cells.values()]
        fixed = [found[f"fixed {name}"] * 1e3 for name in BASES]
        constants.append(f"| {ranks} | {fixed[0]:.2f} ms | {fixed[1]:.2f} ms | {min(bus):.1f} to {max(bus):.1f} GB/s |")
        for (name, width), cell in cells.items():
            state = predicted_bytes(width, ranks, BASES[name]) / 1e6, cell["bytes"] / 1e6
            step = cell["expected"] * 1e3, cell["seconds"] * 1e3
            rows[name, width, ranks] = (
                f"| {name} | {parameters(width) / 1e6:.1f}M | {ranks} | {state[0]:.3f} MB | {state[1]:.3f} MB "
                f"| {step[0]:.2f} ms | {step[1]:.2f} ms | {cell['ratio']:.2f} |"
            )
    order = sorted(rows, key=lambda key: (list(BASES).index(key[0]), key[1], key[2]))
    where = stamp(torch.device("cpu"))
    note = f"{where['machine']}; one thread a rank; {where['versions']}; {where['commit']}, {where['date']}."
    return "\n".join([*constants, "", *lines, *(rows[key] for key in order), "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=15, help="steps of each size; the median counts")
    parser.add_argument("--write", type=Path, help="a page with the markers scaling:begin and scaling:end")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    text = tables(arguments.ranks, arguments.rounds) + f" Load of the machine before: {load:.1f}."
    print(text)
    if arguments.write is not None:
        arguments.write.write_text(put_between_markers(arguments.write.read_text(), "scaling", text))


if __name__ == "__main__":
    main()
