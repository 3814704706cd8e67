"""Ctrl-C at any line and a signal at any moment: interrupts.py says what may be left then.

``-m large``, or ``python -m tests.interrupts``, injects at every line of every case. Here each line of the source that
the commonest cases reach is tried once; of the other cases' lines a third, another one in each run.
"""

from __future__ import annotations

import random
import signal
import time
import warnings
from contextlib import suppress

import pytest
import torch
from torch.nn import Parameter

from fsam_ext import FriendlySAM
from fsam_ext.step.transaction import Journal, Transaction

from .interrupts import CASES, Injector, a_third_of_them, each_line_once, every_line, failures, interrupted_at

# Cold steps lay out state, warm ones do not: each case once, the commonest both ways.
QUICK = [(name, 1) for name in CASES]
QUICK += [(name, 0) for name in ("AdamW closure", "SGD", "int8 average", "flattened", "reuse")]
QUICK += [("reuse", 2), ("reuse closure", 2)]  # between two ascents, and where there is something to lose
WHOLE = ("AdamW closure", "SGD")


@pytest.mark.parametrize("name, warm", QUICK, ids=lambda v: v if isinstance(v, str) else ("cold", "warm", "warmer")[v])
def test_an_interrupt_at_each_line(name, warm):
    tried, found = failures(CASES[name], warm, each_line_once if name in WHOLE else a_third_of_them)
    assert tried > 50 and found == []


@pytest.mark.large
@pytest.mark.parametrize("warm", (0, 1), ids=("cold", "warm"))
@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_at_every_line(name, warm, capsys):
    tried, found = failures(CASES[name], warm, every_line)
    with capsys.disabled():
        print(f" {name}: {tried} injections, {len(found)} failures")
    assert found == []


@pytest.mark.parametrize(
    "owner, method, broken",
    (
        (Journal, "count", lambda self: 0),  # nobody knows what was perturbed, or updated
        (Transaction, "restore_weights", lambda self: []),
        (Transaction, "finish", lambda self: self.close()),
    ),
    ids=("no journal", "no restore", "no update"),
)
def test_a_transaction_that_is_broken_is_noticed(owner, method, broken, monkeypatch):
    injector = Injector(CASES["SGD"], 1)
    monkeypatch.setattr(owner, method, broken)
    with suppress(RuntimeError):  # or the step says so itself
        assert any(injector.at(number) for number in range(0, 1200, 7))


# ---- Real signals ----------------------------------------------------------------------------------------------------


def interrupted(action) -> bool:
    """Runs ``action``, in which alone an alarm raises KeyboardInterrupt; returns whether one did."""
    try:
        action()
    except KeyboardInterrupt:
        return True
    return False


def interrupt_the_action(number, frame):
    """SIGALRM, as Ctrl-C; but one that comes late, between two actions, would end the tests, and raises nothing."""
    while frame is not None and frame.f_back is not None:
        if frame.f_back.f_code is interrupted.__code__:
            raise KeyboardInterrupt
        frame = frame.f_back


@pytest.fixture
def alarms():
    """SIGALRM raises KeyboardInterrupt, as SIGINT does; kernels run on one thread."""
    before, threads = signal.signal(signal.SIGALRM, interrupt_the_action), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)  # a signal may come while torch.no_grad ends, too


def large(dtypes=(torch.float32, torch.float32, torch.float64)):
    params = [Parameter(torch.randn(300_000, dtype=dtype)) for dtype in dtypes]
    return params, [torch.randn_like(param) for param in params]


def duration_of(step) -> float:
    step()
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


@pytest.mark.parametrize("base", (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop))
def test_a_signal_at_any_moment_of_a_closure_step(base, alarms):
    """With lr = 0 a step leaves the weights as they are, whether it was made or not."""
    params, grads = large()
    optimizer = FriendlySAM(params, base, rho=1.0, lr=0.0, **({} if base is torch.optim.AdamW else {"momentum": 0.9}))
    before = [param.detach().clone() for param in params]

    def closure():
        for param, grad in zip(params, grads):
            param.grad = grad
        return torch.zeros(())

    duration = duration_of(lambda: optimizer.step(closure))
    hits, choice = 0, random.Random(0)
    for _ in range(150):
        signal.setitimer(signal.ITIMER_REAL, max(1e-5, duration * choice.random()))
        if interrupted(lambda: optimizer.step(closure)):
            hits += 1
            assert not optimizer.is_perturbed
            assert all(map(torch.equal, before, params))
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert hits > 20


