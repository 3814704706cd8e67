"""What users do on a GPU with torch's own parts: autocast, GradScaler, moves, checkpoints, compilation, graphs, NCCL.

Each test runs on the CPU too, with gloo for NCCL and a call for a graph, so that nothing here is met for the first time
on a GPU. Under autocast, and where weights move, a run is told again (tests/told_again.py).

NOTE [two runs in float64]
Where no 16-bit number is involved, the run is repeated on the CPU in float64. Roundings of 1e-16 stay far below 1e-12
over the few layers and steps here; a second gradient at the wrong weights shows at 1e-2.
"""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fsam_ext import FriendlySAM

from .distributed import training
from .told_again import assert_told_again, finite, make, numbers, run

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = pytest.mark.parametrize("device", DEVICES)

BASES = ["sgd", "adamw"]
SAME = 1e-12  # NOTE [two runs in float64]


# ---- What is trained ------------------------------------------------------------------------------------------------


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 9, 10),
    )  # fmt: skip


def batches(count: int, device: str, *shape: int) -> list[tuple[Tensor, Tensor]]:
    drawn = [(torch.randn(32, *shape), torch.randint(10, (32,))) for _ in range(count)]
    return [(x.to(device), y.to(device)) for x, y in drawn]


def moved(model: nn.Module, device: str) -> nn.Module:
    """``model.to(device)``; on a CPU, where that moves nothing, the same weights in other memory."""
    return model.to(device) if device != "cpu" else model._apply(torch.clone)


# ---- Precision ------------------------------------------------------------------------------------------------------


def test_gradscaler_in_fp16_autocast_with_steps_that_overflow(device):
    """Scales that fp16 cannot hold come down; an inf in the second pass alone skips the update too."""
    model = classifier().to(device)
    start = numbers(model.parameters())
    scaler = torch.amp.GradScaler(device, init_scale=2.0**30, growth_interval=1000)
    steps = run(
        model, make(model), batches(40, device, 20), lambda: torch.autocast(device, torch.float16), scaler,
        poison=lambda step: step == 38,
    )  # fmt: skip
    first, second = ([finite(gradients) for gradients in half] for half in zip(*((s.first, s.second) for s in steps)))
    assert not first[0] and first[38] and not second[38] and second[39]
    bad = sum(not (a and b) for a, b in zip(first, second))
    assert scaler.get_scale() == 2.0 ** (30 - bad)  # each bad step backs off once
    assert_told_again(start, steps)


def test_bf16_autocast(device):
    model = classifier().to(device)
    start = numbers(model.parameters())
    steps = run(model, make(model), batches(8, device, 20), lambda: torch.autocast(device, torch.bfloat16))
    assert_told_again(start, steps)


# ---- Where parameters are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients_too", [False, True], ids=["weights", "weights and batches"])
def test_channels_last(device, gradients_too):
    model = convnet().to(device, memory_format=torch.channels_last)
    start = numbers(model.parameters())
    data = batches(6, device, 3, 8, 8)
    if gradients_too:
        data = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in data]
    optimizer = make(model)
    steps = run(model, optimizer, data)
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert_told_again(start, steps)


@pytest.mark.parametrize("before", [0, 3])
def test_a_model_moved_after_its_optimizer_was_made(device, before):
    model = classifier()
    start, optimizer = numbers(model.parameters()), make(model)
    steps = run(model, optimizer, batches(before, "cpu", 20))
    old = [param.data_ptr() for param in model.parameters()]
    moved(model, device)
    assert all(param.data_ptr() != pointer for param, pointer in zip(model.parameters(), old))
    steps += run(model, optimizer, batches(4, device, 20))
    assert_told_again(start, steps)
    assert all(optimizer.state[param]["fsam_ema"].device == param.device for param in model.parameters())


def through_a_file(model: nn.Module, optimizer: FriendlySAM, device: str, map_location: str | None, make_again: Any):
    """Another model and optimizer on another device, from what a file holds of these."""
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, map_location=map_location, weights_only=True)
    again = copy.deepcopy(model).to(device)
    for param in again.parameters():
        nn.init.zeros_(param)
    optimizer = make_again(again)
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return again, optimizer


@pytest.mark.parametrize("map_location", [True, False], ids=["mapped", "as saved"])
def test_checkpoints_from_cpu_to_device_and_back(device, map_location):
    model = classifier()
    start, optimizer = numbers(model.parameters()), make(model)
    steps = run(model, optimizer, batches(3, "cpu", 20))
    model, optimizer = through_a_file(model, optimizer, device, device if map_location else None, make)
    steps += run(model, optimizer, batches(3, device, 20))
    model, optimizer = through_a_file(model, optimizer, "cpu", "cpu" if map_location else None, make)
    steps += run(model, optimizer, batches(3, "cpu", 20))
    assert_told_again(start, steps)


# ---- NOTE [two runs in float64] -------------------------------------------------------------------------------------


def on(device: str, data: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(device), y.to(device)) for x, y in data]


def alone(base: str, count: int) -> Tensor:
    """All weights after each step of a run on the CPU."""
    return training.train_alone(training.batches(count), base)[0]


