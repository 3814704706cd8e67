"""What nvcc made of the CUDA kernels, read back from the library: no GPU needed.

``python bench/cuda_check.py`` prints a table with one line for each kernel and architecture, and what the default call
of each op executes (bench/sass). It needs cuobjdump and nvdisasm: from a CUDA toolkit, or ``pip install
nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm``. With ``--model`` it predicts the times of the passes, with ``--host-time``
it measures what the ops cost the host before a kernel runs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from bisect import bisect
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where it is run as a script

from bench.gpu_model import GPUS, MOVED, print_model
from bench.host_time import print_host_times
from bench.sass import binary, figures
from bench.sass.binary import LIBRARY, missing_tools
from bench.sass.calls import MODELS

SIZES = {"double": 8, "float": 4, "fsam::bfloat16": 2, "fsam::half": 2, "signed char": 1, "void": 0}
THREADS_PER_BLOCK = 256
REGISTERS_PER_SM = 65536


@dataclass
class Kernel:
    """One kernel for one architecture."""

    arch: str
    name: str  # with its template arguments
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    spills: int = 0  # instructions that access local memory
    main_loop: list[str] = field(default_factory=list)  # the global accesses of the aligned main loop
    others: list[str] = field(default_factory=list)
    is_read: bool = True  # or only what it needs is known

    @property
    def op(self) -> str:
        """The op that it serves, or sum_slots."""
        return self.name.partition("_kernel")[0]

    @property
    def is_pass(self) -> bool:
        """Whether it goes over all parameters."""
        return self.op in MOVED

    @property
    def arguments(self) -> list[str]:
        """Its template arguments."""
        return [part.strip() for part in self.name.partition("<")[2].rpartition(">")[0].split(",")]

    @property
    def loaded_bytes_per_parameter(self) -> int:
        """What the pass reads for each parameter."""
        storage = SIZES[self.arguments[0]]
        state = 8 if storage == 8 else 4
        if self.op == "noise_norm":
            _, average, adaptive, _ = self.arguments
            return storage + SIZES[average] + (adaptive == "true") * storage
        if self.op == "update_ema":
            return storage + SIZES[self.arguments[1]]
        if self.op == "perturb":
            _, average, master, _ = self.arguments
            return (4 if master == "true" else 0) + 2 * storage + SIZES[average]
        kept = 8 if storage == 8 else 2  # at least
        if self.op in ("dots", "project"):
            return storage + kept
        weight = 4 if self.arguments[1] == "true" else storage
        if self.op == "restore_sgd":
            if self.reuses:  # with momentum or without
                return weight + storage + kept
            return weight + storage + (self.arguments[2] == "true") * state
        if self.op == "restore_adam":
            return weight + storage + 2 * state + self.reuses * kept
        return weight

    @property
    def narrow_average(self) -> bool:
        """Whether its average fills less than 16 bytes where the parameters of a lane do."""
        average = self.arguments[1]
        return average == "signed char" or (average == "fsam::bfloat16" and self.arguments[0] == "float")

    @property
    def narrow_accesses(self) -> list[str]:
        """Those of its main loop that move less than 16 bytes, but for what float32 parameters keep in bfloat16: 8."""
        keeps = self.op in ("perturb", "dots", "project") or self.reuses
        allowed = (".128", ".64") if keeps and self.arguments[0] == "float" else (".128",)
        groups = self.bytes_in_flight_per_thread // self.loaded_bytes_per_parameter // 4
        narrow = [access for access in self.main_loop if not any(width in access for width in allowed)]
        halves = [access for access in self.main_loop if ".64" in access]
        return narrow or halves[2 * groups :]  # loaded and stored once by each group

    @property
    def reuses(self) -> bool:
        """Whether it is an update that reuses a gradient."""
        return self.op in ("restore_sgd", "restore_adam") and self.arguments[-2] == "true"

    @property
    def bytes_in_flight_per_thread(self) -> int:
        """What a thread requests before it waits: 16 parameters, half of that of float64 and for Adam."""
        double = self.arguments[0] == "double"
        halved = self.op == "restore_adam" or (double and (self.op == "perturb" or self.reuses))
        parameters = (8 if double else 16) // (2 if halved else 1)
        if self.op == "restore_adam" and double and self.reuses and self.arch == "120":
            parameters //= 2  # csrc/cuda/restore_adam.cuh says why
        return parameters * self.loaded_bytes_per_parameter

    @property
    def threads_per_sm(self) -> int:
        """How many threads an SM holds, by the registers (which are given out eight at a time) and its own limit."""
        registers = -(-self.registers // 8) * 8
        by_registers = REGISTERS_PER_SM // (registers * THREADS_PER_BLOCK)
        return min(by_registers, GPUS[self.arch].threads_per_sm // THREADS_PER_BLOCK) * THREADS_PER_BLOCK

    @property
    def bytes_in_flight_per_sm(self) -> int:
        """What all threads of an SM request before they wait."""
        return self.threads_per_sm * self.bytes_in_flight_per_thread


_ACCESS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?((?:LDG|STG|LDL|STL)\b\S*)")


def _chain(text: str, at: int) -> str:
    """The chain of calls through which an instruction was inlined: the comments between the last two instructions that
    have one between them."""
    last = text.rfind("//##", 0, at)
    return text[text.rfind("/*", 0, last) : text.find("\n", last)]


def _read_cubin(cubin: Path, table: int | None) -> list[Kernel]:
    arch = binary.architecture(cubin)
    usage = binary.run(binary.find_tool("cuobjdump"), "-res-usage", cubin)
    found = re.findall(r"Function (\S+):\n\s*(.*)", usage)
    kernels = {}
    for name, resources in found:
        value = dict(re.findall(r"(\w+):(\d+)", resources))
        kernels[name] = Kernel(
            arch, name, int(value["REG"]), int(value["STACK"]), int(value["LOCAL"]), int(value["SHARED"])
        )
    if not kernels:
        return []
    command = [binary.find_tool("nvdisasm"), "-c", "-gi"]
    if table is not None:
        entries = binary.entries(cubin)
        for entry in entries:
            kernels[entry.name].is_read = _table_size(entry.shown) in (None, table)
        symbols = [str(entry.symbol) for entry in entries if kernels[entry.name].is_read]
        command += ["-fun", ",".join(symbols)]
    text = binary.run(*command, cubin)
    lines, rare = binary.main_loop_lines(), binary.one_by_one_lines()
    starts = {match.start(): kernels.get(match[1]) for match in re.finditer(r"^\.text\.(.+):$", text, re.MULTILINE)}
    at = list(starts)
    for match in _ACCESS.finditer(text):
        index = bisect(at, match.start())
        kernel = starts[at[index - 1]] if index else None
        if kernel is None:
            continue
        if match[1].startswith(("LDL", "STL")):
            kernel.spills += 1
        else:
            chain = _chain(text, match.start())
            in_main_loop = binary.is_main_loop(chain, lines) and not binary.is_main_loop(chain, rare)
            (kernel.main_loop if in_main_loop else kernel.others).append(match[1])
    return list(kernels.values())


def _table_size(shown: str) -> int | None:
    found = re.search(r"Table<(\d+)>", shown)
    return int(found[1]) if found else None


def read_library(library: Path = LIBRARY, table: int | None = None) -> list[Kernel]:
    """Every kernel of every architecture in a library that was compiled with -lineinfo.

    The code of those with another size of table than ``table`` is not read: it is the same but for constants, and to
    disassemble it takes most of the time.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubins = binary.extract(library, Path(folder))
        with ThreadPoolExecutor(2) as pool:
            kernels = [kernel for found in pool.map(_read_cubin, cubins, repeat(table)) for kernel in found]
    names = binary.demangled([kernel.name for kernel in kernels])
    for kernel in kernels:
        kernel.name = names[kernel.name]
    return kernels


