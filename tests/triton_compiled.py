"""What Triton makes of our kernels for GPUs that are not here: registers, spills, shared memory, width of accesses.

`python -m tests.triton_compiled` calls the ops on GPUs that are not there (triton_gpu.py) and prints the table of
docs/triton.md; with `--json` it tells the facts that test_triton.py checks. It runs in a process of its own: under
TRITON_INTERPRET=1 nothing is compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton

from fsam_ext.backends import ops
from fsam_ext.backends.triton import kernels, launch, passes

from .triton_gpu import TARGETS, FakeDriver, activate, kernel_parameters

DTYPES = ("float64", "float32", "bfloat16", "float16")
NAMES = (*ops.NAMES, "sum_partials")
ASCENT = ("noise_norm", "perturb", "update_ema")  # whose m is the average

# What a kernel may be compiled for beside the plain case: no average or one in another dtype, masters (which an update
# may have adopt what others wrote), stochastic rounding, the sums that tell the effect of a perturbation, what is kept
# of gradients or reused, in the dtype of the state or in bfloat16, and the gradient's squared norm.
VARIANTS = {
    "noise_norm": ("none", "bfloat16", "int8"),
    "perturb": ("none", "bfloat16", "int8", "masters", "effect", "kept", "kept bfloat16"),
    "update_ema": ("bfloat16", "int8", "norm"),
    "dots": ("bfloat16",),
    "project": ("bfloat16",),
    "restore": ("masters",),
    "restore_sgd": ("masters", "adopts", "rounding", "reused", "reused bfloat16"),
    "restore_adam": ("masters", "adopts", "rounding", "reused", "reused bfloat16"),
}
OF_MASTERS = ("masters", "adopts")
OF_HALVES = (*OF_MASTERS, "rounding")  # only 16-bit parameters have these
ONE_TILE = ("noise_norm", "dots")  # take a chunk at once
SMALL = ("count_steps", "sum_partials")  # touch small tensors only, in the dtype of the state

# Tensors that a pass reads and writes at full length: w, g, the backup b; state m (the average or a momentum) and v;
# k is what is kept or reused.
READS = {
    "noise_norm": "gm",
    "perturb": "wgm",
    "update_ema": "gm",
    "dots": "gk",
    "project": "gk",
    "restore": "b",
    "restore_sgd": "bgm",
    "restore_adam": "bgmv",
}
WRITES = {
    "noise_norm": "",
    "perturb": "wbm",
    "update_ema": "m",
    "dots": "",
    "project": "k",
    "restore": "w",
    "restore_sgd": "wm",
    "restore_adam": "wmv",
}
# Masters are where the ascent starts from, once they have adopted w (and those that change are written one by one), and
# what the updates write.
READS_OF_MASTERS = {"perturb": "wbgm"}
WRITES_OF_MASTERS = {"perturb": "wm", "restore_sgd": "wbm", "restore_adam": "wbmv"}


def reads(name: str, variant: str) -> str:
    tensors = READS_OF_MASTERS.get(name, READS[name]) if variant in OF_MASTERS else READS.get(name, "")
    tensors += "w" if variant == "adopts" else "k" if variant.startswith("reused") else ""
    return tensors.replace("m", "") if variant == "none" else tensors


def writes(name: str, variant: str) -> str:
    tensors = WRITES_OF_MASTERS.get(name, WRITES[name]) if variant in OF_MASTERS else WRITES.get(name, "")
    tensors += "k" if variant.startswith("kept") else ""
    return tensors.replace("m", "") if variant == "none" else tensors


def tensor_dtypes(name: str, dtype: str, variant: str) -> dict[str, torch.dtype]:
    """The dtypes of w, g, b, m, v and k."""
    stored = getattr(torch, dtype)
    state = ops.compute_dtype(stored)
    average = getattr(torch, variant) if name in ASCENT and variant in ("bfloat16", "int8") else state
    backup = state if variant in OF_MASTERS else stored
    kept = torch.bfloat16 if variant.endswith("bfloat16") else state
    return {"w": stored, "g": stored, "b": backup, "m": average, "v": state, "k": kept}


def bytes_moved(op: str, dtype: str, variant: str) -> int:
    """What a pass reads and writes for each parameter."""
    dtypes = tensor_dtypes(op, dtype, variant)
    return sum(dtypes[tensor].itemsize for tensor in reads(op, variant) + writes(op, variant))


def arguments(op: str, dtype: str, variant: str, table: bool) -> tuple:
    """A call with an average, momentum and weight decay, of two rows or one; the first is one whole chunk."""
    types = tensor_dtypes(op, dtype, variant)
    state = types["v"]
    shapes = [(ops.CHUNK,), (64,)] if table else [(ops.CHUNK,)]
    params, grads = ([torch.zeros(shape, dtype=types["w"]) for shape in shapes] for _ in "wg")
    offsets = torch.tensor([0, ops.CHUNK][: len(shapes)])
    numel = ops.CHUNK + ops.QUANTIZED
    average = None if variant == "none" else torch.zeros(numel, dtype=types["m"])
    scale = torch.zeros(numel // ops.QUANTIZED) if variant == "int8" else None
    backup, first, second = (torch.zeros(numel, dtype=dtype) for dtype in (types["b"], state, state))
    partials, corrections = torch.zeros(2, ops.STATISTICS, dtype=state), torch.ones(len(shapes), 2, dtype=state)
    stats = torch.zeros(ops.STATISTICS, dtype=torch.float64)
    effect = torch.zeros(2, ops.EFFECT, dtype=state) if variant == "effect" else None
    rounding = torch.zeros(2, dtype=torch.int64) if variant == "rounding" else None
    forward = 1 if variant == "effect" else 0
    kept = torch.zeros(numel, dtype=types["k"])
    squares = torch.ones(2, dtype=torch.float64)
    reused = (kept, squares, 0.3, 1e-12) if variant.startswith("reused") else ()
    rows = (params, grads, offsets)
    adam = (0.1, None, 0.9, 0.999)
    return {
        "noise_norm": (*rows, average, scale, None, 0.9, 0.9, False, False, partials, stats),
        "perturb": (
            *(*rows, average, scale, backup, stats, None, 0.1, None, 0.9, 0.9, 0.0),
            *(False, False, True, forward, effect, None, kept if variant.startswith("kept") else None),
        ),
        "update_ema": (
            *(*rows, average, scale, stats, None, None, 0.9),
            *((None, partials, squares) if variant == "norm" else ()),
        ),
        "dots": (*rows, kept, None, partials, squares),
        "project": (*rows, kept, squares, stats, None, None, partials, torch.zeros(1, dtype=torch.float64)),
        "restore": (params, offsets, backup),
        "restore_sgd": (
            *(
                *rows,
                backup,
                first,
                stats,
                None,
                None,
                0.1,
                None,
                0.9,
                0.0,
                0.01,
                False,
                False,
                rounding,
                variant == "adopts",
                None,
                *reused,
            ),
        ),
        "count_steps": (torch.zeros(2), torch.arange(len(shapes)), corrections, stats, None, *adam),
        "restore_adam": (
            *(*rows, backup, first, second, corrections, stats, None, None, *adam, 1e-8, 0.01),
            *(False, False, rounding, variant == "adopts", None, *reused),
        ),
    }[op]


def compiled(name: str, dtype: str, variant: str, target: str, table: bool = True):
    """The kernel that a call of its op launches. ``variant`` is "" or one of VARIANTS."""
    activate(FakeDriver(TARGETS[target]))
    kernel = getattr(kernels, name)
    kernel.device_caches.clear()
    op = "noise_norm" if name == "sum_partials" else name
    getattr(passes, op)(*arguments(op, dtype, variant, table))
    (made,) = (made for made_for_target, *_ in kernel.device_caches.values() for made in made_for_target.values())
    return made


def vector_accesses(name: str, dtype: str, tensors: str, variant: str = "") -> int:
    """128-bit accesses that one thread needs for its elements of ``tensors`` in one tile, narrower ones left out."""
    torch_dtype = getattr(torch, dtype)
    elements = ops.CHUNK if name in ONE_TILE else launch.tile(torch_dtype)
    per_thread = elements // launch.threads(name, torch_dtype)
    dtypes = tensor_dtypes(name, dtype, variant)
    return sum(per_thread * dtypes[tensor].itemsize // 16 for tensor in tensors)


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _number(pattern: str, text: str) -> int:
    return int(re.search(pattern + r"\D*(\d+)", text)[1])


def nvidia_facts(kernel) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tools = triton.knobs.nvidia
        usage = subprocess.run([tools.cuobjdump.path, "-res-usage", file.name], text=True, capture_output=True)
        listing = subprocess.run([tools.nvdisasm.path, "-c", file.name], text=True, capture_output=True).stdout
    resources = usage.stdout + usage.stderr
    return {
        "registers": _number("REG:", resources),
        "spills": _number("STACK:", resources) + _number("LOCAL:", resources) + _count(r"\b(LDL|STL)\b", listing),
        "vector_loads": _count(r"\bLDG\.E[.\w]*\.128\b", listing),
        "vector_stores": _count(r"\bSTG\.E[.\w]*\.128\b", listing),
        "fused": _count(r"\bfma\.rn\.f", kernel.asm["ptx"]),
        "approximate": _count(r"\b(div\.full|div\.approx|sqrt\.approx|rsqrt)", kernel.asm["ptx"]),
    }


def amd_facts(kernel) -> dict[str, int]:
    listing, ir = kernel.asm["amdgcn"], kernel.asm["llir"]
    # Scalar registers that overflow go to lanes of a vector register, not to memory: `.sgpr_spill_count` is no spill.
    names = ("vgpr_spill_count", "private_segment_fixed_size")
    return {
        "registers": _number(r"\.vgpr_count:", listing),
        "spills": sum(_number(rf"\.{name}:", listing) for name in names),
        "vector_loads": _count(r"\b(global|buffer)_load_(dwordx4|b128)\b", listing),
        "vector_stores": _count(r"\b(global|buffer)_store_(dwordx4|b128)\b", listing),
        # Without such a flag LLVM neither fuses nor approximates; its explicit fma round roots and quotients.
        "fused": _count(r"\b(contract|fast)\b|llvm\.fmuladd", ir),
        "approximate": _count(r"\b(afn|arcp|fast)\b", ir),
    }


def summed_layouts(layouts: str) -> set[str]:
    """The register layouts of what is reduced."""
    return set(re.findall(r"#blocked\d*", " ".join(re.findall(r"(?m)^\s*\}\) : \((.*)\) ->", layouts))))


def facts(name: str, dtype: str, variant: str, target: str, table: bool = True) -> dict[str, Any]:
    kernel = compiled(name, dtype, variant, target, table)
    layouts = kernel.asm["ttgir"]
    return {
        **(nvidia_facts if "cubin" in kernel.asm else amd_facts)(kernel),
        "shared": kernel.metadata.shared,
        "parameters": kernel_parameters(kernel),
        "passed": sum(kind != "constexpr" for kind in kernel.src.signature.values()),
        "summed_layouts": len(summed_layouts(layouts)),
        "register_layouts": _count(r"(?m)^#blocked\w* = ", layouts) + _count("convert_layout", layouts),
    }


def rows() -> Iterator[tuple[str, str, str]]:
    """Kernels, dtypes and variants of the table; float16 differs from bfloat16 by its conversions only."""
    for name in NAMES:
        yield from ((name, dtype, "") for dtype in (DTYPES[:2] if name in SMALL else DTYPES))
        for variant in VARIANTS.get(name, ()):
            yield from (
                (name, dtype, variant) for dtype in DTYPES[1:3] if dtype != "float32" or variant not in OF_HALVES
            )


def main() -> None:
    if "--json" in sys.argv:
        wanted = json.load(sys.stdin)
        print(json.dumps([facts(*case) for case in wanted]))
        return
    print(f"triton {triton.__version__}: registers of a thread on each target")
    print("| kernel | dtype | variant | threads | 128-bit loads, stores | shared memory | spills |", end=" ")
    print(*(f"{target} |" for target in TARGETS))
    print("|---|---|---|---|---|---|---|" + "---|" * len(TARGETS))
    for name, dtype, variant in rows():
        found = [facts(name, dtype, variant, target) for target in TARGETS]
        shared, spills = (max(fact[key] for fact in found) for key in ("shared", "spills"))
        vectors = [vector_accesses(name, dtype, tensors(name, variant), variant) for tensors in (reads, writes)]
        print(
            f"| {name} | {dtype} | {variant} | {launch.threads(name, getattr(torch, dtype))} |",
            f"{vectors[0]}, {vectors[1]} | {shared} B | {spills} |",
            *(f"{fact['registers']} |" for fact in found),
            flush=True,
        )


if __name__ == "__main__":
    main()