def train(model: nn.Module, optimizer: FriendlySAM, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    return training.train(model, optimizer, data, part=lambda batch: batch).cpu()


@pytest.mark.parametrize("base", BASES)
def test_the_same_run_on_the_cpu(device, base):
    model = training.network().to(device)
    history = train(model, training.make(model, base), on(device, training.batches(8)))
    assert training.distance(history, alone(base, 8)) < SAME


@pytest.mark.parametrize("brought_back", [False, True], ids=["left to the next step", "brought back"])
@pytest.mark.parametrize("base", [*BASES, "rmsprop"])
def test_state_moved_to_the_cpu_and_back(device, base, brought_back):
    """It frees the GPU's memory, the backup's too, and the run goes on as one whose state stayed."""
    runs = []
    for moves in (False, True):
        model = training.network().to(device)
        optimizer = training.make(model, base)
        history = [train(model, optimizer, on(device, training.batches(3)))]
        if moves:
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            optimizer.move_state("cpu")
            assert all(value.device.type == "cpu" for entry in optimizer.state.values() for value in entry.values())
            assert device == "cpu" or torch.cuda.memory_allocated() < before
            if brought_back:
                optimizer.move_state()
                exps = [entry["fsam_ema"] for entry in optimizer.state.values()]
                assert all(value.device.type == device for value in exps)
        history.append(train(model, optimizer, on(device, training.batches(3, first=3))))
        runs.append(torch.cat(history))
    assert training.distance(runs[1], runs[0]) < SAME


@pytest.mark.parametrize("base", BASES)
def test_checkpoints_resume_the_run_of_the_other_device(device, base):
    data = training.batches(8)
    model = training.network()
    optimizer = training.make(model, base)
    history = [train(model, optimizer, data[:4])]
    make_again = lambda again: training.make(again, base)  # noqa: E731
    model, optimizer = through_a_file(model, optimizer, device, None, make_again)
    history.append(train(model, optimizer, on(device, data[4:])))
    assert training.distance(torch.cat(history), alone(base, 8)) < SAME


@pytest.mark.parametrize("base", BASES)
def test_a_compiled_model(device, base):
    """Inductor on a GPU; on a CPU, where it would call a C++ compiler for half a minute, what comes before it."""
    torch._dynamo.reset()
    model = training.network().to(device)
    compiled = torch.compile(model, backend="inductor" if device == "cuda" else "aot_eager")
    optimizer = training.make(compiled, base)
    history = train(compiled, optimizer, on(device, training.batches(8)))
    assert training.distance(history, alone(base, 8)) < SAME


def captured(step: Callable[[], None], device: str, warm_up: int) -> Callable[[], None]:
    """A graph of a step after some steps in eager, as torch's documentation says; on a CPU the step itself."""
    if device == "cpu":
        for _ in range(warm_up):
            step()
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize("base", BASES)
def test_a_whole_step_in_a_graph(device, base):
    """Both forward-backwards and the optimizer; batches and learning rate change between replays."""
    data, model = on(device, training.batches(8)), training.network().to(device)
    rate = torch.tensor(0.05 if base == "sgd" else 1e-2, dtype=torch.float64, device=device)
    optimizer = training.make(model, base, lr=rate, capturable=True)
    x, y = (part.clone() for part in data[0])

    def step() -> None:
        for finish in (optimizer.first_step, optimizer.second_step):
            training.backward(model, (x, y))
            finish()
            optimizer.zero_grad(set_to_none=False)

    replay, history = captured(step, device, warm_up=3), []
    twin = training.network()
    plain = training.make(twin, base)
    train(twin, plain, [training.batches(1)[0]] * 3)
    for index, batch in enumerate(data):
        for mine, given in zip((x, y), batch):
            mine.copy_(given)
        rate.mul_(0.9)
        plain.param_groups[0]["lr"] *= 0.9
        replay()
        history.append(training.vector(model.parameters()).cpu())
        expected = train(twin, plain, [training.batches(8)[index]])[-1]
        assert training.distance(history[-1], expected) < SAME, f"replay {index}"


# ---- Ranks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank(device, tmp_path):
    """A process group of this process alone: NCCL on a GPU, gloo on a CPU."""
    options = {"device_id": torch.device("cuda", 0)} if device == "cuda" else {}
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1, **options)
    yield
    # DDP's reducer must not be the last one to hold the group: it would end gloo's threads with the GIL held, for which
    # one of them may wait. Then a later test that collects this one's garbage never ends.
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.parametrize("base", BASES)
def test_ddp(device, one_rank, base):
    model = DistributedDataParallel(training.network().to(device))
    history = train(model, training.make(model, base), on(device, training.batches(8)))
    assert training.distance(history, alone(base, 8)) < SAME


@pytest.mark.parametrize("base", BASES)
def test_fully_shard(device, one_rank, base):
    mesh = init_device_mesh(device, (1,))
    model = training.network().to(device)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    optimizer = training.make(fully_shard(model, mesh=mesh), base)
    history = train(model, optimizer, on(device, training.batches(8)))
    assert training.distance(history, alone(base, 8)) < SAME
    assert all(value.isfinite() for value in optimizer.stats().values())
