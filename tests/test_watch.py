"""What tells that ``state`` holds other tensors than were put there sees every change, and takes no use for one."""

from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
from torch.nn import Parameter
from torch.optim import AdamW

from fsam_ext import FriendlySAM, _library
from fsam_ext.state import watch

NEEDS_CPU_LIBRARY = pytest.mark.skipif(_library.CPU_REASON is not None, reason=str(_library.CPU_REASON))


@pytest.fixture(params=[pytest.param("C", marks=NEEDS_CPU_LIBRARY), "Python"])
def language(request, monkeypatch):
    """The comparison in either language."""
    if request.param == "Python":
        monkeypatch.setattr(watch, "_HOLDS", None)
    return request.param


def watched(shapes):
    """(an optimizer whose state has been made, its watch)."""
    params = [Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = FriendlySAM(params, AdamW, lr=0.01)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.first_step()
    optimizer.second_step()
    return optimizer, optimizer._passes.layout._known.state


@NEEDS_CPU_LIBRARY
def test_the_comparison_is_in_c_where_it_was_built():
    assert isinstance(watched([(2, 3)])[1]._look, watch._LookInC)


# ---- What is seen: of an entry and one of its tensors --------------------------------------------------------------

kept = []


def kept_data(value):
    kept.append(value.data)
    return value.data


OBJECTS = {
    "replaced by an equal one": lambda entry, name: entry.update({name: entry[name].clone()}),
    "removed": lambda entry, name: entry.pop(name),
    "one more": lambda entry, name: entry.update(another=entry[name]),
    "put last": lambda entry, name: entry.update({name: entry.pop(name)}),
    "memory let go": lambda entry, name: setattr(entry[name], "data", entry[name].data.clone()),
    "memory shared between processes": lambda entry, name: entry[name].share_memory_(),
    "none left": lambda entry, name: entry.clear(),
}
PLACES = {
    "other memory": lambda entry, name: setattr(entry[name], "data", kept_data(entry[name]).clone()),
    "transposed": lambda entry, name: entry[name].transpose_(0, 1),
    "transposed by data": lambda entry, name: setattr(entry[name], "data", entry[name].data.transpose(0, 1)),
    "two dimensions swapped at the end": lambda entry, name: entry[name].transpose_(-1, -2),
    "flattened": lambda entry, name: setattr(entry[name], "data", entry[name].data.view(-1)),
    "one dimension more": lambda entry, name: entry[name].unsqueeze_(0),
    "a part of it": lambda entry, name: setattr(entry[name], "data", entry[name].data[1:]),
    "strides": lambda entry, name: entry[name].as_strided_(entry[name].shape, [0] * entry[name].dim()),
    "set": lambda entry, name: entry[name].set_(kept_data(entry[name]).clone()),
}
SHAPES = ((3, 3), (3, 4), (3, 3, 3), (2, 3, 2, 3, 3), (2, 1, 3, 2, 3, 3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("edit", [*OBJECTS, *PLACES])
def test_an_edit_is_seen(edit, shape, language):
    optimizer, look = watched([(5,), shape, ()])
    entry = list(optimizer.state.values())[1]
    assert look.holds(optimizer.state) and look.holds(optimizer.state, in_place=False)
    (OBJECTS | PLACES)[edit](entry, "exp_avg_sq")
    assert not look.holds(optimizer.state)
    assert look.holds(optimizer.state, in_place=False) == (edit in PLACES)


@pytest.mark.parametrize("edit", ("removed", "another", "replaced", "cleared", "no dict"))
def test_an_edit_of_entries_is_seen(edit, language):
    optimizer, look = watched([(4,)] * 3)
    state, (first, second, third) = optimizer.state, optimizer.state
    if edit == "removed":
        state.pop(third)
    elif edit == "another":
        state[Parameter(torch.ones(4))] = {}
    elif edit == "replaced":
        state[second] = dict(state[second], exp_avg=torch.ones(4))
    elif edit == "cleared":
        state.clear()
    else:
        state[first] = 3
    assert not look.holds(state, in_place=False)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("count", (1, 255, 256, 257, 1500))
def test_an_edit_of_any_of_many_is_seen_by_several_threads(count, language):
    optimizer, look = watched([(2, 2)] * count)
    params = list(optimizer.state)
    for number in sorted({0, count // 3, count - 1}):
        value = optimizer.state[params[number]]["exp_avg"]
        value.t_()
        assert not look.holds(optimizer.state) and look.holds(optimizer.state, in_place=False)
        value.t_()
        assert look.holds(optimizer.state)
        entry = optimizer.state[params[number]]
        entry["exp_avg"] = value.clone()
        assert not look.holds(optimizer.state, in_place=False)
        entry["exp_avg"] = value
        assert look.holds(optimizer.state)


# ---- What is no change ---------------------------------------------------------------------------------------------


def multiplied_in_a_graph(value):
    weight = torch.ones((), requires_grad=True)
    (value * weight).sum().backward()
    assert weight.grad is not None


USES = {
    "written": lambda value: value.mul_(2),
    "read": lambda value: (value.sum().item(), value.grad, value._version, value.requires_grad, repr(value)),
    "saved": lambda value: torch.save(value, io.BytesIO()),
    "copied": copy.deepcopy,
    "viewed": lambda value: (value.view(-1), value.t() if value.dim() == 2 else None, value[...], value.detach()),
    "view written": lambda value: value.view(-1).add_(1),
    "in a graph": multiplied_in_a_graph,
    "as numpy": lambda value: value.numpy(),
    "exported": torch.utils.dlpack.to_dlpack,
    "a weak reference": weakref.ref,
    "an attribute": lambda value: setattr(value, "note", "mine"),
    "data written": lambda value: value.data.zero_(),
}


@pytest.mark.parametrize("use", USES)
def test_a_use_is_no_edit(use, language):
    optimizer, look = watched([(3, 4), (5,)])
    held = []
    for entry in optimizer.state.values():
        held += [USES[use](value) for value in entry.values()]
        assert look.holds(optimizer.state)
    del held
    assert look.holds(optimizer.state)
