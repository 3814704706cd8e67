"""Which optimizers serve as ``base_optimizer``: ``python bench/bases.py`` tries every class and writes docs/bases.md.

Each class is tried as its users would: alone, and within FriendlySAM, on a small network with the same data.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import importlib
import io
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from fsam_ext import FriendlySAM

STEPS, HALF = 20, 10
Groups = Callable[[nn.Module], Any]


def all_params(model: nn.Module) -> Any:
    """All in one group, as for most optimizers."""
    return list(model.parameters())


def matrices(model: nn.Module) -> Any:
    """The matrices alone, for an optimizer that takes no others; the rest is not trained."""
    return [param for param in model.parameters() if param.ndim == 2]


def split(model: nn.Module) -> Any:
    """Matrices and the rest in a group each, which say so."""
    params = list(model.parameters())
    return [{"params": [p for p in params if (p.ndim == 2) == muon], "use_muon": muon} for muon in (True, False)]


@dataclass(frozen=True)
class Trial:
    """A class of optimizers and how its users set it up."""

    cls: type[Optimizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: Groups = all_params
    create_graph: bool = False
    ranks: bool = False  # needs torch.distributed, if only with one rank


@dataclass(frozen=True)
class Row:
    """What came out for one class."""

    name: str
    update: str
    resume: str
    note: str = ""

    @property
    def serves(self) -> bool:
        """Whether it trains as alone and resumes."""
        return self.update == self.resume == "yes"


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """One matrix has the 4096 elements from which on state is kept in 8 bits."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)).to(dtype)


def loss_at(model: nn.Module, step: int) -> Tensor:
    """The loss of the step's batch, the same in every run."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randn(8, 16, generator=generator).to(next(model.parameters()).dtype)
    return (model(rows[:, :12]) - rows[:, 12:]).float().square().mean()


def train(model: nn.Module, optimizer: Optimizer, steps: range, create_graph: bool = False) -> None:
    """Trains, with two passes a step where the optimizer has them."""
    switch = getattr(optimizer, "train", None)  # of schedule-free optimizers
    if switch is not None:
        switch()
    passes = [optimizer.step]
    if isinstance(optimizer, FriendlySAM):
        passes = [optimizer.first_step, optimizer.second_step]
    for step in steps:
        for half in passes:
            optimizer.zero_grad()
            loss_at(model, step).backward(create_graph=create_graph)
            half()


def make(trial: Trial, model: nn.Module, rho: float | None, **options: Any) -> Optimizer:
    """The optimizer alone (``rho`` None), or within FriendlySAM."""
    groups = trial.groups(model)
    if rho is None:
        return trial.cls(groups, **trial.options)
    return FriendlySAM(groups, trial.cls, rho=rho, **options, **trial.options)


def weights(model: nn.Module) -> Tensor:
    """All weights in one vector."""
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def trained(
    trial: Trial, rho: float | None, resumed: bool = False, dtype: torch.dtype = torch.float32, **own: Any
) -> Tensor:
    """The weights after all steps, with a file between the halves where it is ``resumed``."""
    torch.manual_seed(0)
    np.random.seed(0)  # Kron draws from numpy's generator
    model = network(dtype)
    optimizer = make(trial, model, rho, **own)
    train(model, optimizer, range(HALF), trial.create_graph)
    if resumed:
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict(), torch.get_rng_state(), np.random.get_state()), file)
        file.seek(0)
        saved_model, saved_optimizer, rng, numpy_rng = torch.load(file, weights_only=False)
        model = network(dtype)
        model.load_state_dict(saved_model)
        optimizer = make(trial, model, rho, **own)
        optimizer.load_state_dict(saved_optimizer)
        torch.set_rng_state(rng)
        np.random.set_state(numpy_rng)
    train(model, optimizer, range(HALF, STEPS), trial.create_graph)
    return weights(model)


def attempt(run: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | Exception:
    """What a run returns or raises."""
    try:
        return run(*args, **kwargs)
    except Exception as error:
        return error


def differ(a: Tensor, b: Tensor) -> float:
    """The largest difference; 0 where all bits are the same."""
    bits = {4: torch.int32, 2: torch.int16}[a.itemsize]
    return 0.0 if torch.equal(a.view(bits), b.view(bits)) else float((a.float() - b.float()).abs().max())


def sentence(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def try_out(name: str, trial: Trial, **own: Any) -> Row:
    """One class: does rho = 0 do what it does alone, and does a resumed run go on as one without a break?"""
    if trial.ranks:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return _tried_out(name, trial, **own)
    finally:
        if trial.ranks:
            dist.destroy_process_group()


def _tried_out(name: str, trial: Trial, **own: Any) -> Row:
    dtype = own.get("dtype", torch.float32)
    alone, within = attempt(trained, trial, None, dtype=dtype), attempt(trained, trial, 0.0, **own)
    if isinstance(within, Exception):
        both = isinstance(alone, Exception) and str(alone) == str(within)
        return Row(name, "no", "no", ("alone too: " if both else "") + sentence(within))
    if isinstance(alone, Exception):
        return Row(name, "no", "no", f"alone it fails: {sentence(alone)}")
    if not alone.isfinite().all() or torch.equal(alone, weights(network(dtype))):
        return Row(name, "no", "no", "alone it does not train, so there is nothing to compare")
    notes = []
    off = differ(alone, within)
    if off:
        notes += _about_update(trial, alone)
    whole, resumed = attempt(trained, trial, 0.05, **own), attempt(trained, trial, 0.05, resumed=True, **own)
    failed = [run for run in (whole, resumed) if isinstance(run, Exception)]
    exact = not failed and differ(whole, resumed) == 0
    if not exact:
        notes.append(sentence(failed[0]) if failed else f"a resumed run is off by {differ(whole, resumed):.1e}")
        twice, again = attempt(trained, trial, 0.05, **own), attempt(trained, trial, None, resumed=True, dtype=dtype)
        if not failed and differ(whole, twice):
            notes.append(f"two runs without a break are off by {differ(whole, twice):.1e}")
        broken = isinstance(again, Exception)
        notes.append(f"alone: {sentence(again) if broken else f'off by {differ(alone, again):.1e}'}")
    return Row(name, f"off by {off:.1e}" if off else "yes", "yes" if exact else "no", "; ".join(notes))


def _about_update(trial: Trial, alone: Tensor) -> list[str]:
    """What to know where a run at rho = 0 differs from the optimizer's own."""
    notes = []
    again = differ(alone, trained(trial, None))
    if again:
        notes.append(f"two runs of it alone differ by {again:.1e}")
    if trial.cls in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        fused = replace(trial, options={**trial.options, "fused": True})
        subclass = replace(trial, cls=type(trial.cls.__name__, (trial.cls,), {}))
        by = differ(alone, trained(fused, None)), differ(alone, trained(subclass, 0.0))
        notes.append(
            f"the update is one pass with the restore; torch's own `fused=True` is off by {by[0]:.1e} too, and a "
            f"subclass, whose own step runs, by {by[1]:.0e}"
        )
    return notes


