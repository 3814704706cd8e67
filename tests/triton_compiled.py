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

import torch
import triton
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
DTYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
NAMES = (*ops.NAMES, "sum_partials")

# Tensors that a pass reads and writes at full length: of the parameters' dtype, and of the state's.
READS = {"noise_norm": "gm", "perturb": "wgm", "restore": "b", "restore_sgd": "bgm", "restore_adam": "bgmv"}
WRITES = {"noise_norm": "", "perturb": "wbm", "restore": "w", "restore_sgd": "wm", "restore_adam": "wmv"}


def compiled(name: str, dtype: str, target: GPUTarget, table: bool = True):
    """The kernel as a GPU would get it: with an average, momentum and weight decay, the table or one row."""
    stored = DTYPES[dtype]
    torch_dtype = getattr(torch, dtype)
    state_dtype = ops.compute_dtype(torch_dtype)
    state = DTYPES[str(state_dtype).removeprefix("torch.")]
    constants = {
        "T": backend._TRITON_DTYPES[torch_dtype],
        "S": backend._TRITON_DTYPES[state_dtype],
        "BLOCK": backend.SUM_BLOCK if name == "sum_partials" else backend.tile(torch_dtype),
        **dict.fromkeys(("ADAPTIVE", "UPDATED", "NESTEROV", "MAXIMIZE", "DECOUPLED"), False),
        "DECAY": True,
        **dict.fromkeys(("params", "grads") if table else ("table", "rows_of_chunks")),
        **dict.fromkeys(("grad_scale", "found_inf", "lr_tensor", "rho_tensor")),
    }
    if name == "restore":
        constants["grads"] = None
    pointers = {
        **dict.fromkeys(("params", "grads", "backup"), f"*{stored}"),
        **dict.fromkeys(("ema", "momentum_buffer", "exp_avg", "exp_avg_sq", "partials"), f"*{state}"),
        "stats": "*fp64",
        "steps": "*fp32",
        "table": "*i64",
        "rows_of_chunks": "*i32",
    }
    kernel = getattr(kernels, name)
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], constexprs[(i,)] = "constexpr", constants[argument]
        elif argument in pointers:
            signature[argument], attributes[(i,)] = pointers[argument], [["tt.divisibility", 16]]
        else:
            signature[argument] = "i64" if argument in ("numel", "offset", "chunks") else "fp64"
    options = {"num_warps": backend.threads(name, torch_dtype) // target.warp_size, "enable_fp_fusion": False}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def vector_accesses(name: str, dtype: str, tensors: str) -> int:
    """128-bit accesses that one thread needs for its elements of `tensors` in one tile."""
    torch_dtype = getattr(torch, dtype)
    elements = ops.CHUNK if name == "noise_norm" else backend.tile(torch_dtype)
    size = {"m": ops.compute_dtype(torch_dtype).itemsize, "v": ops.compute_dtype(torch_dtype).itemsize}
    per_thread = elements // backend.threads(name, torch_dtype)
    return sum(per_thread * size.get(tensor, torch_dtype.itemsize) // 16 for tensor in tensors)


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


def facts(name: str, dtype: str, target: str, table: bool = True) -> dict[str, int]:
    kernel = compiled(name, dtype, TARGETS[target], table)
    layouts = kernel.asm["ttgir"]
    return {
        **(nvidia_facts if "cubin" in kernel.asm else amd_facts)(kernel),
        "shared": kernel.metadata.shared,
        "register_layouts": _count(r"(?m)^#blocked\w* = ", layouts) + _count("convert_layout", layouts),
    }


def main() -> None:
    if "--json" in sys.argv:
        wanted = json.load(sys.stdin)
        print(json.dumps([facts(*case) for case in wanted]))
        return
    print(f"triton {triton.__version__}: registers of a thread on each target")
    print("| kernel | dtype | threads | 128-bit loads, stores | shared memory | spills |", *(f"{t} |" for t in TARGETS))
    print("|---|---|---|---|---|---|" + "---|" * len(TARGETS))
    for name in NAMES:
        for dtype in DTYPES:
            found = [facts(name, dtype, target) for target in TARGETS]
            shared, spills = (max(fact[key] for fact in found) for key in ("shared", "spills"))
            vectors = [vector_accesses(name, dtype, table.get(name, "")) for table in (READS, WRITES)]
            print(
                f"| {name} | {dtype} | {backend.threads(name, getattr(torch, dtype))} |",
                f"{vectors[0]}, {vectors[1]} | {shared} B | {spills} |",
                *(f"{fact['registers']} |" for fact in found),
                flush=True,
            )


if __name__ == "__main__":
    main()
