"""The CUDA backend without a GPU: its source compiled by the host compiler against an emulation of CUDA.

``load()`` builds what is not up to date under ``build/`` and returns the ops, which then serve CPU tensors.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NAMESPACE = "fsam_ext_emulated"
PLAIN = "-O0"  # what optimising saves the tests is half of what it costs the compiler
# Checks that are calls instead of code in place cost the compiler a fifth less.
SANITIZED = (
    "-O0 -g1 -fsanitize=address,alignment -fno-sanitize-recover=alignment -fno-omit-frame-pointer "
    "--param asan-instrumentation-with-call-threshold=0"
)


@functools.cache
def _setup() -> ModuleType:
    """setup.py as a module: how this project finds its tools and writes build files."""
    spec = importlib.util.spec_from_file_location("fsam_ext_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(output: str, sources: list[str], link: str, sanitize: bool) -> Path:
    setup = _setup()
    torch, compiler = setup.Torch.find(), setup.find_compiler()
    directory = Path("build/cuda_emulation" + ("_sanitized" if sanitize else "")) / Path(output).stem
    mode = SANITIZED if sanitize else PLAIN
    flags = (
        f"-std=c++20 {mode} {setup.NUMERICS} -Wall -Wextra -Wno-unknown-pragmas "
        f"-fno-strict-aliasing -fPIC -fvisibility=hidden -pthread {setup.TARGET} -DCUDA_EMULATED "
        f"-DFSAM_NAMESPACE={NAMESPACE} -DFSAM_BLOCKS_TO_SPARE=4 "
        f"-I{setup.quote(HERE / 'include')} -isystem {setup.quote(torch.include)}"
    )
    ninja = setup.NinjaFile(ROOT, directory)
    ninja.rule("cxx", f"{compiler} {flags} -MD -MF $out.d -x c++ -c $in -o $out", depfile=True)
    ninja.rule("link", f"{compiler} -pthread {mode} -o $out $in {link.format(torch=setup.quote(torch.lib))}")
    objects = [ninja.build(f"{source}.o", "cxx", [source]) for source in sources]
    built = ninja.build(output, "link", objects)
    with ninja.written() as run:  # other test processes may want the same
        result = run(setup.find_ninja(), "-j2", capture_output=True)
    if result.returncode != 0:
        raise RuntimeError(f"{output} does not build:\n{result.stdout}{result.stderr}")
    return ROOT / built


def build(sanitize: bool = False) -> Path:
    """Builds the emulated CUDA library and returns its path; with ``sanitize``, for AddressSanitizer and alignment."""
    sources = ["csrc/schema.cpp", *_setup().cuda_sources()]
    link = "-shared -L{torch} -Wl,--no-as-needed " + " ".join(_setup().LIBRARIES)
    return _build("fsam_ext_emulated.so", sources, link, sanitize)


def build_program(name: str, sanitize: bool = False) -> Path:
    """Builds a program of this folder (planted_bugs, division) and returns its path."""
    return _build(name, [f"tests/cuda_emulation/{name}.cu"], "", sanitize)


@functools.cache
def load() -> SimpleNamespace:
    """Returns the ops of the emulated CUDA backend: a backend as ``fsam_ext.backends`` has them.

    The environment variable ``FSAM_EMULATED_LIBRARY`` names a library that is built already: a sanitized one, say.
    """
    import torch

    from fsam_ext.backends import ops

    torch.ops.load_library(os.environ.get("FSAM_EMULATED_LIBRARY") or build())
    ops.register_fakes(NAMESPACE)
    packets = getattr(torch.ops, NAMESPACE)
    return SimpleNamespace(**{name: getattr(packets, name).default for name in ops.NAMES}, takes_held=True)
