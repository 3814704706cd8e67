"""Sharded parameters in low precision: masters, averages in bfloat16, GradScaler, and what rounding leaves."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_module, init_device_mesh

from fsam_ext import SAM, FriendlySAM
from fsam_ext.step import protocol

from ..conformance import identical
from .ranks import run
from .test_fsdp import sharded
from .training import SGD, AdamW, backward, batches, shard, train, vector

HALF = 4
LOW = {
    "masters": {"master_weights": True, "ema_dtype": torch.bfloat16},
    "stochastic": {"stochastic_rounding": True, "rounding_seed": 3},
}


def everything(model, optimizer):
    names = sorted(name for name in optimizer.state[optimizer.param_groups[0]["params"][0]] if name != "step")
    params = list(model.parameters())
    return {**{name: vector(optimizer.state[p][name] for p in params) for name in names}, "weights": vector(params)}


def saved_and_resumed(path, layout, options):
    """4 + 4 steps and 8 steps, in bfloat16."""
    kwargs = {"rho": 0.2, "lr": 1e-2, **LOW[layout]}
    model = sharded(dtype=torch.bfloat16)
    optimizer = FriendlySAM(model.parameters(), AdamW, **kwargs)
    train(model, optimizer, batches(HALF, torch.bfloat16))
    options = StateDictOptions(**options)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options)))
    dcp.save(states, checkpoint_id=path)
    saved = everything(model, optimizer)
    dtypes = {name: {value.dtype for value in values} for name, values in _values(optimizer).items()}
    kinds = {type(value) for name, values in _values(optimizer).items() if name != "step" for value in values}
    history = train(model, optimizer, batches(HALF, torch.bfloat16, first=HALF))

    other = sharded(dtype=torch.bfloat16)
    fresh = FriendlySAM(other.parameters(), AdamW, **kwargs)
    states = dict(zip(("model", "optimizer"), get_state_dict(other, fresh, options=options)))
    dcp.load(states, checkpoint_id=path)
    set_state_dict(
        other, fresh, model_state_dict=states["model"], optim_state_dict=states["optimizer"], options=options
    )
    loaded = everything(other, fresh)
    again = train(other, fresh, batches(HALF, torch.bfloat16, first=HALF))
    assert all(identical(loaded[name], saved[name]) for name in saved) and loaded.keys() == saved.keys()
    assert kinds == {DTensor}
    assert identical(history, again)
    return dtypes, vector(other.parameters())


def _values(optimizer):
    found = {}
    for entry in optimizer.state.values():
        for name, value in entry.items():
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("options", [{}, {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}], ids=str)
@pytest.mark.parametrize("layout", LOW)
def test_checkpoints_keep_dtypes_and_bits(layout, options, tmp_path):
    results = run(2, saved_and_resumed, str(tmp_path / "checkpoint"), layout, options)
    for dtypes, weights in results:
        assert identical(weights, results[0][1])
        assert dtypes["fsam_ema"] == ({torch.bfloat16} if layout == "masters" else {torch.float32})
        assert ("fsam_master" in dtypes) == (layout == "masters")


def what_rounding_leaves(reduce_dtype):
    """The sums over all ranks of what stats() says of each one's shards, and the same from the weights themselves."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    model = sharded(dtype=torch.float32, mp_policy=policy)
    optimizer = FriendlySAM(model.parameters(), SGD, rho=1e-3, lr=0.1, forward_dtype=torch.bfloat16)
    (x, y), *_ = batches(1, torch.float32)
    params = [p.to_local().detach() for p in model.parameters()]
    before = torch.cat([p.flatten() for p in params]).clone()
    backward(model, shard((x, y.bfloat16())))
    grads = torch.cat([p.grad.to_local().flatten() for p in model.parameters()]).double()
    norm = grads.square().sum()
    dist.all_reduce(norm)
    optimizer.first_step()
    after = torch.cat([p.flatten() for p in params])
    intended = 1e-3 * grads / norm.sqrt()
    effective = after.bfloat16().double() - before.bfloat16().double()
    stats = optimizer.stats()
    expected = effective.norm(), torch.cosine_similarity(effective, intended, dim=0)
    return [float(stats[name]) for name in ("effective_norm", "effective_cosine")], list(map(float, expected))


@pytest.mark.filterwarnings("ignore:rounding to bfloat16")
@pytest.mark.parametrize("reduce_dtype", [torch.float32, None], ids=str)
def test_a_mixed_precision_policy_and_what_rounding_leaves(reduce_dtype):
    """A small rho in bfloat16 forwards: the statistic has to tell how little of it the model sees."""
    for found, expected in run(2, what_rounding_leaves, reduce_dtype):
        assert found == pytest.approx(expected, rel=1e-4)
        assert found[0] > 0 and found[1] < 0.9


def scaled(where):
    """Steps with a GradScaler, the gradient of one rank inf in one pass of one step."""
    model = sharded(dtype=torch.float16)
    optimizer = FriendlySAM(model.parameters(), SGD, rho=0.05, lr=0.05, momentum=0.9, master_weights=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    moved, scales = [], []
    for step, (x, y) in enumerate(batches(4, torch.float16)):
        before = vector(model.parameters())
        for name in ("first", "second"):
            loss = (model(shard((x, y))[0]) - shard((x, y))[1]).square().mean()
            scaler.scale(loss).backward()
            if (step, name) == (2, where) and dist.get_rank() == 1:
                model[0].weight.grad.to_local()[0, 0] = torch.inf
            if name == "first":
                optimizer.first_step(zero_grad=True, grad_scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(not torch.equal(vector(model.parameters()), before))
        scales.append(scaler.get_scale())
    return moved, scales, vector(model.parameters()).isfinite().all().item()


@pytest.mark.parametrize("where", ["first", "second"])
def test_one_rank_s_overflow_with_a_grad_scaler(where):
    """All skip, and every rank's scale comes down once."""
    for moved, scales, finite in run(2, scaled, where):
        assert moved == [True, True, False, True] and finite
        assert scales == [64.0, 64.0, 32.0, 32.0]


class Descent(torch.optim.Optimizer):
    """A base that is not fused."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(param.grad, alpha=-group["lr"])


def unscaled(placement):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    param = torch.nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Replicate()]))
    optimizer = SAM([param], Descent, rho=0.0, lr=0.5)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(16.0), torch.zeros(())
    protocol.check_scaler = lambda *_: None  # in this process only
    for half in (optimizer.first_step, optimizer.step):
        param.grad = DTensor.from_local(torch.full((4,), 8.0), mesh, [placement])
        half()
    return param.to_local().tolist()


@pytest.mark.parametrize("placement, expected", [(Partial(), 0.5), (Replicate(), 0.75)])
def test_a_gradient_that_lies_otherwise_is_unscaled_for_another_base(placement, expected):
    """The sum of two addends of 8, and 8, over a scale of 16."""
    assert run(2, unscaled, placement) == [[expected] * 4] * 2


def converted():
    model = distribute_module(torch.nn.Linear(4, 4), init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = SAM(model.parameters(), SGD, lr=0.1, momentum=0.9)
    for half in (optimizer.first_step, optimizer.second_step):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        half(zero_grad=True)
    model.double()
    return str(next(model.parameters()).dtype)


def test_a_model_of_dtensors_is_converted_after_a_step():
    assert run(2, converted) == ["torch.float64"] * 2
