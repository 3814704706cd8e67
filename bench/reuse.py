"""Steps with reuse, an ascending one and one between two ascents: here, in foreach, and tensor by tensor.

python bench/reuse.py                            # prints the table
python bench/reuse.py --write docs/benchmarks.md # and puts it between the page's markers
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# This checkout's package, wherever the command is called from and whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.clocks import clock_for
from bench.measure import Sample, Triad, alternate, paired_ratios, quantiles, values
from bench.peers import BASES, EPS, LMBDA, RHO, Base, Foreach, Official
from bench.plots import put_between_markers
from bench.providers import running_backends
from bench.rows import stamp
from bench.workloads import WORKLOADS
from fsam_ext import FriendlySAM

REUSE = 0.3
WORKS = ("gpt2", "resnet18", "tensors_1000")
KINDS = ("ascending", "between")
# What a step must move for each float32 parameter, each value once: docs/design.md, "Reuse".
BYTES = {
    "sgd": {"ascending": 52 + 4 + 8 + 12, "between": 12 + 16 + 8},
    "adamw": {"ascending": 60 + 4 + 8 + 12, "between": 12 + 20 + 12},
}


# ---- The same steps, written in three ways ---------------------------------------------------------------------------


class Fused:
    """This package; every second step ascends."""

    name = "fsam_ext"
    spares = dict.fromkeys(KINDS, 0)  # bytes a parameter of those in BYTES

    def __init__(self, params: list[nn.Parameter], base: Base, **options: Any) -> None:
        self.optimizer = FriendlySAM(
            *(params, base.optimizer),
            **{"rho": RHO, "lmbda": LMBDA, "every": 2, "reuse": REUSE, **options, **dict(base.options)},
        )

    def ascend(self) -> None:
        self.optimizer.first_step()

    def descend(self) -> None:
        self.optimizer.second_step()

    def between(self) -> None:
        self.optimizer.step()

    def bytes_of_v(self) -> int:
        """Of what is kept for reuse alone."""
        return sum(entry["fsam_reuse"].nbytes for entry in self.optimizer.state.values())


class FusedBfloat16(Fused):
    """The same with two bytes for what is kept."""

    name = "fsam_ext, reuse_dtype=bfloat16"
    spares = {"ascending": 8, "between": 2}

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        super().__init__(params, base, reuse_dtype=torch.bfloat16)


class Horizontal(Foreach):
    """Foreach operations and the fused base."""

    name = "foreach"

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        super().__init__(params, base)
        self.kept = [torch.empty_like(p) for p in params]

    @staticmethod
    def _norm(tensors: list[Tensor]) -> Tensor:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))

    @torch.no_grad()
    def ascend(self) -> None:
        torch._foreach_copy_(self.kept, [p.grad for p in self.params])
        super().ascend()

    @torch.no_grad()
    def descend(self) -> None:
        grads = [p.grad for p in self.params]
        dot = torch.stack([torch.dot(g.view(-1), k.view(-1)) for g, k in zip(grads, self.kept)]).sum()
        torch._foreach_mul_(self.kept, -dot / self._norm(self.kept) ** 2)
        torch._foreach_add_(self.kept, grads)
        self.v_norm = self._norm(self.kept)
        super().descend()

    @torch.no_grad()
    def between(self) -> None:
        grads = [p.grad for p in self.params]
        torch._foreach_lerp_(self.average, grads, 1 - LMBDA)
        scaled = torch._foreach_mul(self.kept, REUSE * self._norm(grads) / (self.v_norm + EPS))
        torch._foreach_add_(grads, scaled)
        self.base.step()


class TensorByTensor(Official):
    """The official sequence, and LookSAM in the same manner."""

    name = "tensor by tensor"

    def __init__(self, params: list[nn.Parameter], base: Base) -> None:
        super().__init__(params, base)
        self.kept: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def ascend(self) -> None:
        for p in self.params:
            self.kept[p] = p.grad.clone()
        super().ascend()

    @torch.no_grad()
    def descend(self) -> None:
        dot = torch.stack([(p.grad * self.kept[p]).sum() for p in self.params]).sum()
        part = dot / torch.stack([self.kept[p].norm(p=2) for p in self.params]).norm(p=2) ** 2
        for p in self.params:
            self.kept[p] = p.grad - part * self.kept[p]
        self.v_norm = torch.stack([self.kept[p].norm(p=2) for p in self.params]).norm(p=2)
        super().descend()

    @torch.no_grad()
    def between(self) -> None:
        norm = torch.stack([p.grad.norm(p=2) for p in self.params]).norm(p=2)
        length = REUSE * norm / (self.v_norm + EPS)
        for p in self.params:
            self.average[p] = self.average[p] * LMBDA + p.grad * (1 - LMBDA)
            p.grad += length * self.kept[p]
        self.base.step()


WAYS = (Fused, FusedBfloat16, Horizontal, TensorByTensor)


# ---- Measuring -------------------------------------------------------------------------------------------------------


class Runner:
    """One way on its own copy of a workload, whose gradients are renewed outside the measured time."""

    def __init__(self, way: Any, work: str, base: str, device: torch.device) -> None:
        self.params = WORKLOADS[work].parameters(torch.float32, device)
        self._gradients = WORKLOADS[work].gradients(torch.float32, device)
        for param, gradient in zip(self.params, self._gradients, strict=True):
            param.grad = gradient.clone()
        self.way = way(self.params, BASES[base])
        self._clock = clock_for(device, flush=True)

    def _seconds(self, call: Any) -> float:
        torch._foreach_copy_([p.grad for p in self.params], self._gradients)
        return self._clock.seconds(call)

    def __call__(self) -> Sample:
        ascending = self._seconds(self.way.ascend) + self._seconds(self.way.descend)
        between = self._seconds(self.way.between)
        return {"ascending": ascending, "between": between}


def rows(work: str, base: str, device: torch.device, seconds: float) -> list[str]:
    """A line of the table for each way."""
    runners = {way.name: Runner(way, work, base, device) for way in WAYS}
    numel = sum(param.numel() for param in runners[Fused.name].params)
    triad = Triad(numel * 4, device)
    for runner in runners.values():
        runner()
    rounds = alternate({**runners, "triad": triad}, seconds)
    lines = []
    for name, runner in runners.items():
        cells = []
        for kind in KINDS:
            ratio = quantiles(paired_ratios(rounds, Fused.name, name, kind)).median
            cells += [f"{quantiles(values(rounds, name, kind)).median * 1e3:.1f} ms", f"{ratio:.2f}"]
            spared = runner.way.spares[kind] if isinstance(runner.way, Fused) else 0
            moved = numel * (BYTES[base][kind] - spared)
            shares = [
                moved / record[name][kind] / record["triad"]["bytes_per_second"] for record in rounds
            ]  # of the same bytes, whoever moves more
            cells.append(f"{quantiles(shares).median:.2f}")
        v = f"{runner.way.bytes_of_v() / numel:.2f}" if isinstance(runner.way, Fused) else "4.00"
        lines.append(f"| {work} | {base} | {name} | {' | '.join(cells)} | {v} |")
    return lines


def table(works: list[str], seconds: float) -> str:
    """The table, and what it was measured on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        "| workload | base | way | ascending step | times fsam_ext | of the bus | step between | times fsam_ext "
        "| of the bus | bytes of v |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for work in works:
        for base in BYTES:
            lines += rows(work, base, device, seconds)
            print(lines[-len(WAYS)], flush=True)
    where = stamp(device)
    note = (
        f"{where['machine']}; {where['versions']}; {where['commit']}, {where['date']}; {running_backends(device)[0]}."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKLOADS), metavar="WORK")
    parser.add_argument("--seconds", type=float, default=15, help="for each workload and base")
    parser.add_argument("--write", type=Path, help="a page with the markers reuse:begin and reuse:end")
    arguments = parser.parse_args()
    text = table(arguments.works, arguments.seconds)
    print(text)
    if arguments.write is not None:
        arguments.write.write_text(put_between_markers(arguments.write.read_text(), "reuse", text))


if __name__ == "__main__":
    main()
