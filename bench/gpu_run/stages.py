"""What is run on a GPU, in the order of its worth, each stage with a limit of its own.

NOTE [the order of the stages]
A run may end at any moment, so what would be missed most comes first: that both backends run at all and give the CPU's
bits, the bandwidth of each pass, whole steps beside the other implementations, what users do on a GPU, whole training
steps. What the emulation, the interpreter and the disassembly have said much about already comes last: all of the
conformance suite, the counters, the sanitizers.

NOTE [a dry run]
Without a GPU the same stages run with the same code on CPU tensors, to show that nothing in them is met for the first
time on a GPU: the CPU's kernels stand in for CUDA's, Triton's interpreter for its compiler, and bench/gpu_run/stubs for
NVIDIA's tools. What needs a device by its nature (the tests of graphs and streams) is collected and not run.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu_run import figures
from bench.gpu_run.tools import find

ROOT = Path(__file__).resolve().parents[2]
STUBS = Path(__file__).parent / "stubs"
# Kernels that bench/triton_cache.py has compiled on another machine, and where they are unpacked.
TRITON_ARCHIVE = ROOT / "build/triton-cache.tar.xz"
TRITON_CACHE = ROOT / "build/triton-cache"
MOST_WORKERS = 12
# Of whole optimizer steps, in the order of their worth; our package takes part always.
PROVIDERS = ("official", "base", "foreach", "fsam_ext flat", "fsam_ext triton", "compiled", "pytorch_optimizer")


class Missing(Exception):
    """What a stage needs and this machine has not; the message says what."""


@dataclass(frozen=True)
class Setting:
    """Where a run writes, and whether it is dry (NOTE [a dry run])."""

    out: Path
    dry: bool = False

    @property
    def device(self) -> str:
        """What the stages' tensors are on."""
        return "cpu" if self.dry else "cuda"

    @property
    def rows(self) -> Path:
        """The file of all figures."""
        return self.out / "rows.csv"

    @property
    def environment(self) -> dict[str, str]:
        """What every stage sees."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        found = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
        if self.dry:
            tools = f"{STUBS}{os.pathsep}{os.environ['PATH']}"
            found |= {"PATH": tools, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        else:
            found["TRITON_CACHE_DIR"] = str(TRITON_CACHE)
        return found


@dataclass(frozen=True)
class Stage:
    """One line of the table.

    Attributes:
        limit: seconds, of which a stage gets less where less is left.
        command: from the setting and the seconds that it gets to what is run, from the root.
        figure: from the run's rows and the stage's output to the one figure that matters.
        backend: without it the stage makes no sense.
    """

    name: str
    limit: float
    command: Callable[[Setting, float], list[str]]
    figure: Callable[[figures.Rows, str], str]
    backend: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def _module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", name, *map(str, arguments)]


def _facts(setting: Setting, seconds: float) -> list[str]:
    return _module("bench.gpu_run.facts", "--device", setting.device, "--out", setting.out / "facts.json")


def _pytest(*arguments: str, parallel: bool = False) -> list[str]:
    """pytest that says where it hangs; in several processes and with a limit for each test where plugins allow it."""
    found = ["-q", "-p", "no:cacheprovider", "--tb=short", "--maxfail=12", "-o", "faulthandler_timeout=40"]
    if importlib.util.find_spec("pytest_timeout"):
        found += ["--timeout", "60"]
    if importlib.util.find_spec("xdist") and parallel:
        found += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1))]
    return _module("pytest", *found, *arguments)


def _smoke(tests: str) -> Callable[[Setting, float], list[str]]:
    def command(setting: Setting, seconds: float) -> list[str]:
        return _pytest(tests, "-m", "gpu and not large", *(["--collect-only"] if setting.dry else []))

    return command


def _triton_cache(setting: Setting, seconds: float) -> list[str]:
    if not TRITON_ARCHIVE.exists():
        raise Missing(f"no {TRITON_ARCHIVE.relative_to(ROOT)}: Triton compiles here")
    return [sys.executable, str(ROOT / "bench/triton_cache.py"), "unpack", str(TRITON_ARCHIVE), str(TRITON_CACHE)]


def _training_tests(setting: Setting, seconds: float) -> list[str]:
    # The CPU's share of this file is in `make test`; a few of it show here that the file can be run on its own.
    chosen = ["-m", "not gpu", "-k", "channels_last or moved"] if setting.dry else ["-m", "gpu"]
    return _pytest("tests/test_gpu_training.py", *chosen)


def _bandwidth(backend: str) -> Callable[[Setting, float], list[str]]:
    def command(setting: Setting, seconds: float) -> list[str]:
        measured = 0.1 if setting.dry else 0.6 * seconds  # the rest makes the tensors and runs each pass a first time
        arguments = ("--backend", backend, "--device", setting.device, "--seconds", measured, "--out", setting.rows)
        return _module("bench.gpu_run.passes", *arguments)

    return command


def _bench(setting: Setting, seconds: float, workloads: list[str], *more: str) -> list[str]:
    """bench/run.py, which ends by itself before its time is up."""
    minutes = f"{max(seconds - 15, 0.6 * seconds) / 60:.3f}"
    command = [sys.executable, str(ROOT / "bench/run.py"), "--workloads", *workloads, "--minutes", minutes]
    command += ["--no-plots", "--out", str(setting.rows)]
    return [*command, *more, *(("--tiny", "--seconds", "0.02", "--compile") if setting.dry else ())]


def _steps(setting: Setting, seconds: float) -> list[str]:
    if setting.dry:
        return _bench(setting, seconds, ["gpt2"], "--dtypes", "fp32", "--bases", "sgd", "--providers", *PROVIDERS[:3])
    which = ["--dtypes", "fp32", "--bases", "sgd", "adamw", "--providers", *PROVIDERS]
    return _bench(setting, seconds, ["gpt2", "resnet18", "one_64m", "scale_1e07"], *which, "--seconds", "2",
                  "--compile", "resnet18")  # fmt: skip


def _training_steps(setting: Setting, seconds: float) -> list[str]:
    if setting.dry:
        return _bench(setting, seconds, ["train_gpt2"], "--providers", "plain", *PROVIDERS[:2])
    return _bench(setting, seconds, ["train_gpt2", "train_resnet50"], "--seconds", "8", "--compile", "train_gpt2")


def _conformance(backend: str) -> Callable[[Setting, float], list[str]]:
    chosen = {"cuda": "cuda and not emulated", "triton": "triton and not compiled_code"}[backend]
    names = ("conformance", "mixed_precision", "count_steps", "reuse_ops", "reuse_updates")
    files = [f"tests/test_{name}.py" for name in names]
    files += ["tests/test_triton.py"] if backend == "triton" else []
    dry = f"{'cpu' if backend == 'cuda' else backend} and edges_of_the_range"

    def command(setting: Setting, seconds: float) -> list[str]:
        if setting.dry:  # one of the two shows that tests may be shared, which costs more than these do
            return _pytest("tests/test_mixed_precision.py", "-k", dry, parallel=backend == "triton")
        return _pytest(*files, "-m", "not large", "-k", chosen, parallel=True)

    return command


def _ncu(backend: str) -> Callable[[Setting, float], list[str]]:
    def command(setting: Setting, seconds: float) -> list[str]:
        return _module("bench.gpu_run.ncu", "--backend", backend, "--device", setting.device, "--out", setting.out)

    return command


def _sanitizer(tool: str) -> Callable[[Setting, float], list[str]]:
    def command(setting: Setting, seconds: float) -> list[str]:
        path = find("compute-sanitizer", setting.environment.get("PATH"))
        if path is None:
            raise Missing("compute-sanitizer was not found: install the CUDA toolkit's, or add it to PATH")
        tests = _pytest("tests/test_cuda_gpu.py", "-m", "gpu", "-k", "(SameBitsAsCpu or kept_and_reused) and bfloat16")
        return [
            path, "--tool", tool, "--kernel-name", "kernel_substring=fsam", "--error-exitcode", "9",
            *tests, *(["--collect-only"] if setting.dry else []),
        ]  # fmt: skip

    return command


# See NOTE [the order of the stages]. A sanitizer sees each tensor's bounds only where it has memory of its own.
_ALONE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
STAGES = (
    Stage("facts", 60, _facts, figures.facts),
    Stage("smoke cuda", 60, _smoke("tests/test_cuda_gpu.py"), figures.tests, "cuda"),
    Stage("triton cache", 30, _triton_cache, figures.last_line, "triton"),
    Stage("smoke triton", 40, _smoke("tests/test_triton.py"), figures.tests, "triton"),
    Stage("bandwidth cuda", 50, _bandwidth("cuda"), figures.bandwidth("cuda"), "cuda"),
    Stage("steps", 120, _steps, figures.steps),
    Stage("training tests", 70, _training_tests, figures.tests),
    Stage("training steps", 105, _training_steps, figures.training_steps),
    Stage("bandwidth triton", 40, _bandwidth("triton"), figures.bandwidth("triton"), "triton"),
    Stage("conformance cuda", 75, _conformance("cuda"), figures.tests, "cuda"),
    Stage("ncu cuda", 40, _ncu("cuda"), figures.ncu("cuda"), "cuda"),
    Stage("memcheck", 50, _sanitizer("memcheck"), figures.sanitizer, "cuda", _ALONE),
    Stage("conformance triton", 75, _conformance("triton"), figures.tests, "triton"),
    Stage("racecheck", 50, _sanitizer("racecheck"), figures.sanitizer, "cuda", _ALONE),
    Stage("ncu triton", 40, _ncu("triton"), figures.ncu("triton"), "triton"),
)
