"""The package stays a house that a newcomer finds the way in: arrows run down, nothing is too large."""

from __future__ import annotations

import pytest

from . import house

LIMITS = {"file": 400, "class": 350, "function": 60}


@pytest.fixture(scope="module")
def modules():
    return house.read()


def test_arrows_run_down(modules):
    assert house.upward(modules) == []


def test_there_are_no_circles(modules):
    assert house.circles(modules) == []


@pytest.mark.parametrize("kind", LIMITS)
def test_nothing_is_too_large(modules, kind):
    lines, name = house.largest(modules)[kind]
    assert lines <= LIMITS[kind], name


def test_a_circle_and_an_arrow_that_runs_up_are_noticed():
    drawn = {
        "step.a": house.Module("step.a", 1, {"state.b"}),
        "state.b": house.Module("state.b", 1, {"step.a"}),
    }
    assert house.circles(drawn) == ["step.a -> state.b -> step.a"]
    assert house.upward(drawn) == ["state.b -> step.a"]


def test_all_imports_are_seen(modules):
    assert "step.passes" in modules["stateful"].imports
    assert "backends.ops" in modules["backends.reference"].imports
    assert modules["info"].imports >= {"backends.__init__", "step.held", "_library"}
