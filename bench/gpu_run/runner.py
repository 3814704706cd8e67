"""Runs stages one after the other within a budget; before the next one begins, the last one's result is on disk.

A run's folder holds log.txt (all output), rows.csv (all figures), stages.json and table.txt (each stage's verdict),
facts.json (the machine), and ncu.csv where the profiler ran.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.gpu_run import budget, figures
from bench.gpu_run.stages import ROOT, Missing, Setting, Stage

# Less than this is no time to begin a stage in: importing torch from a cold disk takes as much.
SHORTEST = 10.0
TAIL = 12  # lines of a stage that failed, on the screen too
OK, FAILED, KILLED, ABSENT, LATE, STOPPED = "ok", "failed", "killed", "absent", "no time", "stopped"


@dataclass
class Result:
    """A line of the table. ``verdict`` is one of the six words above."""

    stage: str
    verdict: str
    seconds: float
    figure: str


class Interrupted(BaseException):
    """A signal that asks this command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def _interrupt(number: int, _: object) -> None:
    raise Interrupted(number)


def write(path: Path, text: str) -> None:
    """Replaces a file at once."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def verdicts(folder: Path) -> list[Result]:
    """What a folder knows of stages that were run into it."""
    path = folder / "stages.json"
    return [Result(**found) for found in json.loads(path.read_text())] if path.exists() else []


def table(results: Sequence[Result], headline: str) -> str:
    """What fits a screen: a line for each stage."""
    width = max([len("stage"), *(len(result.stage) for result in results)])
    lines = [f"{'stage':{width}}  verdict  seconds  figure"]
    lines += [f"{r.stage:{width}}  {r.verdict:7}  {r.seconds:7.1f}  {r.figure[:100]}" for r in results]
    return "\n".join([*lines, headline]) + "\n"


class Run:
    """One run of some stages into a folder, beside the verdicts that earlier runs left there on other stages."""

    def __init__(self, setting: Setting, stages: Sequence[Stage], seconds: float) -> None:
        self.setting, self.stages, self.seconds = setting, stages, seconds
        self.results: list[Result] = []
        self._earlier = [result for result in verdicts(setting.out) if result.stage not in {s.name for s in stages}]
        self._budget = budget.Budget(seconds)
        self._start = time.monotonic()

    @property
    def log(self) -> Path:
        """Everything that was printed."""
        return self.setting.out / "log.txt"

    def facts(self) -> dict:
        """What the first stage has found out, as far as it came."""
        try:
            return json.loads((self.setting.out / "facts.json").read_text())
        except (OSError, ValueError):
            return {}

    def save(self, shown: Iterable[str] = ()) -> None:
        """Puts the verdicts and the table on disk, and says something on the screen."""
        taken = time.monotonic() - self._start
        count = len(figures.read_rows(self.setting.rows))
        headline = f"{taken:.0f} s of {self.seconds:.0f} s, {count} rows in {self.setting.rows}"
        every = [*self._earlier, *self.results]
        write(self.setting.out / "stages.json", json.dumps([asdict(result) for result in every], indent=2) + "\n")
        write(self.setting.out / "table.txt", table(every, headline))
        for line in shown:
            print(line[:300], flush=True)

    def _attempt(self, stage: Stage) -> Result:
        """Runs a stage where that can be; whatever goes wrong in it is its own verdict."""
        facts = self.facts()
        missing = facts.get("missing_backends", {}).get(stage.backend) or (self.results and facts.get("no_device"))
        if missing:
            return Result(stage.name, ABSENT, 0.0, missing)
        seconds = self._budget.cut(stage.limit)
        if seconds < min(SHORTEST, stage.limit):
            return Result(stage.name, LATE, 0.0, f"{max(0.0, self._budget.left):.0f} s were left")
        environment = {**self.setting.environment, **stage.environment}
        try:
            command = stage.command(self.setting, seconds)
        except Missing as reason:
            return Result(stage.name, ABSENT, 0.0, str(reason))
        with self.log.open("a") as log:
            print(f"\n==== {stage.name}: {' '.join(command)}", file=log)
        begin, started = self.log.stat().st_size, time.monotonic()
        try:
            outcome = budget.run(command, seconds, self.log, ROOT, environment)
        except Interrupted as stop:
            self.results.append(Result(stage.name, STOPPED, time.monotonic() - started, f"by {stop}"))
            raise
        except OSError as error:
            return Result(stage.name, FAILED, time.monotonic() - started, f"could not be started: {error}")
        return self._judge(stage, outcome, begin)

    def _judge(self, stage: Stage, outcome: budget.Outcome, begin: int) -> Result:
        with self.log.open("rb") as file:
            file.seek(begin)
            output = file.read().decode(errors="replace")
        try:
            figure = stage.figure(figures.read_rows(self.setting.rows), output)
        except Exception as error:  # a surprise in what a program says must not cost what it did
            figure = f"its output was not understood: {error!r}"
        verdict = KILLED if outcome.killed else OK if outcome.code == 0 else FAILED
        if verdict == FAILED:
            figure = f"status {outcome.code}: {figure}"
            print("\n".join(line[:300] for line in output.splitlines()[-TAIL:]), flush=True)
        return Result(stage.name, verdict, outcome.seconds, figure)

    def all(self) -> int:
        """Runs every stage and prints the table; returns the command's exit status.

        It is 0 where every stage that this machine has the means for was finished, 1 where one was not, and 128 and
        the signal's number where the command was asked to end.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _interrupt)
        self.save()
        code = 0
        try:
            for stage in self.stages:
                print(f"{time.monotonic() - self._start:6.1f} s  {stage.name} ...", flush=True)
                result = self._attempt(stage)
                self.results.append(result)
                code |= result.verdict not in (OK, ABSENT)
                self.save([f"{'':10}{result.verdict} after {result.seconds:.1f} s: {result.figure}"])
        except Interrupted as stop:
            code = 128 + stop.number
            self.save()
        print((self.setting.out / "table.txt").read_text(), end="", flush=True)
        return code


def begin(setting: Setting, commit: str) -> None:
    """Makes the folder, and says in its facts what kind of run it is.

    Raises:
        SystemExit: the folder holds figures of the other kind.
    """
    setting.out.mkdir(parents=True, exist_ok=True)
    path = setting.out / "facts.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("dry_run", setting.dry) != setting.dry:
        sys.exit(f"--out {setting.out} holds a {'dry' if known['dry_run'] else 'real'} run; name another folder")
    known.pop("no_device", None)
    known |= {"dry_run": setting.dry, "commit": commit or known.get("commit", "")}
    write(path, json.dumps(known, indent=2) + "\n")
