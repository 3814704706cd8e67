"""docs/cuda-graphs.md on a CPU: what CUDA would record is recorded call by call, and replayed on the same memory."""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fsam_ext import FriendlySAM, flatten_parameters
from fsam_ext.step import held

from .conformance import identical

PAGE = (Path(__file__).parent.parent / "docs/cuda-graphs.md").read_text()
(RECIPE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero)


def tensors(*trees) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


def places(*trees) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(*trees)}


class Graph(TorchDispatchMode):
    """A graph of calls. Recording leaves memory as it was; a replay makes each call on the memory of the recording."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self._log = log
        self._calls: list[tuple] = []  # they keep their tensors, as a graph keeps its pool
        self._before: dict[int, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in WAITS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        own = places([call[3] for call in self._calls])
        for tensor in tensors(args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for storage, value in self._before.values():
            storage.copy_(value)

    def replay(self) -> None:
        self._log.append("replay")
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, recorded in self._calls:
                again = func(*args, **kwargs)
                inputs = places(args, kwargs)
                for old, new in zip(tensors(recorded), tensors(again), strict=True):
                    if not places(old) & inputs:  # neither a view nor written in place
                        old.copy_(new)


@pytest.fixture
def log(monkeypatch):
    """A CUDA of one CPU: what happens to its streams and graphs, in order."""
    events: list[str] = []
    capturing: list[Graph] = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def during(name):
        events.append(f"{name} begins")
        yield
        events.append(f"{name} ends")

    @contextmanager
    def graph(recorded):
        with during("capture"):
            capturing.append(recorded)
            try:
                with recorded:
                    yield
            finally:
                capturing.clear()

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: during(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(events))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cpu, "is_current_stream_capturing", lambda: bool(capturing), raising=False)
    # Held gradients are read when a kernel is called; a launch keeps their addresses, as lists do here.
    monkeypatch.setattr(held, "_REASON", "a test records what is called")
    return events


def network(dtype: torch.dtype, flat: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)).to(dtype)
    if flat:
        flatten_parameters(model, grads=True)
    return model


def some_batches(dtype: torch.dtype, count: int = 5):
    torch.manual_seed(1)
    return [(torch.randn(16, 20).to(dtype), torch.randint(10, (16,))) for _ in range(count)]


def run_recipe(model, batches, base="torch.optim.SGD", options="momentum=0.9") -> dict:
    """The page's lines, on the CPU; returns their names."""
    recipe = RECIPE.replace('"cuda"', '"cpu"').replace("torch.optim.SGD", base).replace("momentum=0.9", options)
    names = {"model": model, "batches": iter(batches)}
    exec(compile(recipe, "docs/cuda-graphs.md", "exec"), names)
    return names


def eager_step(model, optimizer, x, y):
    def closure():
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return optimizer.step(closure)


