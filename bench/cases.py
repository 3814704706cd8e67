"""What a run consists of: cases, each a table of the results, in the order of their importance, and the rows of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from bench.clocks import HostClock
from bench.measure import Quantiles
from bench.peers import BASES, Provider
from bench.rows import Row, stamp
from bench.workloads import TRAININGS, WORKLOADS, Training, Workload, scaling

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Units of figures that a clock is behind.
TIMED = ("ms", "ns", "GB/s", "x")


@dataclass(frozen=True)
class Case:
    """A workload, a dtype and a base optimizer, and who takes part."""

    work: Workload | Training
    dtype: str
    base: str
    providers: tuple[str, ...]
    seconds: float

    @property
    def title(self) -> str:
        return f"{self.work.name} {self.dtype} {self.base}"

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.work.name, self.dtype, self.base)


@dataclass(frozen=True)
class Run:
    """What the cases of one run share: the device, who is there, until when, and how to say what is being done."""

    device: torch.device
    available: dict[str, type[Provider]]
    deadline: float
    say: Callable[[str], None]

    def left(self, seconds: float) -> float:
        """So much of ``seconds`` as the time of the run still has."""
        return max(0.0, min(seconds, self.deadline - time.monotonic()))

    @property
    def rounds(self) -> int:
        """The fewest that a figure has, fewer where there is no time left."""
        return 5 if self.left(1.0) else 1

    def row(self, case: Case, name: str, metric: str, unit: str, q: Quantiles, scale: float = 1.0) -> Row:
        clock = "processor time" if HostClock.now is time.thread_time else ""
        return Row(
            *self._head(case, name),
            metric=metric,
            unit=unit,
            median=q.median * scale,
            q20=q.q20 * scale,
            q80=q.q80 * scale,
            samples=q.samples,
            note=clock if unit in TIMED and metric != "first_step" else "",
            **stamp(self.device),
        )

    def not_run(self, case: Case, name: str, why: str) -> Row:
        head = self._head(case, name)
        return Row(*head, "step", "ms", None, None, None, 0, f"not run: {why}", **stamp(self.device))

    def _head(self, case: Case, name: str) -> tuple[str, str, str, str, str]:
        kind = self.available.get(name.removesuffix(" graph"))
        backend = kind.backend if kind is not None else "torch"
        return name, backend, case.work.name, case.dtype, case.base


OUT_OF_TIME = "the time was used up; see --minutes"


def nowhere_row(name: str, backend: str, why: str, device: str) -> Row:
    """Says of someone why there are no figures at all."""
    found = torch.device(device if torch.cuda.is_available() else "cpu")
    here = {**stamp(found), "device": device}
    return Row(name, backend, "all", "all", "all", "step", "ms", None, None, None, 0, f"not run: {why}", **here)


def beside_others(rows: list[Row], busy: int) -> list[Row]:
    """What was timed beside busy processes, as figures of their own."""
    if not busy:
        return rows
    return [replace(row, metric=f"{row.metric}, {busy} busy") for row in rows if row.unit in TIMED]


# ---- Which ones ----------------------------------------------------------------------------------------------------

HEADLINE = ("resnet18", "gpt2", "tensors_1000", "tensors_10000")
# Compilation takes longer than everything else together where there are thousands of tensors.
NEVER_COMPILED = ("tensors_1000", "tensors_10000")
IN_TRAINING = (
    "fsam_ext",
    "fsam_ext flat",
    "fsam_ext triton",
    "official",
    "foreach",
    "compiled",
    "pytorch_optimizer",
    "sam by hand",
    "base",
    "plain",
)
# Without a forward and backward the one is `base`, and the other does not do the work of the rest.
ONLY_IN_TRAINING = ("sam by hand", "plain")


def plan(
    full: bool, available: dict[str, type[Provider]], compiled_on: Iterable[str], large: bool = False
) -> list[Case]:
    """The cases in the order of their importance: a run that is cut short has the first ones.

    Args:
        full: every combination.
        compiled_on: workloads on which those take part that compile.
        large: with the trainings of a GPU's size.
    """
    short = [name for name, kind in available.items() if not kind.full_only and name not in ONLY_IN_TRAINING]
    everyone = [name for name in available if name not in ONLY_IN_TRAINING] if full else short
    seconds = 20.0 if full else 4.0

    def case(work: Workload | Training, dtype: str, base: str, names: Iterable[str]) -> Case:
        compiles = work.name in compiled_on and work.name not in NEVER_COMPILED
        names = (name for name in names if name in available and (compiles or not available[name].compiles))
        if dtype in DTYPES:
            kinds = {name: available[name].dtypes for name in names}
            names = (name for name, dtypes in kinds.items() if dtypes is None or DTYPES[dtype] in dtypes)
        return Case(work, dtype, base, tuple(names), seconds)

    eager = [name for name in everyone if not available[name].compiles]
    cases = [case(WORKLOADS[name], "fp32", "sgd", everyone) for name in HEADLINE]
    trainings = [work for work in TRAININGS.values() if work.shrunk is None or large]
    cases += [case(work, work.dtype, work.base, IN_TRAINING) for work in trainings]
    growth = ("fsam_ext", "fsam_ext flat", "fsam_ext triton", "official", "foreach", "compiled", "base")
    cases += [case(work, "fp32", "sgd", growth) for work in scaling(3e8 if full else 1e8)]
    cases += [
        case(WORKLOADS["resnet18"], dtype, base, everyone if full else eager) for dtype in DTYPES for base in BASES
    ]
    if full:
        cases += [
            case(work, dtype, base, everyone) for work in WORKLOADS.values() for dtype in DTYPES for base in BASES
        ]
    else:
        peers = [name for name in eager if available[name].is_fsam]
        cases += [case(WORKLOADS[name], "fp32", "sgd", peers) for name in ("vit_b_16", "one_64m", "llama_shard")]
        cases += [case(WORKLOADS["gpt2"], "bf16", "sgd", eager)]
    first: dict[tuple[str, str, str], Case] = {}
    for candidate in cases:
        first.setdefault(candidate.key, candidate)
    return list(first.values())
