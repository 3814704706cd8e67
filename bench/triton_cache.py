"""Triton's compile cache for a GPU, made on a machine that has none, so that no minute of the GPU's is spent compiling.

`python bench/triton_cache.py make FILE` compiles what the conformance suite and optimizer steps launch on sm_90,
through Triton's own launch path (tests/triton_gpu.py), with its C launchers. `unpack FILE DIRECTORY` lays it
out where TRITON_CACHE_DIR=DIRECTORY will find it, and says what differs between the machines. `check DIRECTORY`
launches the suite's kernels on no GPU and counts those that were found. docs/triton.md says what makes it miss.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TARGET = "sm_90"
MANIFEST = "made_with.json"
# Triton writes absolute paths into its cache.
HERE = "@TRITON_CACHE_DIR@"


def made_with(target: str = TARGET) -> dict[str, str]:
    """What the keys of the cache depend on, here."""
    os.environ.setdefault("TRITON_INTERPRET", "0")
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.cache import triton_key

    sources = sorted((ROOT / "fsam_ext" / "backends" / "triton" / "kernels").glob("*.py"))
    return {
        "Triton, with its compiled part": hashlib.sha256(triton_key().encode()).hexdigest(),
        "ptxas": make_backend(GPUTarget("cuda", int(target.removeprefix("sm_")), 32)).hash(),
        "environment variables": str(sorted(get_cache_invalidating_env_vars().items())),
        "the kernels' source": hashlib.sha256(b"".join(map(Path.read_bytes, sources))).hexdigest(),
        "Python's extension modules": str(sysconfig.get_config_var("EXT_SUFFIX")),
    }


def fill(folder: Path, suite: Iterable[str] | None = None) -> None:
    """Compiles into ``folder``, in a process of its own, whatever ``suite`` launches (None: all of it, and steps)."""
    os.environ["TRITON_CACHE_DIR"], os.environ["TRITON_STORE_BINARY_ONLY"] = str(folder), "1"
    from tests import triton_gpu, triton_launches, triton_steps

    found = triton_launches.record(suite or triton_launches.SUITE)
    with tempfile.TemporaryDirectory() as libraries:
        libcuda = triton_gpu.Libcuda(Path(libraries))
        triton_gpu.activate(triton_gpu.cuda_driver(triton_gpu.TARGETS[TARGET], libcuda, checks=False))
        for one in found:
            one.launch()
        if suite is None:
            triton_steps.run_all()


def make(file: Path, suite: Iterable[str] | None = None) -> None:
    """Writes the cache as a .tar.xz."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        chosen = [] if suite is None else ["--suite", *suite]
        subprocess.run([sys.executable, __file__, "fill", folder, *chosen], check=True, cwd=ROOT)
        for group in cache.glob("*/__grp__*"):
            group.write_text(group.read_text().replace(str(cache), HERE))
        (cache / MANIFEST).write_text(json.dumps(made_with(), indent=1))
        with tarfile.open(file, "w:xz") as archive:
            for path in sorted(path for path in cache.rglob("*") if path.is_file()):
                archive.add(path, path.relative_to(cache))


def unpack(file: Path, folder: Path) -> list[str]:
    """Lays the cache out in ``folder``; returns what differs here from where it was made, for which it would miss."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    for group in folder.glob("*/__grp__*"):
        group.write_text(group.read_text().replace(HERE, str(folder.resolve())))
    there, here = json.loads((folder / MANIFEST).read_text()), made_with()
    return [name for name, value in there.items() if here[name] != value]


def check(folder: Path, suite: Iterable[str] | None = None) -> tuple[int, int]:
    """How many kernels of ``suite`` come from the cache in ``folder``, and how many had to be compiled."""
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    import triton

    from tests import triton_gpu, triton_launches

    found, hits = triton_launches.record(suite or triton_launches.SUITE), []
    triton.knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
    triton_gpu.activate(triton_gpu.FakeDriver(triton_gpu.TARGETS[TARGET]))
    for one in found:
        one.launch()
    return sum(hits), len(hits) - sum(hits)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, arguments in (
        ("make", ["file"]),
        ("unpack", ["file", "folder"]),
        ("check", ["folder"]),
        ("fill", ["folder"]),
    ):
        command = commands.add_parser(name)
        for argument in arguments:
            command.add_argument(argument, type=Path)
        if name != "unpack":
            command.add_argument("--suite", nargs="+", help="files of tests, in the place of the conformance suite")
    wanted = parser.parse_args()
    if wanted.command == "make":
        make(wanted.file, wanted.suite)
        print(f"{wanted.file}: {wanted.file.stat().st_size / 1e6:.1f} MB")
    elif wanted.command == "fill":
        fill(wanted.folder, wanted.suite)
    elif wanted.command == "check":
        found, compiled = check(wanted.folder, wanted.suite)
        print(f"{found} kernels from the cache, {compiled} compiled")
    else:
        different = unpack(wanted.file, wanted.folder)
        print(f"Use it with TRITON_CACHE_DIR={wanted.folder.resolve()}")
        if different:
            print(f"It was made with other things than are here, so Triton will compile anew: {', '.join(different)}")


if __name__ == "__main__":
    main()
