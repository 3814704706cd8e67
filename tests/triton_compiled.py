"""What Triton makes of our kernels for GPUs that are not here: registers, spills, shared memory, width of accesses.

`python -m tests.triton_compiled` compiles ahead of time and prints the table of docs/triton.md; with `--json` it tells
the facts that test_triton.py checks. It runs in a process of its own: under TRITON_INTERPRET=1 nothing is compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fsam_ext import ops
from fsam_ext.backends import triton as backend
from fsam_ext.backends import triton_kernels as kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
DTYPES = ("float64", "float32", "bfloat16", "float16")
NAMES_IN_TRITON = {
    "float64": "fp64",
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "int64": "i64",
    "int32": "i32",
    "int8": "i8",
}
NAMES = (*ops.NAMES, "sum_partials")
ASCENT = ("noise_norm", "perturb", "update_ema")  # whose m is the average

# What a kernel may be compiled for beside the plain case: no average or one in another dtype, masters, stochastic
# rounding, and the sums that tell the effect of a perturbation.
VARIANTS = {
    "noise_norm": ("none", "bfloat16", "int8"),
    "perturb": ("none", "bfloat16", "int8", "masters", "effect"),
    "update_ema": ("bfloat16", "int8"),
    "restore": ("masters",),
    "restore_sgd": ("masters", "rounding"),
    "restore_adam": ("masters", "rounding"),
    "sum_partials": (),
}
OF_HALVES = ("masters", "rounding")  # only 16-bit parameters have these

# Tensors that a pass reads and writes at full length: w, g, the backup b; state m (the average or a momentum) and v.
READS = {
    "noise_norm": "gm",
    "perturb": "wgm",
    "update_ema": "gm",
    "restore": "b",
    "restore_sgd": "bgm",
    "restore_adam": "bgmv",
    "sum_partials": "",
}
WRITES = {
    "noise_norm": "",
    "perturb": "wbm",
    "update_ema": "m",
    "restore": "w",
    "restore_sgd": "wm",
    "restore_adam": "wmv",
    "sum_partials": "",
}
# Masters are where the ascent starts from, and what the updates write.
READS_OF_MASTERS = {"perturb": "bgm"}
WRITES_OF_MASTERS = {"perturb": "wm", "restore_sgd": "wbm", "restore_adam": "wbmv"}


def reads(name: str, variant: str) -> str:
    tensors = READS_OF_MASTERS.get(name, READS[name]) if variant == "masters" else READS[name]
    return tensors.replace("m", "") if variant == "none" else tensors


def writes(name: str, variant: str) -> str:
    tensors = WRITES_OF_MASTERS.get(name, WRITES[name]) if variant == "masters" else WRITES[name]
    return tensors.replace("m", "") if variant == "none" else tensors


def tensor_dtypes(name: str, dtype: str, variant: str) -> dict[str, torch.dtype]:
    """The dtypes of w, g, b, m and v."""
    stored = getattr(torch, dtype)
    state = ops.compute_dtype(stored)
    average = getattr(torch, variant) if name in ASCENT and variant in ("bfloat16", "int8") else state
    return {"w": stored, "g": stored, "b": state if variant == "masters" else stored, "m": average, "v": state}


def compiled(name: str, dtype: str, variant: str, target: GPUTarget, table: bool = True):
    """The kernel as a GPU would get it: with an average, momentum and weight decay, the table or one row.

    ``variant`` is "" or one of VARIANTS.
    """
    torch_dtype = getattr(torch, dtype)
    types = {key: str(of).removeprefix("torch.") for key, of in tensor_dtypes(name, dtype, variant).items()}
    state = str(ops.compute_dtype(torch_dtype)).removeprefix("torch.")
    average = types["m"] if name in ASCENT else state
    constants = {
        **{letter: getattr(tl, of) for letter, of in zip("TSMB", (dtype, state, average, types["b"]), strict=True)},
        "BLOCK": backend.SUM_BLOCK if name == "sum_partials" else backend.tile(torch_dtype),
        **dict.fromkeys(("ADAPTIVE", "UPDATED", "NESTEROV", "MAXIMIZE", "DECOUPLED"), False),
        **dict.fromkeys(("DECAY", "FEEDS"), True),
        "FORWARD": 1 if variant == "effect" else 0,
        **dict.fromkeys(("params", "grads") if table else ("table", "rows_of_chunks")),
        **dict.fromkeys(("grad_scale", "found_inf", "lr_tensor", "rho_tensor")),
        **{
            argument: None
            for argument, needs in (("ema_scale", "int8"), ("rounding", "rounding"), ("effect", "effect"))
            if variant != needs
        },
    }
    if name == "restore":
        constants["grads"] = None
    if variant == "none":
        constants |= {"ema": None, "M": None}
    pointers = {
        **dict.fromkeys(("params", "grads"), dtype),
        "backup": types["b"],
        "ema": average,
        **dict.fromkeys(("momentum_buffer", "exp_avg", "exp_avg_sq", "partials", "effect"), state),
        "ema_scale": "float32",
        "steps": "float32",
        "stats": "float64",
        "table": "int64",
        "rounding": "int64",
        "rows_of_chunks": "int32",
    }
    kernel = getattr(kernels, name)
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], constexprs[(i,)] = "constexpr", constants[argument]
        elif argument in pointers:
            signature[argument], attributes[(i,)] = f"*{NAMES_IN_TRITON[pointers[argument]]}", [["tt.divisibility", 16]]
        else:
            signature[argument] = "i64" if argument in ("numel", "offset", "chunks") else "fp64"
    options = {"num_warps": backend.threads(name, torch_dtype) // target.warp_size, "enable_fp_fusion": False}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def vector_accesses(name: str, dtype: str, tensors: str, variant: str = "") -> int:
    """128-bit accesses that one thread needs for its elements of ``tensors`` in one tile, narrower ones left out."""
    torch_dtype = getattr(torch, dtype)
    elements = ops.CHUNK if name == "noise_norm" else backend.tile(torch_dtype)
    per_thread = elements // backend.threads(name, torch_dtype)
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


def facts(name: str, dtype: str, variant: str, target: str, table: bool = True) -> dict[str, int]:
    kernel = compiled(name, dtype, variant, TARGETS[target], table)
    layouts = kernel.asm["ttgir"]
    return {
        **(nvidia_facts if "cubin" in kernel.asm else amd_facts)(kernel),
        "shared": kernel.metadata.shared,
        "register_layouts": _count(r"(?m)^#blocked\w* = ", layouts) + _count("convert_layout", layouts),
    }


def rows() -> Iterator[tuple[str, str, str]]:
    """Kernels, dtypes and variants of the table; float16 differs from bfloat16 by its conversions only."""
    for name in NAMES:
        yield from ((name, dtype, "") for dtype in DTYPES)
        for variant in VARIANTS[name]:
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
            f"| {name} | {dtype} | {variant} | {backend.threads(name, getattr(torch, dtype))} |",
            f"{vectors[0]}, {vectors[1]} | {shared} B | {spills} |",
            *(f"{fact['registers']} |" for fact in found),
            flush=True,
        )


if __name__ == "__main__":
    main()
