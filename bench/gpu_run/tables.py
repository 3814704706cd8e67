"""The tables that pages show of a GPU's rows: whole steps, and each pass as predicted and as measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from bench.gpu_model import GPUS, H200, SHARE_OF_BANDWIDTH, Gpu, seconds
from bench.gpu_run import passes
from bench.plots import GPU_TIMES
from bench.rows import Row
from bench.workloads import TRAININGS, WORKLOADS

# By the name that the driver gives.
MODELLED = {
    "NVIDIA A100-SXM4-80GB": GPUS["80"],
    "NVIDIA H100 80GB HBM3": GPUS["90"],
    "NVIDIA H200": H200,
    "NVIDIA B200": GPUS["100"],
}
STEP_COLUMNS = {
    "foreach": "foreach",
    "foreach graph": "as a graph",
    "compiled": "compiled",
    "compiled graph": "as a graph",
    "fsam_ext": "fsam_ext",
    "fsam_ext graph": "as a graph",
    "fsam_ext flat": "flat",
    "fsam_ext triton": "Triton",
}
TRAINING_COLUMNS = ("base", "sam by hand", "official", "foreach", "compiled", "fsam_ext", "fsam_ext triton")


class Figures:
    """Rows of one machine that can be asked for one figure."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = [row for row in rows if row.median is not None]
        self._found = {(r.provider, r.workload, r.dtype, r.base, r.metric): r.median for r in self.rows}

    def get(self, provider: str, workload: str, dtype: str, base: str, metric: str) -> float | None:
        """The median, or None where it was not measured."""
        return self._found.get((provider, workload, dtype, base, metric))

    def cases(self, metric: str) -> list[tuple[str, str, str]]:
        """(workload, dtype, base) for which our package has a figure, as they were measured."""
        found = [(r.workload, r.dtype, r.base) for r in self.rows if (r.provider, r.metric) == ("fsam_ext", metric)]
        return list(dict.fromkeys(found))

    @property
    def origin(self) -> str:
        """Where, with what and when."""
        last = max(self.rows, key=lambda row: row.date)
        commits = ", ".join(dict.fromkeys(row.commit or "no commit" for row in self.rows))
        return f"{last.machine}; {last.versions}; {commits}, {last.date}"


def _lines(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    separator = "|---" + "|---:" * (len(head) - 1) + "|"
    return ["| " + " | ".join(head) + " |", separator, *("| " + " | ".join(cells) + " |" for cells in body)]


def duration(value: float | None, unit: float = 1.0) -> str:
    """Of a value in units of so many seconds, in the unit that suits it."""
    if value is None:
        return "-"
    for factor, name in ((1e6, "us"), (1e3, "ms")):
        if value * unit * factor < 999.5:
            return f"{value * unit * factor:.3g} {name}"
    return f"{value * unit:.3g} s"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}x"


def _title(case: tuple[str, str, str]) -> str:
    workload, dtype, base = case
    known = {**WORKLOADS, **TRAININGS}.get(workload)
    return f"{known.title if known else workload}, {dtype}, {base}"


def _steps(figures: Figures, cases: list[tuple[str, str, str]]) -> list[str]:
    head = ["optimizer part of a step", "official", *STEP_COLUMNS.values(), "of the memory bus"]
    body = [
        [
            _title(case),
            duration(figures.get("official", *case, "step"), 1e-3),
            *(_times(figures.get(name, *case, "speedup_over official")) for name in STEP_COLUMNS),
            f"{figures.get('fsam_ext', *case, 'bus_fraction') or float('nan'):.2f}",
        ]
        for case in cases
    ]
    caption = f"Time of the official sequence, and how many times faster each one is. {GPU_TIMES}"
    return [*_lines(head, body), "", caption.strip(), ""]


def _training(figures: Figures, cases: list[tuple[str, str, str]]) -> list[str]:
    body = [
        [
            _title(case),
            duration(figures.get("plain", *case, "step"), 1e-3),
            *(_times(figures.get(name, *case, "cost_over_plain")) for name in TRAINING_COLUMNS),
        ]
        for case in cases
    ]
    caption = (
        "Time of plain training, which makes one forward-backward, and everyone's over it. `base` makes two and "
        "perturbs nothing."
    )
    return [*_lines(["whole training step", "plain", *TRAINING_COLUMNS], body), "", caption, ""]


def steps(rows: Iterable[Row]) -> str:
    """Markdown for the README: optimizer steps against the others, and what F-SAM costs whole training steps.

    Raises:
        ValueError: there are no rows of either.
    """
    figures = Figures(rows)
    training = figures.cases("cost_over_plain")
    optimizer = [case for case in figures.cases("step") if case not in training]
    parts = _steps(figures, optimizer) if optimizer else []
    parts += _training(figures, training) if training else []
    if not parts:
        raise ValueError("there are no rows of whole steps: the stages 'steps' and 'training steps' left none")
    return "\n".join([*parts, f"{figures.origin}."])


def modelled(machine: str, copy: float) -> Gpu:
    """The GPU of the model that a machine is; of one that it does not know, one as fast as its copy (in GB/s)."""
    return MODELLED.get(machine) or replace(H200, name=machine, bandwidth=copy * 1e9 / SHARE_OF_BANDWIDTH)


def _pass_lines(figures: Figures, case: tuple[str, int, str], machine: str) -> list[list[str]]:
    """A line for each pass of a case; memory is what a pass waits for by the model, whatever it executes."""
    dtype, numel, layout = case
    key = (passes.label(numel, layout), dtype, "")
    copies = [figures.get(passes.provider(name, "copy"), *key, "bandwidth") for name in ("cuda", "triton")]
    lines = []
    for op in passes.OPS:
        names = (passes.provider("cuda", op), passes.provider("triton", op))
        nbytes = passes.moved(op, passes.DTYPES[dtype])
        times, shares, counts = (
            [figures.get(name, *key, metric) for name in names] for metric in ("time", passes.SHARE, "ncu instructions")
        )
        if not nbytes or times == [None, None]:
            continue
        expected = seconds(modelled(machine, max(filter(None, copies))), op, dtype, numel, instructions=0.0)
        lines.append(
            [f"{op}, {dtype}", key[0].split()[1], str(nbytes), duration(expected)]
            + [duration(time, 1e-6) for time in times]
            + [" / ".join("-" if share is None else f"{share:.0f} %" for share in shares)]
            + [" / ".join("-" if count is None else f"{count:.0f}" for count in counts)]
        )
    return lines


def model(rows: Iterable[Row]) -> str:
    """Markdown for docs/gpu-model.md: each pass as predicted and as measured.

    Raises:
        ValueError: there are no rows of passes.
    """
    figures = Figures(rows)
    machine = figures.rows[0].machine if figures.rows else ""
    flat = [case for case in (*passes.CASES, *passes.DRY_CASES) if case[2] == "flat"]
    body = [line for case in flat for line in _pass_lines(figures, case, machine)]
    if not body:
        raise ValueError("there are no rows of single passes: the stage 'bandwidth cuda' left none")
    head = ["pass", "parameters", "bytes each", "predicted", "CUDA", "Triton", "of a copy", "instructions each"]
    known = MODELLED.get(machine)
    by = (
        f"{SHARE_OF_BANDWIDTH} of {known.bandwidth / 1e12:.2f} TB/s" if known else "what a copy reaches in the same run"
    )
    rest = f"Predicted with {by}. The last two columns: CUDA / Triton. {figures.origin}."
    return "\n".join([*_lines(head, body), "", rest])
