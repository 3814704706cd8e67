"""What GPUs can do, what a pass moves, and the times that follow: ``python bench/cuda_check.py --model``."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

LANES = 32
SCHEDULERS_PER_SM = 4


@dataclass(frozen=True)
class Gpu:
    """The fastest memory that a GPU of an architecture has, and what an SM can hold and issue."""

    name: str
    bandwidth: float  # bytes a second
    sms: int
    threads_per_sm: int
    clock: float  # boost, in Hz

    # NOTE [bytes in flight]
    # Little's law: memory runs at its bandwidth only while bandwidth x latency bytes are requested and not yet there.
    # 0.8 microseconds is the latency of a loaded memory system on the slower of these GPUs.
    @property
    def bytes_in_flight_per_sm(self) -> float:
        """What each SM has to have requested for full bandwidth."""
        return self.bandwidth * 0.8e-6 / self.sms

    # NOTE [issue limit]
    # Each of an SM's four schedulers issues at most one instruction of a warp, that is of 32 lanes, in a cycle. A pass
    # that moves n bytes for each parameter at a bandwidth b has n / b seconds for a parameter, so it is bound by memory
    # only while it executes fewer than n / b x SMs x 4 x clock x 32 instructions, lane by lane, for each parameter. On
    # an H200 at 1.98 GHz and 4.3 TB/s these are 7.8 for each byte.
    @property
    def issued_per_second(self) -> float:
        """Instructions of lanes that it issues at most."""
        return self.sms * SCHEDULERS_PER_SM * self.clock * LANES

    def issue_limit(self, nbytes: float, bandwidth: float) -> float:
        """The lane instructions that there is time for while `nbytes` move at a bandwidth."""
        return nbytes / bandwidth * self.issued_per_second


# NVIDIA's data sheets. sm_75: Quadro RTX 8000, sm_86: RTX A6000, sm_89: RTX 4090, sm_120: RTX 5090. The sheets of the
# H100, H200 and B200 name no clock: it is the highest one that nvidia-smi lists for them.
GPUS = {
    "75": Gpu("RTX 8000", 0.672e12, 72, 1024, 1.77e9),
    "80": Gpu("A100 80 GB", 2.039e12, 108, 2048, 1.41e9),
    "86": Gpu("RTX A6000", 0.768e12, 84, 1536, 1.80e9),
    "89": Gpu("RTX 4090", 1.008e12, 128, 1536, 2.52e9),
    "90": Gpu("H100 SXM", 3.35e12, 132, 2048, 1.98e9),
    "100": Gpu("B200", 8.0e12, 148, 2048, 1.965e9),
    "120": Gpu("RTX 5090", 1.792e12, 170, 1536, 2.41e9),
}
H200 = Gpu("H200", 4.8e12, 132, 2048, 1.98e9)

# Values in the storage type and in the state's type that a pass moves for each parameter: with an average in fp32, SGD
# with momentum.
EVERY_STEP = {
    "noise_norm": (1, 1), "perturb": (4, 2), "update_ema": (1, 2), "restore": (2, 0),
    "restore_sgd": (3, 2), "restore_adam": (3, 4),
}  # fmt: skip
# What the reuse of second gradients adds, kept in fp32: these ops, and ops with arguments more. Between two ascents the
# updates start from the parameters.
REUSE = {
    "perturb_keeping": (4, 3), "dots": (1, 1), "project": (1, 2), "update_ema_measuring": (1, 2),
    "restore_sgd_reusing": (3, 3), "restore_adam_reusing": (3, 5),
}  # fmt: skip
MOVED = EVERY_STEP | REUSE
# Those whose sums over the chunks are added up by a launch of their own.
SUMMED = ("noise_norm", "dots", "project", "update_ema_measuring")
# The passes of a step with SGD: of F-SAM; with reuse, of one that ascends and of one between two ascents.
STEPS = {
    "without reuse": ("noise_norm", "perturb", "restore_sgd"),
    "ascending": ("noise_norm", "perturb_keeping", "dots", "project", "restore_sgd"),
    "between": ("update_ema_measuring", "restore_sgd_reusing"),
}
STORAGE_BYTES = {"fp32": 4, "bf16": 2}


def bytes_per_parameter(op: str, dtype: str) -> int:
    """What a pass moves for each parameter."""
    low, high = MOVED[op]
    return low * STORAGE_BYTES[dtype] + high * 4


# NOTE [the model]
# A pass takes its bytes over 0.9 of the data sheet's bandwidth (what a copy reaches), or its executed instructions over
# what the GPU issues, whichever is longer; and 3 microseconds a launch: to start, to fill the SMs and to drain them.
# The second stage of a sum adds up rows of slots in a block each, with 32 KiB in flight in 0.8 microseconds.
SHARE_OF_BANDWIDTH = 0.9
SECONDS_PER_LAUNCH = 3e-6
SUM_SLOTS_BANDWIDTH = 32768 / 0.8e-6
CHUNK = 4096


def seconds(gpu: Gpu, op: str, dtype: str, numel: float, instructions: float) -> float:
    """The predicted time of a pass that executes so many instructions for each parameter."""
    memory = bytes_per_parameter(op, dtype) / (SHARE_OF_BANDWIDTH * gpu.bandwidth)
    result = SECONDS_PER_LAUNCH + numel * max(memory, instructions / gpu.issued_per_second)
    if op in SUMMED:
        result += SECONDS_PER_LAUNCH + numel / CHUNK * 4 / SUM_SLOTS_BANDWIDTH
    return result


def print_model(executed: dict[tuple[str, str, str], float]) -> None:
    """The predictions of docs/gpu-model.md, from executed instructions by op, dtype and architecture."""
    gpus = [(arch, gpu) for arch, gpu in [*GPUS.items(), ("90", H200)] if any(key[2] == arch for key in executed)]
    gpus.sort(key=lambda pair: (int(pair[0]), pair[1].bandwidth))
    names = " | ".join(gpu.name for _, gpu in gpus)
    print(f"| pass | parameters | bytes each | {names} |\n|---|---|---|{'---|' * len(gpus)}")
    shown = [(op, (op,)) for op in EVERY_STEP if op != "update_ema"] + [(f"step {name}", STEPS[name]) for name in STEPS]
    for dtype, (name, ops) in itertools.product(STORAGE_BYTES, shown):
        for label, numel in (("10M", 1e7), ("100M", 1e8), ("1B", 1e9), ("8B", 8e9)):
            nbytes = sum(bytes_per_parameter(op, dtype) for op in ops)
            times = [sum(seconds(gpu, op, dtype, numel, executed[op, dtype, a]) for op in ops) for a, gpu in gpus]
            cells = [f"{time * 1e6:,.0f} us" if time < 1e-3 else f"{time * 1e3:,.2f} ms" for time in times]
            print(f"| {name}, {dtype} | {label} | {nbytes} | " + " | ".join(cells) + " |")
    print(f"\nExecuted instructions a parameter, and their share of the issue limit at {SHARE_OF_BANDWIDTH} of the "
          f"bandwidth:\n\n| pass | {names} |\n|---|{'---|' * len(gpus)}")  # fmt: skip
    for dtype, op in itertools.product(STORAGE_BYTES, (op for op in MOVED if op != "update_ema")):
        cells = []
        for arch, gpu in gpus:
            limit = gpu.issue_limit(bytes_per_parameter(op, dtype), SHARE_OF_BANDWIDTH * gpu.bandwidth)
            cells.append(f"{executed[op, dtype, arch]:.1f} ({executed[op, dtype, arch] / limit:.0%})")
        print(f"| {op}, {dtype} | " + " | ".join(cells) + " |")