def test_a_storm_of_signals(alarms):
    """Ctrl-C again and again, in the handlers too: restore() mends it, however often it takes to get through."""
    params, grads = large()
    optimizer = FriendlySAM(params, rho=1.0, lr=0.0, momentum=0.9)
    before = [param.detach().clone() for param in params]

    def step():
        for half in (optimizer.first_step, optimizer.second_step):
            for param, grad in zip(params, grads):
                param.grad = grad
            half()

    duration = duration_of(step)
    hits = 0
    for turn in range(40):
        signal.setitimer(signal.ITIMER_REAL, duration * (turn % 10 + 1) / 12, duration * (1 + turn % 5) / 10)
        if interrupted(step):
            hits += 1
            for _ in range(3):
                interrupted(optimizer.restore)
        signal.setitimer(signal.ITIMER_REAL, 0)
        optimizer.restore()
        assert all(map(torch.equal, before, params))
    assert hits > 5


# ---- State at rest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", (torch.optim.AdamW, torch.optim.NAdam))
@pytest.mark.parametrize("what", ("load", "move"))
def test_an_interrupt_while_state_is_loaded_or_moved(base, what):
    """Loaded wholly or not at all; and state that was moved in part is state all the same."""

    def trained(steps):
        params = [Parameter(torch.linspace(-1, 1, n)) for n in (5, 1)]
        optimizer = FriendlySAM(params, base, lr=0.1)
        for number in range(steps):
            train(params, optimizer, number)
        return params, optimizer

    def train(params, optimizer, number):
        for half in (optimizer.first_step, optimizer.second_step):
            for param in params:
                param.grad = (param.detach() - number).sin()
            half()

    def values(optimizer):
        groups = [{**group, "params": None} for group in optimizer.param_groups]
        return groups, [[value.tolist() for value in entry.values()] for entry in optimizer.state.values()]

    saved = trained(3)[1].state_dict()
    lines: list[tuple[str, int]] = []
    params, optimizer = trained(1)
    with interrupted_at(-1, lines):
        optimizer.load_state_dict(saved) if what == "load" else optimizer.move_state("cpu")
    choices = [values(trained(1)[1]), values(optimizer)]
    for number in each_line_once(lines):
        params, optimizer = trained(1)
        with suppress(KeyboardInterrupt), interrupted_at(number):
            optimizer.load_state_dict(saved) if what == "load" else optimizer.move_state("cpu")
        assert values(optimizer) in choices
        twin = [Parameter(param.detach().clone()) for param in params]
        other = FriendlySAM(twin, base, lr=0.1)
        other.load_state_dict(optimizer.state_dict())
        train(params, optimizer, 9)
        train(twin, other, 9)
        assert all(map(torch.equal, params, twin))


# ---- Warnings that are errors ----------------------------------------------------------------------------------------


def test_warnings_that_are_errors_come_after_the_step():
    param = Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = FriendlySAM([param], lr=0.0, rho=0.0076)
    param.grad = torch.arange(1.0, 9.0).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.first_step()
        assert optimizer.is_perturbed
        with pytest.raises(UserWarning, match="leaves little of the perturbation"):
            optimizer.second_step()
    assert not optimizer.is_perturbed and param.eq(1).all()
    assert optimizer.param_groups[0]["fsam_step"] == 1
    optimizer.first_step()
    optimizer.second_step()


def test_a_warning_is_at_the_line_of_the_user():
    param = Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = FriendlySAM([param], lr=0.0, rho=0.0076)
    param.grad = torch.arange(1.0, 9.0).bfloat16()
    optimizer.first_step()
    with pytest.warns(UserWarning, match="leaves little") as caught:
        optimizer.second_step()
    assert caught[0].filename == __file__
