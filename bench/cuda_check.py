"""What nvcc made of the CUDA kernels, read back from the library: no GPU needed.

``python bench/cuda_check.py`` prints a table with one line for each kernel and architecture. It needs cuobjdump and
nvdisasm: from a CUDA toolkit, or ``pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm``. With ``--host-time`` it
measures instead what the ops cost the host before a kernel runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "fsam_ext/_C_cuda.abi3.so"
WALK = ROOT / "csrc/cuda/walk.cuh"

SIZES = {"double": 8, "float": 4, "fsam::bfloat16": 2, "fsam::half": 2, "signed char": 1, "void": 0}
THREADS_PER_BLOCK = 256
REGISTERS_PER_SM = 65536


@dataclass(frozen=True)
class Gpu:
    """The fastest memory that a GPU of an architecture has, and what an SM can hold."""

    name: str
    bandwidth: float  # bytes a second
    sms: int
    threads_per_sm: int

    # NOTE [bytes in flight]
    # Little's law: memory runs at its bandwidth only while bandwidth x latency bytes are requested and not yet there.
    # 0.8 microseconds is the latency of a loaded memory system on the slower of these GPUs.
    @property
    def bytes_in_flight_per_sm(self) -> float:
        """What each SM has to have requested for full bandwidth."""
        return self.bandwidth * 0.8e-6 / self.sms


# NVIDIA's data sheets. sm_75: Quadro RTX 8000, sm_86: RTX A6000, sm_89: RTX 4090, sm_120: RTX 5090.
GPUS = {
    "75": Gpu("RTX 8000", 0.672e12, 72, 1024),
    "80": Gpu("A100 80 GB", 2.039e12, 108, 2048),
    "86": Gpu("RTX A6000", 0.768e12, 84, 1536),
    "89": Gpu("RTX 4090", 1.008e12, 128, 1536),
    "90": Gpu("H100 SXM", 3.35e12, 132, 2048),
    "100": Gpu("B200", 8.0e12, 148, 2048),
    "120": Gpu("RTX 5090", 1.792e12, 170, 1536),
}


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

    @property
    def op(self) -> str:
        """The op that it serves, or sum_slots."""
        return self.name.partition("_kernel")[0]

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
            return (4 if master == "true" else storage) + storage + SIZES[average]
        weight = 4 if self.arguments[1] == "true" else storage
        if self.op == "restore_sgd":
            return weight + storage + (self.arguments[2] == "true") * state
        return {"restore": weight, "restore_adam": weight + storage + 2 * state}[self.op]

    @property
    def narrow_average(self) -> bool:
        """Whether its average fills less than 16 bytes where the parameters of a lane do."""
        average = self.arguments[1]
        return average == "signed char" or (average == "fsam::bfloat16" and self.arguments[0] == "float")

    @property
    def bytes_in_flight_per_thread(self) -> int:
        """What a thread requests before it waits: 16 parameters, half of that of float64 and for Adam."""
        double = self.arguments[0] == "double"
        halved = self.op == "restore_adam" or (double and self.op == "perturb")
        parameters = (8 if double else 16) // (2 if halved else 1)
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


def find_tool(name: str) -> str | None:
    """The path of one of CUDA's binary tools: from CUDA_HOME, PATH or the packages of PyPI."""
    places = [Path(home) / "bin" for home in [os.environ.get("CUDA_HOME")] if home]
    places += [Path(part) for part in os.environ.get("PATH", "").split(os.pathsep)]
    places += [Path("/usr/local/cuda/bin")]
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        places += sorted(Path(location).glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join(map(str, places)))


def missing_tools() -> str | None:
    """What has to be installed before a library can be read, or None."""
    if all(find_tool(name) for name in ("cuobjdump", "nvdisasm")):
        return None
    return "cuobjdump and nvdisasm are needed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"


def main_loop_lines() -> set[int]:
    """The lines of walk.cuh through which its main loop reaches memory."""
    lines = WALK.read_text().splitlines()
    found = {number for number, text in enumerate(lines, 1) if "Whole{}" in text}
    assert len(found) == 2, "walk.cuh: expected one load and one finish of the main loop"
    return found


def _run(*command: object, cwd: Path | None = None) -> str:
    return subprocess.run(list(map(str, command)), text=True, capture_output=True, check=True, cwd=cwd).stdout