def assert_same(model, optimizer, other, other_optimizer):
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert identical(one.detach(), two.detach())
        mine, theirs = optimizer.state[one], other_optimizer.state[two]
        assert mine.keys() == theirs.keys() and len(mine) >= 2
        assert all(identical(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("flat", (False, True), ids=("", "flat"))
@pytest.mark.parametrize(
    "dtype, base, options",
    (
        (torch.float32, "SGD", "momentum=0.9"),
        (torch.float32, "AdamW", "weight_decay=0.1, ema='updated'"),
        (torch.float32, "SGD", "nesterov=True, momentum=0.9, ema_dtype=torch.int8"),
        (torch.bfloat16, "AdamW", "master_weights=True"),
        (torch.bfloat16, "AdamW", "stochastic_rounding=True, ema_source='descent'"),
    ),
)
def test_the_recipe_trains_as_ordinary_steps_do(dtype, base, options, flat, log):
    batches = some_batches(dtype)
    model, twin = network(dtype, flat), network(dtype, flat)
    names = run_recipe(model, copy.deepcopy(batches), f"torch.optim.{base}", options)
    assert log == [
        *("side waits for main", "side begins", "side ends", "main waits for side"),
        *("capture begins", "capture ends", *["replay"] * 4),
    ]
    lr = torch.tensor(0.1)
    optimizer = FriendlySAM(twin.parameters(), getattr(torch.optim, base), lr=lr, **eval(f"dict({options})"))
    for x, y in [batches[0]] * 3 + batches[1:]:
        loss = eager_step(twin, optimizer, x, y)
    assert identical(names["loss"].detach(), loss.detach())
    assert_same(model, names["optimizer"], twin, optimizer)
    for name, value in optimizer.stats().items():
        assert identical(names["optimizer"].stats()[name], value), name

    names["lr"].mul_(0.5), lr.mul_(0.5)  # what is read on the device may change
    names["graph"].replay()
    eager_step(twin, optimizer, *batches[-1])
    assert_same(model, names["optimizer"], twin, optimizer)

    before = [param.detach().clone() for param in model.parameters()]
    names["x"].fill_(torch.inf)  # a step that is not finite is skipped on the device
    names["graph"].replay()
    assert all(map(torch.equal, before, model.parameters()))
    eager_step(twin, optimizer, names["x"], batches[-1][1])
    for x, y in batches[:2]:  # and ordinary steps may come between replays
        eager_step(model, names["optimizer"], x, y)
        eager_step(twin, optimizer, x, y)
        names["x"].copy_(y[:, None] + x)
        names["graph"].replay()
        eager_step(twin, optimizer, names["x"], batches[-1][1])
        assert_same(model, names["optimizer"], twin, optimizer)


def test_the_recorder_records_numbers_as_they_are(log):
    """The emulation has teeth: a learning rate that is a number stays what it was."""
    model, (batch,) = network(torch.float32, False), some_batches(torch.float32, 1)
    optimizer = FriendlySAM(model.parameters(), lr=0.1)
    eager_step(model, optimizer, *batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        eager_step(model, optimizer, *batch)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [param.detach().clone() for param in model.parameters()]
    graph.replay()
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("base", (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop))
def test_state_is_not_made_in_a_capture(base, log):
    model, (batch,) = network(torch.float32, False), some_batches(torch.float32, 1)
    optimizer = FriendlySAM(model.parameters(), base, lr=0.1)
    before = [param.detach().clone() for param in model.parameters()]

    def refused():
        graph = torch.cuda.graph(torch.cuda.CUDAGraph())
        with pytest.raises(RuntimeError, match="has state to make.*make one step, both passes, before"), graph:
            eager_step(model, optimizer, *batch)

    refused()
    assert not optimizer.state and all(map(torch.equal, before, model.parameters()))
    eager_step(model, optimizer, *batch)
    optimizer.load_state_dict(optimizer.state_dict())
    before = [param.detach().clone() for param in model.parameters()]
    refused()  # the loaded state has yet to move into the flat buffers
    assert all(map(torch.equal, before, model.parameters()))
    eager_step(model, optimizer, *batch)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        eager_step(model, optimizer, *batch)


@pytest.mark.parametrize("options", [{}, {"sigma": 0.0}, {"reuse_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("groups", (1, 2))
def test_a_graph_for_each_kind_of_step_of_a_schedule_with_reuse(groups, options, log):
    data = some_batches(torch.float32, 9)
    models = [network(torch.float32, False) for _ in range(2)]

    def make(model):
        params = list(model.parameters())
        split = [{"params": params[i::groups]} for i in range(groups)]
        return FriendlySAM(split, torch.optim.AdamW, lr=torch.tensor(0.1), every=2, reuse=0.4, **options)

    optimizer, twin = map(make, models)
    x, y = (part.clone() for part in data[0])
    for _ in range(2):
        eager_step(models[0], optimizer, x, y)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]  # a step with an ascent, and one without
    for graph in graphs:
        with torch.cuda.graph(graph):
            eager_step(models[0], optimizer, x, y)
    for number, batch in enumerate([data[0]] * 2 + data[1:]):
        eager_step(models[1], twin, *batch)
        if number > 1:
            x.copy_(batch[0]), y.copy_(batch[1])
            graphs[number % 2].replay()
    assert_same(models[0], optimizer, models[1], twin)
    norms = [one.param_groups[0]["fsam_reuse_sq"] for one in (optimizer, twin)]
    assert identical(*norms) and norms[0] > 0
