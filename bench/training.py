"""Whole training steps: forward-backwards of a model and the optimizer, as they follow each other in training."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench import gpu
from bench.cases import OUT_OF_TIME, Case, Run
from bench.clocks import Call, DeviceClock, clock_for
from bench.measure import Sample, alternate, paired_ratios, quantiles, reason_of, values
from bench.peers import BASES, Base, BaseOnly, Plain, Provider
from bench.rows import Row
from bench.workloads import Training

# NOTE [several steps, one synchronisation]
# On a GPU the host runs ahead of the device, and what it does for the optimizer is free while a backward is under way.
# Waiting after each part would count it. So a sample is some steps queued one after the other behind one that is not
# counted, with events between the parts, and the host waits once.
STEPS_ON_A_GPU = 3


class TrainingRunner:
    """A provider's training of its own copy of a model, always on the same batch."""

    def __init__(self, kind: type[Provider], work: Training, base: Base, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model, self.batch = work.model().to(device), work.batch(device)
        if work.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
            images, labels = self.batch
            self.batch = (images.to(memory_format=torch.channels_last), labels)
        self.provider = kind(list(self.model.parameters()), base)
        self._device, self._autocast = device, work.autocast
        self._clock = clock_for(device)

    def loss(self) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            return self.model(self.batch)

    def backward(self) -> None:
        self.provider.zero_grad()
        self.loss().backward()

    def parts(self) -> list[tuple[str, Call]]:
        """Of one step, in order."""
        first = [("backward", self.backward), ("optimizer", self.provider.ascend)]
        return first * (self.provider.passes == 2) + [("backward", self.backward), ("optimizer", self.provider.descend)]

    def step(self) -> None:
        for _, call in self.parts():
            call()

    def __call__(self) -> Sample:
        queued = isinstance(self._clock, DeviceClock)
        before, steps = (1, STEPS_ON_A_GPU) if queued else (0, 1)
        names, calls = zip(*self.parts())
        spans = self._clock.spans(calls * (before + steps))[before * len(calls) :]
        step = sum(spans) / steps
        optimizer = sum(span for name, span in zip(names * steps, spans) if name == "optimizer") / steps
        sample = {"step": step, "optimizer": optimizer, "share": optimizer / step}
        if queued:
            sample["host"], _ = self._clock.from_idle(self.step)
        return sample


def measure_training(case: Case, run: Run) -> Iterator[list[Row]]:
    """Figures of whole steps, given out each time there are more of them; those that compile join last.

    ``base`` is the yardstick for the optimizer's own cost: it makes both forward-backwards too and perturbs nothing.
    ``plain`` is the one for the price of F-SAM: it makes one.
    """
    failures: dict[str, str] = {}
    runners: dict[str, Callable[[], Sample]] = {}
    rounds: list[dict[str, Sample]] = []
    gc.collect()
    if gpu.serves(run.device):
        torch.cuda.empty_cache()
    compiled = [name for name in case.providers if run.available[name].compiles]
    phases = [[name for name in case.providers if name not in compiled], *([compiled] if compiled else [])]
    for names in phases:
        for name in names:
            if not run.left(1.0):
                failures[name] = OUT_OF_TIME
                continue
            run.say(f"{case.title}: {name}, first steps")
            try:
                runner = TrainingRunner(run.available[name], case.work, BASES[case.base], run.device)
                for _ in range(3):
                    runner.step()
                runners[name] = runner
            except Exception as error:  # costs its own figures only
                failures[name] = reason_of(error)
        run.say(f"{case.title}: {', '.join(runners)}")
        seconds = run.left(2.5 * case.seconds / len(phases))
        rounds += alternate(runners, seconds, min_rounds=run.rounds, failures=failures)
        runners = {name: runner for name, runner in runners.items() if name not in failures}
        yield training_rows(case, run, rounds, failures)


# Of each round where the clock tells it: (metric, unit, scale).
METRICS = (("step", "ms", 1e3), ("optimizer", "ms", 1e3), ("share", "", 1), ("host", "ms", 1e3))


def training_rows(case: Case, run: Run, rounds: list[dict[str, Sample]], failures: dict[str, str]) -> list[Row]:
    names = [name for name in case.providers if name not in failures and any(name in record for record in rounds)]
    rows = []
    for name in names:
        for metric, unit, scale in METRICS:
            if metric in next(record[name] for record in rounds if name in record):
                rows.append(run.row(case, name, metric, unit, quantiles(values(rounds, name, metric)), scale))
        for other in names:
            if other != name and (ratios := paired_ratios(rounds, name, other)):
                rows.append(run.row(case, name, f"speedup_over {other}", "x", quantiles(ratios)))
        for yardstick in (BaseOnly.name, Plain.name):
            ratios = paired_ratios(rounds, yardstick, name)
            if ratios and name not in (yardstick, Plain.name):
                rows.append(run.row(case, name, f"cost_over_{yardstick}", "x", quantiles(ratios)))
    return rows + [run.not_run(case, name, why) for name, why in failures.items()]