def _demangled(names: list[str]) -> dict[str, str]:
    shown = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True).stdout
    short = re.compile(r"^(?:void )?fsam::cuda::|fsam::cuda::(?=Table)")
    return {
        name: short.sub("", text).rpartition("(")[0] if "(" in text else text
        for name, text in zip(names, (line.replace(" >", ">") for line in shown.splitlines()), strict=True)
    }


def _read_cubin(cubin: Path) -> list[Kernel]:
    arch = re.search(r"sm_(\d+)", cubin.name)[1]
    usage = _run(find_tool("cuobjdump"), "-res-usage", cubin)
    found = re.findall(r"Function (\S+):\n\s*(.*)", usage)
    kernels = {}
    for name, resources in found:
        value = dict(re.findall(r"(\w+):(\d+)", resources))
        kernels[name] = Kernel(
            arch, name, int(value["REG"]), int(value["STACK"]), int(value["LOCAL"]), int(value["SHARED"])
        )
    lines, kernel, in_main_loop = main_loop_lines(), None, False
    source = re.compile(r'walk\.cuh", line (\d+)')
    access = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?((?:LDG|STG|LDL|STL)\b\S*)")
    fresh = True
    for line in _run(find_tool("nvdisasm"), "-c", "-gi", cubin).splitlines():
        if line.startswith(".text."):
            kernel = kernels.get(line[len(".text.") :].rstrip(":"))
        elif "//##" in line:
            # The chain of calls through which the instructions that follow were inlined, a line of text a call.
            if fresh:
                in_main_loop, fresh = False, False
            in_main_loop |= any(int(number) in lines for number in source.findall(line))
        elif line.lstrip().startswith("/*"):
            fresh = True
            found_access = access.search(line)
            if found_access is None or kernel is None:
                continue
            if found_access[1].startswith(("LDL", "STL")):
                kernel.spills += 1
            else:
                (kernel.main_loop if in_main_loop else kernel.others).append(found_access[1])
    return list(kernels.values())


def read_library(library: Path = LIBRARY) -> list[Kernel]:
    """Every kernel of every architecture in a library that was compiled with -lineinfo."""
    with tempfile.TemporaryDirectory() as folder:
        _run(find_tool("cuobjdump"), "-xelf", "all", library, cwd=Path(folder))
        cubins = sorted(Path(folder).glob("*.cubin"))
        with ThreadPoolExecutor(2) as pool:
            kernels = [kernel for found in pool.map(_read_cubin, cubins) for kernel in found]
    names = _demangled([kernel.name for kernel in kernels])
    for kernel in kernels:
        kernel.name = names[kernel.name]
    return kernels


def has_ptx(library: Path = LIBRARY) -> bool:
    """Whether the library holds PTX, which the driver compiles for GPUs that came later."""
    return "ptx" in _run(find_tool("cuobjdump"), "-lptx", library)