# ---- Which classes there are ---------------------------------------------------------------------------------------

# What a class needs to be set up as it is meant to be.
SETUP: dict[str, dict[str, Any]] = {
    "torch.optim.SGD": {"options": {"lr": 0.05, "momentum": 0.9}},
    "torch.optim.Muon": {"groups": matrices},
    "adamp.SGDP": {"options": {"lr": 0.05}},
    "pytorch_optimizer.AdaHessian": {"create_graph": True},
    "pytorch_optimizer.SophiaH": {"create_graph": True},
    "pytorch_optimizer.BSAM": {"options": {"num_data": 8}},
    "pytorch_optimizer.Ranger21": {"options": {"num_iterations": STEPS}},
    "pytorch_optimizer.SpectralSphere": {"groups": matrices},
    **{f"pytorch_optimizer.{name}": {"groups": split} for name in ("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon")},
    "pytorch_optimizer.DistributedMuon": {"groups": split, "ranks": True},
    "pytorch_optimizer.DeMo": {"ranks": True},
    **{
        f"bitsandbytes.optim.{name}": {"options": {"lr": 0.05, "momentum": 0.9}}
        for name in ("SGD", "SGD8bit", "SGD32bit", "LARS", "LARS8bit", "LARS32bit", "PytorchLARS")
    },
}
LIBRARIES = {
    "torch": "torch.optim",
    "pytorch_optimizer": "pytorch_optimizer",
    "adamp": "adamp",
    "schedulefree": "schedulefree",
    "prodigyopt": "prodigyopt",
    "bitsandbytes": "bitsandbytes.optim",
    "torchao": "torchao.optim",
}
LOW_PRECISION = ("bitsandbytes.optim.AdamW8bit", "torchao.optim.AdamW8bit")


def trials(module: ModuleType) -> Iterator[tuple[str, Trial]]:
    """(name, trial) of every optimizer class that a module makes public, but for those of torch in other modules."""
    for name in sorted(dir(module)):
        cls = getattr(module, name)
        if name.startswith("_") or not isinstance(cls, type) or not issubclass(cls, Optimizer) or cls is Optimizer:
            continue
        if module.__name__ == "torch.optim" or not cls.__module__.startswith("torch.optim"):
            yield name, Trial(cls, **SETUP.get(f"{module.__name__}.{name}", {}))


