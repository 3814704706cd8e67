"""How the benchmark treats a GPU, walked here with stubs in the place of ``torch.cuda`` that record what is asked."""

from __future__ import annotations

import time
from contextlib import contextmanager

import pytest
import torch

from bench import clocks, gpu
from bench.cases import Case, Run
from bench.clocks import DeviceClock
from bench.peers import BASES, Foreach, Official, Plain, Provider, SamByHand
from bench.providers import all_providers
from bench.steps import Runner, measure_steps
from bench.training import STEPS_ON_A_GPU, TrainingRunner, measure_training
from bench.workloads import TRAININGS, Workload

CPU = torch.device("cpu")
SMALL = Workload("small", "small", ((7, 5), (33,)))


class Machine:
    """A GPU whose work takes the time that ``work`` says; ``log`` has what it was asked, in order."""

    def __init__(self):
        self.log: list[str] = []
        self.now = 0.0
        self.spins: list[int] = []
        self.ran_dry = False
        self.replays = 0
        self.own_time = 0.0  # of an event: with it no span is empty where real tensors do the work

    def work(self, name, seconds):
        self.log.append(name)
        self.now += seconds

    def spin(self, cycles):
        self.spins.append(cycles)
        self.log.append("spin")

    def wait(self):
        self.log.append("wait")


@pytest.fixture
def machine(monkeypatch):
    """torch.cuda as this machine; tensors stay on the CPU."""
    found = Machine()

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            found.work("event", found.own_time)
            self.at = found.now

        def query(self):
            return found.ran_dry

        def synchronize(self):
            found.log.append("wait for event")

        def elapsed_time(self, other):
            return (other.at - self.at) * 1e3

    class CUDAGraph:
        def replay(self):
            found.work("replay", 0.5)
            found.replays += 1

    @contextmanager
    def graph(made):
        assert isinstance(made, CUDAGraph)
        found.log.append("capture")
        yield

    stubs = {"Event": Event, "CUDAGraph": CUDAGraph, "graph": graph, "synchronize": found.wait, "_sleep": found.spin}
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    keys = ("allocation.all.allocated", "allocated_bytes.all.peak", "allocated_bytes.all.current")
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: dict.fromkeys(keys, 0))
    monkeypatch.setattr(gpu, "serves", lambda device: True)
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 1 << 34)
    monkeypatch.setattr(gpu, "cache_bytes", lambda device: 1 << 16)
    monkeypatch.setattr("bench.steps.count_launches", lambda call: 7)
    return found


@pytest.fixture
def flushes(machine, monkeypatch):
    """Overwriting the L2 appears in the log."""
    zero = torch.Tensor.zero_

    def logged(tensor):
        if tensor.dtype == torch.uint8 and tensor.numel() == 2 << 16:
            machine.log.append("flush")
        return zero(tensor)

    monkeypatch.setattr(torch.Tensor, "zero_", logged)


def provider_of(machine, **attributes):
    """A provider whose halves take 1 and 2 seconds of the machine."""

    class Logged(Provider):
        name = "fsam_ext"

        def ascend(self):
            machine.work("ascend", 1.0)

        def descend(self):
            machine.work("descend", 2.0)

    return type("Logged", (Logged,), attributes)


def run_of(available, minutes=1.0):
    said: list[str] = []
    return Run(CPU, available, time.monotonic() + 60 * minutes, said.append)


def figures(found):
    return {(row.provider, row.metric): row for row in found}


# ---- The clock -----------------------------------------------------------------------------------------------------


def test_work_is_queued_ahead_of_a_timed_span_and_the_cache_is_flushed_outside_of_it(machine, flushes):
    clock = DeviceClock(flush=True, device=CPU)
    assert clock.seconds(lambda: machine.work("kernel", 0.25)) == 0.25
    assert machine.log == ["wait", "flush", "spin", "event", "kernel", "event", "wait for event"]
    assert clock.queued_ahead


def test_a_clock_without_flushing_writes_nothing(machine, flushes):
    DeviceClock().seconds(lambda: None)
    assert "flush" not in machine.log


def test_where_the_device_ran_dry_it_is_said_and_the_next_spin_is_longer(machine):
    clock = DeviceClock()
    machine.ran_dry = True
    clock.seconds(lambda: time.sleep(0.002))
    assert not clock.queued_ahead
    machine.ran_dry = False
    clock.seconds(lambda: None)
    assert clock.queued_ahead
    assert machine.spins[1] >= 2 * 0.002 * clock.CYCLES > machine.spins[0]


