"""The same steps by two checkouts of this package, in turn: ``python bench/compare.py OTHER_CHECKOUT``.

Two checkouts do not fit into one process, so each has one, and they take turns of a few steps on the same machine at
the same time. A figure is the median over the turns of this checkout's time over the other's: below 1 this one is
faster. Processes are started anew several times, since how memory happens to lie moves a figure as well. The ratio of
the fastest turns is what is left where other jobs disturb the rest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.measure import quantiles  # noqa: E402
from bench.workloads import WORKLOADS  # noqa: E402

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-4, "weight_decay": 1e-2}),
}
NAMES = ("gpt2", "resnet18", "tensors_1000", "tensors_10000", "one_64m")
CASES = [f"{work} {base} {layout}" for work in NAMES for base in BASES for layout in ("apart", "flat")]
# A turn has at least this many steps and seconds, after one step that is not counted.
STEPS, SECONDS = 3, 0.05


# ---- In a process of one checkout ----------------------------------------------------------------------------------


def serve(checkout: Path, case: str, processor_time: bool) -> None:
    """Makes the optimizer of a case and prints how many steps make a turn; then each number on stdin asks for a turn of
    so many, and a line on stdout has the seconds of one.
    """
    sys.path.insert(0, str(checkout))
    import fsam_ext

    if not Path(fsam_ext.__file__).is_relative_to(checkout):
        raise SystemExit(f"{checkout} holds no package fsam_ext: {fsam_ext.__file__} was imported")
    if processor_time:
        torch.set_num_threads(1)
    now = time.thread_time if processor_time else time.perf_counter
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, base, layout = case.split()
    params = WORKLOADS[name].parameters(torch.float32, device)
    for param, gradient in zip(params, WORKLOADS[name].gradients(torch.float32, device)):
        param.grad = gradient
    if layout == "flat":
        fsam_ext.flatten_parameters(nn.ParameterList(params), grads=True)
    optimizer_class, options = BASES[base]
    optimizer = fsam_ext.FriendlySAM(params, optimizer_class, rho=0.05, **options)

    def steps(count: int) -> float:
        start = now()
        for _ in range(count):
            optimizer.first_step()
            optimizer.second_step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (now() - start) / count

    steps(2)  # the state is made in the first one
    print(max(STEPS, int(SECONDS / steps(1))), flush=True)
    for count in sys.stdin:
        steps(1)
        print(steps(int(count)), flush=True)


# ---- The command ---------------------------------------------------------------------------------------------------


def turns(checkouts: list[Path], case: str, seconds: float, processor_time: bool) -> list[list[float]]:
    """Seconds of a step by each checkout, turn by turn; who begins changes from turn to turn."""
    flags = ["--processor-time"] if processor_time else []
    processes, counts = [], []
    try:
        for checkout in checkouts:
            command = [sys.executable, __file__, str(checkout), "--serve", case, *flags]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": checkout}
            processes.append(subprocess.Popen(command, **pipes))
            count = processes[-1].stdout.readline()
            if not count:
                raise SystemExit(f"{case}: {checkout} failed; what it said is above")
            counts.append(int(count))
        found: list[list[float]] = []
        end = time.monotonic() + seconds
        while len(found) < 4 or time.monotonic() < end:
            record = [0.0] * len(processes)
            for i in range(len(processes))[:: 1 if len(found) % 2 else -1]:
                processes[i].stdin.write(f"{max(counts)}\n")
                processes[i].stdin.flush()
                record[i] = float(processes[i].stdout.readline())
            found.append(record)
        return found
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout with its libraries built in place")
    parser.add_argument("--cases", nargs="+", default=[""], metavar="TEXT", help="those that hold it, as 'sgd flat'")
    parser.add_argument("--seconds", type=float, default=3.0, help="of turns for each pair of processes")
    parser.add_argument("--pairs", type=int, default=4, help="of processes for each case")
    parser.add_argument("--processor-time", action="store_true", help="of one thread: where other jobs run too")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.other / "fsam_ext" / "__init__.py").exists():
        raise SystemExit(f"OTHER_CHECKOUT {args.other}: there is no fsam_ext in it; give the root of a checkout")
    if args.serve:
        return serve(args.other, args.serve, args.processor_time)
    cases = [case for case in CASES if any(text in case for text in args.cases)]
    if not cases:
        raise SystemExit(f"--cases {' '.join(args.cases)}: no case holds that; there are {', '.join(CASES)}")
    print(f"this: {ROOT}; other: {args.other.resolve()}")
    print(f"{'case':28} {'this, ms':>10} {'other, ms':>10}   this / other (20-80 %)   fastest turns   of each pair")
    checkouts = [ROOT, args.other.resolve()]
    for case in cases:
        pairs = []
        for i in range(args.pairs):  # who is started first was a percent slower: each in turn
            order = 1 if i % 2 else -1
            found = turns(checkouts[::order], case, args.seconds, args.processor_time)
            pairs.append([record[::order] for record in found])
        times = [record for pair in pairs for record in pair]
        this, other = ([record[i] for record in times] for i in (0, 1))
        ratio = quantiles([a / b for a, b in times])
        apart = " ".join(f"{quantiles([a / b for a, b in pair]).median:.3f}" for pair in pairs)
        print(
            f"{case:28} {quantiles(this).median * 1e3:10.3f} {quantiles(other).median * 1e3:10.3f}   "
            f"{ratio.median:6.3f} ({ratio.q20:.3f}-{ratio.q80:.3f})   {min(this) / min(other):13.3f}   {apart}",
            flush=True,
        )


if __name__ == "__main__":
    main()