def _processor_seconds(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def print_host_times() -> None:
    """The host's share of each op on this machine, for numbers of tensors: the call, its checks and its tables.

    It is measured in the emulated library (tests/cuda_emulation) with launches that do nothing, in processor time:
    other jobs on the machine hardly change that. The tensors are what an optimizer has: parameters that C++ holds,
    or lists of such with an owner in C++ (fsam_ext/segments.py), their gradients, and no_grad.
    """
    sys.path.insert(0, str(ROOT))
    import torch

    from bench import measure
    from fsam_ext import held, ops
    from tests import cuda_emulation
    from tests.cuda_problem import Problem

    os.environ["FSAM_EMULATION_LAUNCH"] = "0"
    backend = cuda_emulation.load()
    print(f"{'tensors':>15} " + " ".join(f"{op:>12}" for op in ops.NAMES if op not in ("update_ema", "restore")))
    for count, how in itertools.product((1, 100, 150, 1000, 10000), ("listed", "held")):
        problem = Problem(torch.float32, [64] * count)
        problem.params = [torch.nn.Parameter(param) for param in problem.params]
        for param, grad in zip(problem.params, problem.grads):
            param.grad = grad
        problem.grads = [param.grad for param in problem.params]
        with torch.no_grad():
            owners = [param.view_as(param) for param in problem.params]
        if how == "held":
            params, look = problem.params, held.look_at(problem.params, problem.offsets)
            problem.params, problem.grads = [], []
        calls = {
            "noise_norm": lambda problem=problem: problem.noise_norm(backend),
            "perturb": lambda problem=problem: problem.perturb(backend),
            "restore_sgd": lambda problem=problem: problem.sgd(backend),
            "restore_adam": lambda problem=problem: problem.adam(backend),
        }
        candidates = {name: (lambda call=call: {"step": _processor_seconds(call)}) for name, call in calls.items()}
        with torch.no_grad():
            rounds = measure.alternate(candidates, 3.0, max_rounds=1000)
        del owners
        found = [measure.quantiles(measure.values(rounds, name, "step")).median * 1e6 for name in calls]
        if how == "held":
            del params, look
        print(f"{count:8} {how:>6} " + " ".join(f"{time:9.1f} us" for time in found))


# NOTE [the model]
# A pass takes its bytes over 0.9 of the data sheet's bandwidth (what a copy reaches), and 3 microseconds a launch:
# to start, to fill the SMs and to drain them. The second stage of the norm sums five rows of slots in a block each,
# with 32 KiB in flight in 0.8 microseconds.
SHARE_OF_BANDWIDTH = 0.9
SECONDS_PER_LAUNCH = 3e-6
SUM_SLOTS_BANDWIDTH = 32768 / 0.8e-6


def print_model() -> None:
    """The predictions of docs/gpu-model.md."""
    # pass: values in the storage type and in the state's type that it moves for each parameter
    moved = {"noise_norm": (1, 1), "perturb": (4, 2), "restore": (2, 0), "restore_sgd": (3, 2), "restore_adam": (3, 4)}
    print("| pass | parameters | bytes each | " + " | ".join(GPUS[arch].name for arch in ("80", "90", "100")) + " |")
    print("|---|---|---|---|---|---|")
    for dtype, storage in (("fp32", 4), ("bf16", 2)):
        for op, (low, high) in moved.items():
            for label, numel in (("10M", 1e7), ("100M", 1e8), ("1B", 1e9), ("8B", 8e9)):
                nbytes = low * storage + high * 4
                times = []
                for arch in ("80", "90", "100"):
                    seconds = SECONDS_PER_LAUNCH + numel * nbytes / (SHARE_OF_BANDWIDTH * GPUS[arch].bandwidth)
                    if op == "noise_norm":
                        seconds += SECONDS_PER_LAUNCH + numel / 4096 * 4 / SUM_SLOTS_BANDWIDTH
                    times.append(f"{seconds * 1e6:,.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms")
                print(f"| {op}, {dtype} | {label} | {nbytes} | " + " | ".join(times) + " |")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("--host-time", action="store_true", help="measure the host's share of each op instead")
    parser.add_argument("--model", action="store_true", help="print the predicted times of docs/gpu-model.md instead")
    arguments = parser.parse_args()
    if arguments.model:
        return print_model()
    if arguments.host_time:
        return print_host_times()
    library = arguments.library
    if not library.exists():
        sys.exit(f"{library} does not exist: build it where nvcc is found, `make build`")
    if missing_tools():
        sys.exit(missing_tools())
    print(f"{library.name}: {library.stat().st_size / 1e6:.1f} MB, PTX: {'yes' if has_ptx(library) else 'no'}")
    print(f"{'sm':>4} {'regs':>4} {'stack':>5} {'spills':>6} {'threads/SM':>10} {'KB in flight':>12} "
          f"{'needed':>6}  {'128-bit':>7} {'other':>5}  kernel")  # fmt: skip
    for kernel in sorted(read_library(library), key=lambda k: (int(k.arch), k.name)):
        wide = sum(".128" in access for access in kernel.main_loop)
        line = f"{kernel.arch:>4} {kernel.registers:4} {kernel.stack:5} {kernel.spills:6} "
        if kernel.op in ("sum_slots", "count_steps"):
            line += " " * 32
        else:
            needed = GPUS[kernel.arch].bytes_in_flight_per_sm if kernel.arch in GPUS else float("nan")
            line += f"{kernel.threads_per_sm:10} {kernel.bytes_in_flight_per_sm / 1e3:12.0f} {needed / 1e3:6.0f}  "
        print(line + f"{wide:7} {len(kernel.main_loop) - wide:5}  {kernel.name}")


if __name__ == "__main__":
    main()
