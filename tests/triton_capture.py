"""What Triton's kernels do while a graph is captured, on a GPU that is not there: `python -m tests.triton_capture`.

Prints, as JSON, what each call came to: the names of the kernels launched, or the error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
import triton.language as tl

from fsam_ext.backends.triton import NAMESPACE

from . import triton_gpu


@triton.jit
def of_a_user(x, VALUE: tl.constexpr):
    tl.store(x, VALUE)


def main() -> None:
    """Makes calls inside and outside of a capture."""
    triton_gpu.serve_cpu_tensors()
    gpu = triton_gpu.activate(triton_gpu.FakeDriver(triton_gpu.TARGETS["sm_90"]))
    restore = getattr(torch.ops, NAMESPACE).restore.default
    offsets = torch.zeros(1, dtype=torch.int64)

    def restored(dtype: torch.dtype) -> None:
        restore([torch.randn(100).to(dtype)], offsets, torch.randn(128).to(dtype))

    def outcome(call: Callable[[], None], capturing: bool) -> str | list[str]:
        torch.cpu.is_current_stream_capturing = lambda: capturing
        gpu.launched.clear()
        try:
            call()
        except RuntimeError as error:
            assert not gpu.launched
            return str(error)
        return [launched.kernel for launched in gpu.launched]

    def mixed() -> None:
        of_a_user[(1,)](torch.zeros(1), VALUE=1)
        restored(torch.float32)

    calls = {
        "first, captured": (lambda: restored(torch.float32), True),
        "first": (lambda: restored(torch.float32), False),
        "second, captured": (lambda: restored(torch.float32), True),
        "another dtype, captured": (lambda: restored(torch.bfloat16), True),
        "a user's kernel beside it, captured": (mixed, True),
    }
    print(json.dumps({name: outcome(*call) for name, call in calls.items()}))
    assert triton.knobs.runtime.jit_cache_hook is None


if __name__ == "__main__":
    main()
