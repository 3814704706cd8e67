"""What the default call of each op executes, counted in a library: for each type of parameters and architecture."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.sass import binary, calls
from bench.sass.calls import CHUNK, COUNT_STEPS, KERNELS, MODELS, STORAGE, Kernel, Model
from bench.sass.program import Program, parse
from bench.sass.timeline import Timeline, timeline
from bench.sass.walk import Issue, Walk

ARCHITECTURES = ("80", "90", "100")
LANES = 32

CLASSES = {
    "arithmetic": "FADD FMUL FFMA FSEL FSETP FSET FMNMX MUFU FCHK DADD DMUL DFMA DSETP",
    "conversion": "F2F F2FP HADD2 I2F I2FP F2I FRND PRMT",
    "memory": "LDG STG",
    "shared": "LDS STS SHFL BAR",
    "parameters": "LDC ULDC LDCU S2R S2UR",
    "branches": "BRA BSSY BSYNC BREAK CALL RET EXIT WARPSYNC NOP",
}
_CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes.split()}


def class_of(opcode: str) -> str:
    """Where an instruction is counted; what is in no other class moves and adds addresses and predicates."""
    return _CLASS_OF.get(opcode, "integers")


@dataclass(frozen=True)
class Figures:
    """One kernel's default call, of a block amid a long row."""

    op: str
    dtype: str
    arch: str
    model: Model
    per_parameter: float  # lane instructions of the whole block; count_steps: for each tensor
    main_loop: float  # of these, from the first instruction of the main loop to its last one
    before_first_load: int  # instructions of the warp that issues most of them
    cycles: Timeline
    moved_bytes: float  # by the main loop, for each parameter
    narrow: int  # accesses of less than 16 bytes in the main loop
    under_way: float  # parameters whose loads a lane has all requested before it waits for one of them
    classes: dict[str, float]  # per parameter, in the main loop
    before_classes: dict[str, int]  # before the first load

    def __str__(self) -> str:
        return f"{self.op} {self.dtype} sm_{self.arch} {self.model.name}"


def main_loop(issued: list[Issue]) -> tuple[int, int]:
    """From the first to behind the last instruction that belongs to the main loop."""
    inside = [i for i, issue in enumerate(issued) if issue.ins.in_main_loop]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def first_load(issued: list[Issue]) -> int:
    """How many instructions come before the first load of the main loop, or before any load without a main loop."""
    loads = [i for i, issue in enumerate(issued) if issue.ins.opcode == "LDG"]
    return next((i for i in loads if issued[i].ins.in_main_loop), loads[0])


_WIDTHS = {"128": 16, "64": 8, "U16": 2}


def under_way(issued: list[Issue]) -> int:
    """Bytes that a lane has requested in the main loop before it waits for any of them."""
    pending, requested = set(), 0
    for issue in issued:
        control = issue.ins.control
        if any(control.waits >> scoreboard & 1 for scoreboard in pending):
            break
        if issue.ins.opcode == "LDG" and issue.ins.in_main_loop and not issue.guarded:
            pending.add(control.sets)
            requested += next((_WIDTHS[name] for name in issue.ins.modifiers if name in _WIDTHS), 4)
    return requested


def count(kernel: Kernel, dtype: str, arch: str, model: Model, walk: Walk) -> Figures:
    """The figures of a walk."""
    per = LANES / (CHUNK * model.span if kernel.has_table else kernel.threads)
    loops = [issued[slice(*main_loop(issued))] for issued in walk.issued]
    classes = Counter(class_of(issue.ins.opcode) for loop in loops for issue in loop)
    slowest = max(walk.issued, key=first_load)
    reached = [
        issue.ins
        for loop in loops
        for issue in loop
        if issue.ins.opcode in ("LDG", "STG") and issue.ins.in_main_loop and not issue.guarded
    ]
    accesses = ["128" in ins.modifiers for ins in reached]
    loaded = 16 * sum(ins.opcode == "LDG" for ins in reached) * per
    return Figures(
        kernel.call,
        dtype,
        arch,
        model,
        sum(map(len, walk.issued)) * per,
        sum(map(len, loops)) * per,
        first_load(slowest),
        timeline(walk.issued),
        16 * sum(accesses) * per,
        len(accesses) - sum(accesses),
        min(map(under_way, walk.issued)) / loaded if loaded else 0.0,
        {name: number * per for name, number in classes.most_common()},
        dict(Counter(class_of(issue.ins.opcode) for issue in slowest[: first_load(slowest)]).most_common()),
    )


def programs(cubin: Path, dtype: str, rows: int = 1) -> list[tuple[Kernel, binary.Entry, Program]]:
    """The kernels of default calls in a cubin, for tables of so many rows."""
    by_name = {entry.shown: entry for entry in binary.entries(cubin)}
    kernels = [*KERNELS, COUNT_STEPS] if dtype == "fp32" and rows == 1 else KERNELS
    found = [(kernel, by_name[kernel.name(STORAGE[dtype], rows)]) for kernel in kernels]
    sections = binary.disassemble(cubin, [entry for _, entry in found])
    lines, arch = binary.main_loop_lines(), binary.architecture(cubin)
    return [
        (kernel, entry, parse(entry.name, arch, sections[entry.name], lambda line: binary.is_main_loop(line, lines)))
        for kernel, entry in found
    ]


def _of_cubin(task: tuple[Path, str]) -> list[Figures]:
    cubin, dtype = task
    found = []
    for rows in sorted({len(model.sizes) for model in MODELS}):
        models = [model for model in MODELS if len(model.sizes) == rows]
        for kernel, entry, program in programs(cubin, dtype, rows):
            for model in models if kernel.has_table else models[:1]:
                walk = Walk(program, calls.default_block(kernel, dtype, entry, model)).run()
                found.append(count(kernel, dtype, program.arch, model, walk))
    return found


def cubins(folder: Path, architectures: Sequence[str]) -> list[tuple[Path, str]]:
    """The cubins of a folder whose kernels are counted, and their type of parameters."""
    sources = {"fp32": "launch_float.", "bf16": "launch_bfloat16."}
    return [
        (cubin, dtype)
        for arch in architectures
        for dtype, source in sources.items()
        for cubin in sorted(folder.glob(f"{source}*sm_{arch}.cubin"))
    ]


def read(library: Path = binary.LIBRARY, architectures: Sequence[str] = ARCHITECTURES) -> list[Figures]:
    """All figures of a library that was compiled with -lineinfo, for those of the architectures that it holds."""
    with tempfile.TemporaryDirectory() as folder:
        binary.extract(library, Path(folder))
        with ThreadPoolExecutor(2) as pool:
            return [figures for found in pool.map(_of_cubin, cubins(Path(folder), architectures)) for figures in found]