def test_the_spin_has_an_end(machine, monkeypatch):
    monkeypatch.setattr(clocks.DeviceClock, "LONGEST_SPIN", 0.003)
    machine.ran_dry = True
    clock = DeviceClock()
    for _ in range(3):
        clock.seconds(lambda: time.sleep(0.004))
    assert machine.spins[-1] == int(0.003 * clock.CYCLES)


def test_host_time_ends_when_everything_is_queued_and_wall_time_when_it_is_finished(machine, monkeypatch):
    clock = DeviceClock()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: machine.log.append("wait") or time.sleep(0.01))
    host, wall = clock.from_idle(lambda: machine.log.append("call"))
    assert machine.log == ["wait", "call", "wait"]
    assert host < 0.01 <= wall


def test_calls_one_after_the_other_are_waited_for_once(machine):
    clock = DeviceClock()
    spans = clock.spans([lambda seconds=seconds: machine.work("call", seconds) for seconds in (1.0, 2.0, 4.0)])
    assert spans == [1.0, 2.0, 4.0]
    assert machine.log == ["wait", "event", "call", "event", "call", "event", "call", "event", "wait"]


# ---- Optimizer steps -----------------------------------------------------------------------------------------------


def test_gradients_are_renewed_and_the_cache_flushed_before_each_half(machine, flushes, monkeypatch):
    runner = Runner(provider_of(machine), SMALL, SMALL.gradients(torch.float32, CPU), BASES["sgd"])
    monkeypatch.setattr(runner, "renew_gradients", lambda: machine.log.append("renew"))
    sample = runner()
    span = ["renew", "wait", "flush", "spin", "event", "{}", "event", "wait for event"]
    idle = ["renew", "wait", "{}", "wait"]
    expected = [line.format(half) for part in (span, idle) for half in ("ascend", "descend") for line in part]
    assert machine.log == expected
    assert (sample["ascend"], sample["descend"], sample["step"], sample["queued_ahead"]) == (1.0, 2.0, 3.0, 1.0)
    assert 0 < sample["host"] <= sample["wall"]


def test_peers_get_their_graphs_and_who_cannot_says_why(machine):
    machine.own_time = 2.0**-20
    kinds = all_providers(CPU)
    available = {name: kinds[name] for name in ("fsam_ext", "official", "foreach", "base")}
    case = Case(SMALL, "fp32", "sgd", tuple(available), 0.0)
    *_, rows = measure_steps(case, run_of(available))
    found = figures(rows)
    for name in ("fsam_ext", "foreach", "base"):
        assert found[f"{name} graph", "step"].median is not None
    assert found["official graph", "step"].note.startswith("not run: not captured: each step gives the weights another")
    # A replay a half (of 0.5 s), but none for the ascent that the base optimizer does not have.
    assert found["foreach graph", "step"].median == pytest.approx(1000, abs=0.1)
    assert found["base graph", "step"].median == pytest.approx(500, abs=0.1)
    for metric in ("host", "wall", "queued_ahead", "launches", "ascend"):
        assert found["foreach", metric].median is not None
    assert found["foreach graph", "speedup_over foreach"].samples == 5
    assert found["fsam_ext graph", "bus_fraction"].median is not None


def test_a_capture_that_fails_costs_its_graph_only_and_the_provider_begins_anew(machine, monkeypatch):
    machine.own_time = 2.0**-20
    made = []

    class Fragile(Foreach):
        name = "fsam_ext"

        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)

    def capture(call):
        call()  # the weights are perturbed now
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(gpu, "capture", capture)
    *_, rows = measure_steps(Case(SMALL, "fp32", "sgd", ("fsam_ext",), 0.0), run_of({"fsam_ext": Fragile}))
    found = figures(rows)
    assert found["fsam_ext graph", "step"].note == (
        "not run: RuntimeError: operation not permitted when stream is capturing"
    )
    assert found["fsam_ext", "step"].samples == 5
    assert len(made) == 2