def found() -> dict[str, ModuleType]:
    """The libraries that are installed, by their names; says aloud which are not."""
    modules = {}
    for library, module in LIBRARIES.items():
        try:
            modules[library] = importlib.import_module(module)
        except ImportError as error:
            print(f"{library} is left out: {error}", file=sys.stderr)
    return modules


# ---- Bytes ---------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """What the process has in memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bytes_per_parameter(trial: Trial, tensors: int = 32, **own: Any) -> tuple[float, float]:
    """(weights and gradients, all the optimizer's) in bytes a parameter, after two steps, of bfloat16 parameters."""
    if tensors > 1:
        bytes_per_parameter(trial, 1, **own)  # what code is loaded and compiled counts for no parameter
    before = resident_bytes()
    params = [nn.Parameter(torch.empty(1024, 1024, dtype=torch.bfloat16).normal_()) for _ in range(tensors)]
    for param in params:
        param.grad = torch.empty_like(param).normal_()
    numel = sum(param.numel() for param in params)
    with_grads = resident_bytes()
    optimizer = FriendlySAM(params, trial.cls, rho=100.0, **own, **trial.options)
    for _ in range(2):
        optimizer.first_step()
        optimizer.second_step()
    return (with_grads - before) / numel, (resident_bytes() - with_grads) / numel


# ---- The document --------------------------------------------------------------------------------------------------

HEAD = """# Base optimizers

Which optimizers serve as `base_optimizer` of `FriendlySAM` and `SAM`. `python bench/bases.py` makes this page: it
tries every class that is installed.

How to read a row. **update**: training with `rho=0` gives the weights that the optimizer alone gives, to the bit, after
{steps} steps (float32, a small network, on a CPU); else the largest difference of a weight. **resume**: a run with
`rho=0.05` that is saved and loaded at step {half} ends with the weights of one without a break, to the bit. Where it
says "no", the note has the sentence that the constructor or the step raises; "alone too": so does the optimizer alone.

Made on {date} with Python {python} and {versions}.
"""

BYTES = """Of bfloat16 weights with `ema_dtype=torch.int8`: resident memory of the process after two steps, over the
number of parameters. The optimizer's part is the backup (2), the average (1.03) and the base's moments."""


def table(rows: list[Row]) -> str:
    """Rows in Markdown."""
    lines = ["| class | update | resume | note |", "|---|---|---|---|"]
    lines += [
        f"| `{row.name}` | {row.update} | {row.resume} | {row.note.replace('|', chr(92) + '|')} |" for row in rows
    ]
    return "\n".join(lines)


def low_precision(modules: dict[str, ModuleType]) -> str:
    """The section on 16-bit weights, an average in int8 and moments in 8 bits."""
    lines = [
        "| base | bytes of weights and gradients | of the optimizer | together | resume |",
        "|---|---|---|---|---|",
    ]
    for full_name in LOW_PRECISION:
        library, _, name = full_name.partition(".optim.")
        if library not in modules:
            continue
        trial = Trial(getattr(modules[library], name))
        row = try_out(name, trial, dtype=torch.bfloat16, ema_dtype=torch.int8)
        print("  ", row, flush=True)
        given, optimizers = bytes_per_parameter(trial, ema_dtype=torch.int8)
        lines.append(f"| `{full_name}` | {given:.2f} | {optimizers:.2f} | {given + optimizers:.2f} | {row.resume} |")
    return "\n".join(lines)


def main() -> None:
    """Tries every class and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(__file__).resolve().parents[1] / "docs" / "bases.md"
    parser.add_argument("--out", type=Path, default=default, help="(default: docs/bases.md)")
    parser.add_argument("--only", nargs="*", help="libraries to try (default: all)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    modules = {name: module for name, module in found().items() if not options.only or name in options.only}
    versions = ", ".join(f"{name} {version(name)}" for name in modules)
    when, python = datetime.date.today().isoformat(), platform.python_version()
    text = [HEAD.format(steps=STEPS, half=HALF, date=when, python=python, versions=versions)]
    text += ["## Bytes a parameter", "", BYTES, "", low_precision(modules), ""]
    for library, module in modules.items():
        rows = []
        for name, trial in trials(module):
            rows.append(try_out(name, trial))
            print(f"{library}: {rows[-1]}", flush=True)
        serving = sum(row.serves for row in rows)
        text += [
            f"## {library} {version(library)}",
            "",
            f"{serving} of {len(rows)} serve to the bit.",
            "",
            table(rows),
            "",
        ]
    options.out.write_text("\n".join(text))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
