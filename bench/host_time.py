"""The host's share of each op, without a GPU: ``python bench/cuda_check.py --host-time``."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable

OPS = ("noise_norm", "perturb", "restore_sgd", "restore_adam")


def _processor_seconds(call: Callable[[], None]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def print_host_times() -> None:
    """The host's share of each op on this machine, for numbers of tensors: the call, its checks and its tables.

    It is measured in the emulated library (tests/cuda_emulation) with launches that do nothing, in processor time:
    other jobs on the machine hardly change that. The tensors are what an optimizer has: parameters that C++ holds,
    or lists of such with an owner in C++ (fsam_ext/step/segments.py), their gradients, and no_grad.
    """
    import torch

    from bench import measure
    from fsam_ext.step import held
    from tests import cuda_emulation
    from tests.cuda_problem import Problem

    os.environ["FSAM_EMULATION_LAUNCH"] = "0"
    backend = cuda_emulation.load()
    print(f"{'tensors':>15} " + " ".join(f"{op:>12}" for op in ("look", *OPS)))
    for count, how in itertools.product((1, 100, 150, 1000, 10000), ("listed", "held")):
        problem = Problem(torch.float32, [64] * count)
        problem.params = [torch.nn.Parameter(param) for param in problem.params]
        for param, grad in zip(problem.params, problem.grads):
            param.grad = grad
        problem.grads = [param.grad for param in problem.params]
        with torch.no_grad():
            owners = [param.view_as(param) for param in problem.params]
        params = problem.params
        look = held.look_at(params, problem.offsets) if how == "held" else held.Listed(params)
        if isinstance(look, held.Held):
            problem.params, problem.grads = [], []
        calls = {
            "look": look.have_grads,  # of which the held ones' ops make use
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
        del params, look
        print(f"{count:8} {how:>6} " + " ".join(f"{time:9.1f} us" for time in found))