def test_a_device_that_is_lost_in_a_capture_costs_that_provider_and_nobody_else(machine, monkeypatch):
    class Lost(Foreach):
        name = "lost"

        def __init__(self, *args):
            if gpu.capture is broken:
                raise RuntimeError("out of memory")
            super().__init__(*args)

    whole = gpu.capture

    def capture(call):
        if isinstance(call.__self__, Lost):
            monkeypatch.setattr(gpu, "capture", broken)
            raise RuntimeError("out of memory")
        return whole(call)

    def broken(call):
        raise AssertionError("nobody else is captured after it")

    monkeypatch.setattr(gpu, "capture", capture)
    machine.own_time = 2.0**-20
    kinds = {"fsam_ext": all_providers(CPU)["fsam_ext"], "lost": Lost}
    *_, rows = measure_steps(Case(SMALL, "fp32", "sgd", ("fsam_ext", "lost"), 0.0), run_of(kinds))
    found = figures(rows)
    assert found["lost", "step"].note == "not run: RuntimeError: out of memory (after its graph failed)"
    assert found["lost graph", "step"].note == "not run: RuntimeError: out of memory"
    assert found["fsam_ext", "step"].median is not None and found["fsam_ext graph", "step"].median is not None


def test_fused_bases_can_be_captured_with_adamw():
    class OnAGpu:
        is_cuda = True

    assert BASES["adamw"].for_graphs([OnAGpu()]) == {"capturable": True}
    assert BASES["sgd"].for_graphs([OnAGpu()]) == {}
    assert BASES["adamw"].for_graphs([torch.ones(1)]) == {}


# ---- Whole training steps ------------------------------------------------------------------------------------------


def trainer(machine, monkeypatch, kind):
    runner = TrainingRunner(kind, TRAININGS["train_convnet"], BASES["sgd"], CPU)
    monkeypatch.setattr(runner, "backward", lambda: machine.work("backward", 4.0))
    machine.log.clear()
    return runner


def test_training_steps_are_queued_several_at_a_time_and_waited_for_once(machine, monkeypatch):
    runner = trainer(machine, monkeypatch, provider_of(machine))
    sample = runner()
    step = ["backward", "event", "ascend", "event", "backward", "event", "descend", "event"]
    alone = ["backward", "ascend", "backward", "descend"]
    assert machine.log == ["wait", "event", *step * (1 + STEPS_ON_A_GPU), "wait", "wait", *alone, "wait"]
    assert (sample["step"], sample["optimizer"], sample["share"]) == (11.0, 3.0, 3 / 11)
    assert sample["host"] > 0


def test_the_step_that_leads_is_not_counted(machine, monkeypatch):
    runner = trainer(machine, monkeypatch, provider_of(machine))
    costs = iter([100.0, 100.0])
    monkeypatch.setattr(runner, "backward", lambda: machine.work("backward", next(costs, 4.0)))
    assert runner()["step"] == 11.0


def test_plain_training_makes_one_forward_backward(machine, monkeypatch):
    kind = provider_of(machine, passes=Plain.passes)
    sample = trainer(machine, monkeypatch, kind)()
    assert (sample["step"], sample["optimizer"]) == (6.0, 2.0)
    assert Plain.passes == 1 and all(other.passes == 2 for other in (Foreach, Official, SamByHand))


@pytest.mark.parametrize("name", ["train_gpt2", "train_resnet50"])
def test_models_of_a_gpus_size_train_in_autocast(machine, name):
    """Shrunk, with every provider that takes part."""
    machine.own_time = 2.0**-20
    kinds = all_providers(CPU)
    names = ("fsam_ext", "fsam_ext flat", "official", "foreach", "sam by hand", "base", "plain")
    work = TRAININGS[name].tiny()
    case = Case(work, work.dtype, work.base, names, 0.0)
    *_, rows = measure_training(case, run_of(kinds))
    found = figures(rows)
    assert {provider for provider, metric in found if metric == "step"} == set(names)
    assert all(row.dtype == "autocast" and row.median is not None for row in rows)
    assert ("fsam_ext", "cost_over_base") in found and ("base", "cost_over_plain") in found
    assert ("plain", "cost_over_base") not in found


def test_a_backward_leaves_float32_gradients_of_a_bfloat16_forward():
    work = TRAININGS["train_gpt2"].tiny()
    runner = TrainingRunner(all_providers(CPU)["base"], work, BASES["adamw"], CPU)
    seen = []
    runner.model.blocks[0].up.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    runner.backward()
    assert seen == [torch.bfloat16]
    assert {param.grad.dtype for param in runner.model.parameters()} == {torch.float32}