def has_ptx(library: Path = LIBRARY) -> bool:
    """Whether the library holds PTX, which the driver compiles for GPUs that came later."""
    return "ptx" in binary.run(binary.find_tool("cuobjdump"), "-lptx", library)


def print_kernels(library: Path) -> None:
    """Registers, spills and the accesses of the main loop of every kernel."""
    print(f"{library.name}: {library.stat().st_size / 1e6:.1f} MB, PTX: {'yes' if has_ptx(library) else 'no'}")
    print(f"{'sm':>4} {'regs':>4} {'stack':>5} {'spills':>6} {'threads/SM':>10} {'KB in flight':>12} "
          f"{'needed':>6}  {'128-bit':>7} {'other':>5}  kernel")  # fmt: skip
    for kernel in sorted(read_library(library), key=lambda k: (int(k.arch), k.name)):
        wide = sum(".128" in access for access in kernel.main_loop)
        line = f"{kernel.arch:>4} {kernel.registers:4} {kernel.stack:5} {kernel.spills:6} "
        if not kernel.is_pass:
            line += " " * 32
        else:
            needed = GPUS[kernel.arch].bytes_in_flight_per_sm if kernel.arch in GPUS else float("nan")
            line += f"{kernel.threads_per_sm:10} {kernel.bytes_in_flight_per_sm / 1e3:12.0f} {needed / 1e3:6.0f}  "
        print(line + f"{wide:7} {len(kernel.main_loop) - wide:5}  {kernel.name}")


def print_figures(found: list[figures.Figures]) -> None:
    """What the default call of each op executes: see bench/sass/figures.py, and NOTE [cycles] in its timeline.py."""
    print("\nExecuted by a block amid a long row: lane instructions a parameter (count_steps: a tensor), bytes in the "
          "main loop;\ninstructions and modelled cycles before the first load, cycles until a barrier before it and "
          f"until the end:\n{'sm':>4} {'dtype':>5} {'model':>11} {'all':>6} {'loop':>6} {'bytes':>5} {'narrow':>6} "
          f"{'before':>6} {'cycles':>6} {'barrier':>7} {'end':>6}  op")  # fmt: skip
    for f in found:
        print(f"{f.arch:>4} {f.dtype:>5} {f.model.name:>11} {f.per_parameter:6.1f} {f.main_loop:6.1f} "
              f"{f.moved_bytes:5.0f} {f.narrow:6} {f.before_first_load:6} {f.cycles.first_load or '-':>6} "
              f"{f.cycles.barrier or '-':>7} {f.cycles.end:6}  {f.op}")  # fmt: skip


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--host-time", action="store_true", help="measure the host's share of each op instead")
    parser.add_argument("--model", action="store_true", help="print the predicted times of docs/gpu-model.md instead")
    parser.add_argument("--executed", action="store_true", help="print only what the default calls execute")
    arguments = parser.parse_args()
    if arguments.host_time:
        return print_host_times()
    if not arguments.library.exists():
        sys.exit(f"{arguments.library} does not exist: build it where nvcc is found, `make build`")
    if missing_tools():
        sys.exit(missing_tools())
    if not arguments.model and not arguments.executed:
        print_kernels(arguments.library)
    found = figures.read(arguments.library)
    if not found:
        sys.exit(f"{arguments.library} holds none of sm_{', sm_'.join(figures.ARCHITECTURES)}, whose calls are counted")
    if arguments.model:
        return print_model({(f.op, f.dtype, f.arch): f.per_parameter for f in found if f.model == MODELS[0]})
    print_figures(found)


if __name__ == "__main__":
    main()
