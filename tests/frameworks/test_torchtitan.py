"""torchtitan: how its container makes, saves and loads state, and its training step with the recipe of the docs."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.functional import cross_entropy

from fsam_ext import FriendlySAM
from fsam_ext.checkpoint import LoadPlanner

from ..conformance import identical
from ..distributed.ranks import run
from ..distributed.test_fsdp import sharded
from ..distributed.training import BASES, backward, batches, distance, shard, state_vector, train, vector
from . import reference, torchtitan_on_stable
from .test_recipes import recipe

torchtitan = torchtitan_on_stable.torchtitan
utils = torchtitan.components.optimizer.utils
ParamGroupConfig = torchtitan.components.optimizer.ParamGroupConfig

HALF = 5  # with every=3: between two ascents
OPTIONS = {"plain": {}, "reuse": {"every": 3, "reuse": 0.4}, "rho": {"rho": reference.warming}}


def made(model, base, **options):
    cls, kwargs = BASES[base]
    return FriendlySAM(model.named_parameters(), cls, **{"rho": 0.2, **kwargs, **options})


def everything(optimizer):
    """All state, whole, and the options that a checkpoint has to bring back."""
    names = {name for entry in optimizer.state.values() for name in entry if name != "step"}
    found = {name: state_vector(optimizer, name) for name in names}
    for name in ("fsam_step", "fsam_reuse_sq", "lr"):
        found[name] = torch.tensor([float(group.get(name, -1)) for group in optimizer.param_groups]).double()
    return found


# ---- Its functions, for one optimizer --------------------------------------------------------------------------------


def asked_for_state(base, options):
    model, fresh = sharded(), sharded()
    optimizer = made(model, base, **options)
    before = vector(model.parameters())
    utils.init_optim_state(optimizer)
    assert identical(vector(model.parameters()), before)
    assert all(param.grad is None for param in model.parameters())
    assert len(optimizer.state) == len(list(model.parameters()))
    state = everything(optimizer)
    utils.init_optim_state(optimizer)  # which changes nothing where state is there
    return state, train(model, optimizer, batches(HALF)), train(fresh, made(fresh, base, **options), batches(HALF))


@pytest.mark.parametrize(
    "base, options", [("rmsprop", "plain"), *((base, options) for base in ("sgd", "adamw") for options in OPTIONS)]
)
def test_state_is_made_without_touching_weights(base, options, record):
    differences = []
    for state, history, undisturbed in run(2, asked_for_state, base, OPTIONS[options]):
        assert state["fsam_ema"].isnan().all() and state["fsam_step"].eq(0).all()
        assert ("fsam_reuse" in state) == (options == "reuse")
        differences.append(float((history - undisturbed).abs().max()))
    record("torchtitan", f"init_optim_state, {base}, {options}", max(differences))


def saved(path, base, options):
    model = sharded()
    optimizer = made(model, base, **options)
    train(model, optimizer, batches(HALF))
    dcp.save({"model": model.state_dict(), "it": utils.get_flat_optim_state_dict(optimizer)}, checkpoint_id=path)
    state = everything(optimizer)
    return state, train(model, optimizer, batches(HALF, first=HALF))


def resumed(path, base, options):
    model = sharded()
    for param in model.parameters():
        nn.init.zeros_(param)
    optimizer = made(model, base, **options)
    for group in optimizer.param_groups:
        group["lr"] = 1.0  # to be replaced
    utils.init_optim_state(optimizer)
    states = {"model": model.state_dict(), "it": utils.get_flat_optim_state_dict(optimizer)}
    dcp.load(states, checkpoint_id=path)
    utils.load_flat_optim_state_dict(optimizer, states["it"])
    model.load_state_dict(states["model"])
    state = everything(optimizer)
    return state, train(model, optimizer, batches(HALF, first=HALF))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("base", ("sgd", "adamw"))
def test_saved_on_two_ranks_and_resumed_on_others(base, options, tmp_path, record):
    path = str(tmp_path / "it")
    state, went_on = run(2, saved, path, base, OPTIONS[options])[0]
    assert {"fsam_ema"} < state.keys() and state["fsam_step"].eq(HALF).all()
    assert options != "reuse" or (state["fsam_reuse_sq"][0] > 0 and state["fsam_reuse"].any())
    for world in (2, 1, 3):
        results = run(world, resumed, path, base, OPTIONS[options])
        for loaded, _ in results:
            assert loaded.keys() == state.keys()
            assert all(identical(loaded[name], state[name]) for name in state)
        far = max(distance(history, went_on) for _, history in results)
        # Other shards, other order of the norm's sums.
        record("torchtitan", f"2 ranks, resumed on {world}: {base}, {options}", far, 0.0 if world == 2 else 1e-12)


# ---- Its container, for several --------------------------------------------------------------------------------------


def parts_of(model):
    """Two stages of a pipeline: each knows its parameters by their names in the whole model."""
    return [nn.ModuleDict({name: model[int(name)] for name in names}) for names in ("0", "24")]


def container_of(parts, reuse=0.4, **options):
    """The recipe's, in which biases are updated by another class: four optimizers, all of F-SAM."""
    shared = {"rho": 0.2, "reuse": reuse, **options}
    groups = [
        ParamGroupConfig(pattern=r"bias$", optimizer_name="Adam", optimizer_kwargs={"lr": 0.02, **shared}),
        ParamGroupConfig(pattern=r".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.01, **shared}),
    ]
    config = recipe("torchtitan")["FriendlyOptimizers"].Config(param_groups=groups)
    config.optimizer_factory_kwargs_by_name = {name: {"every": 3} for name in ("Adam", "AdamW")}
    return config.build(model_parts=parts)


def train_parts(model, container, data):
    history = []
    for batch in data:
        backward(model, shard(batch))
        ascending = [optimizer for optimizer in container if optimizer.ascends]
        for optimizer in ascending:
            optimizer.first_step(zero_grad=True)
        if ascending:
            backward(model, shard(batch))
        container.step()
        container.zero_grad()
        history.append(vector(model.parameters()))
    return torch.stack(history)


def saved_parts(path):
    model = sharded()
    container = container_of(parts_of(model))
    assert len(container) == 4 and all(type(one) is FriendlySAM for one in container)
    train_parts(model, container, batches(HALF))
    dcp.save({"model": model.state_dict(), "optimizer": container}, checkpoint_id=path)
    state = [everything(optimizer) for optimizer in container]
    return state, train_parts(model, container, batches(HALF, first=HALF))


def resumed_parts(path):
    model = sharded()
    container = container_of(parts_of(model))
    states = {"model": model.state_dict(), "optimizer": container}
    dcp.load(states, checkpoint_id=path)
    model.load_state_dict(states["model"])
    state = [everything(optimizer) for optimizer in container]
    return state, train_parts(model, container, batches(HALF, first=HALF))


def test_several_optimizers_in_one_flat_dict(tmp_path, record):
    path = str(tmp_path / "it")
    states, went_on = run(2, saved_parts, path)[0]
    norms = [float(state["fsam_reuse_sq"][0]) for state in states]
    assert min(norms) > 0 and len({*norms}) == 4  # each has a norm of its own
    for world in (2, 3):
        results = run(world, resumed_parts, path)
        for loaded, _ in results:
            for ours, theirs in zip(loaded, states, strict=True):
                assert all(identical(ours[name], theirs[name]) for name in theirs)
        far = max(distance(history, went_on) for _, history in results)
        record("torchtitan", f"2 ranks, resumed on {world}: 4 optimizers", far, 0.0 if world == 2 else 1e-12)


def test_a_checkpoint_of_its_own_container_goes_on_with_f_sam(tmp_path):
    """The averages start anew."""
    plain, model = reference.network(), reference.network()
    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.02})
    theirs = torchtitan.components.optimizer.OptimizersContainer.Config(param_groups=[group])
    theirs = theirs.build(model_parts=[plain])
    for batch in reference.batches(3):
        theirs.zero_grad()
        reference.loss_of(plain, batch).backward()
        theirs.step()
    dcp.save({"optimizer": theirs.state_dict()}, checkpoint_id=str(tmp_path), no_dist=True)
    ours = one_optimizer(model, rho=0.3)
    states = {"optimizer": ours.state_dict()}
    dcp.load(states, checkpoint_id=str(tmp_path), planner=LoadPlanner(), no_dist=True)
    ours.load_state_dict(states["optimizer"])
    (optimizer,), (base,) = ours, theirs
    assert optimizer.param_groups[0]["lr"] == 0.02 and optimizer.param_groups[0]["rho"] == 0.3
    for param, other in zip(model.parameters(), plain.parameters()):
        for name, value in base.state[other].items():
            assert torch.equal(optimizer.state[param][name], value)
        assert optimizer.state[param]["fsam_ema"].isnan().all()


# ---- Its training step, with the recipe ------------------------------------------------------------------------------


CLIP = 0.5


class Staging:
    """An asynchronous checkpoint in the making: what it copies is what the weights are until it is waited for."""

    def __init__(self, model):
        self.model, self.begun, self.seen = model, None, []

    def begin(self):
        self.begun = [param.detach().clone() for param in self.model.parameters()]

    def maybe_wait_for_staging(self):
        if self.begun is not None:
            self.seen.append(all(map(torch.equal, self.begun, self.model.parameters())))
        self.begun = None


def trainer_of(model, container, accumulate, log):
    """What Trainer.__init__ leaves for train_step, on one process; see torchtitan_on_stable.py for what is not here."""
    module = torchtitan.trainer
    module.IGNORE_INDEX = -100
    module.Decoder = SimpleNamespace(Config=type("Config", (), {}))
    clipped = lambda params, norm, **_: nn.utils.clip_grad_norm_(params, norm)  # noqa: E731
    module.dist_utils = SimpleNamespace(clip_grad_norm_=clipped)
    kind = recipe("torchtitan")["FriendlyTrainer"]
    assert kind.Config._owner is kind
    trainer = kind.__new__(kind)
    trainer.config = SimpleNamespace(
        training=SimpleNamespace(disable_cuda_graphs=True, max_norm=CLIP),
        parallelism=SimpleNamespace(spmd_backend="default"),
    )
    off = dict.fromkeys(("pp_enabled", "cp_enabled", "dp_enabled", "dp_cp_enabled", "ep_enabled"), False)
    trainer.parallel_dims = SimpleNamespace(**off, get_optional_mesh=lambda name: None)
    trainer.model_parts, trainer.model_config, trainer.optimizers = [model], None, container
    lr_schedulers = torchtitan.components.optimizer.LRSchedulersContainer.Config(warmup_steps=3)
    trainer.lr_schedulers = lr_schedulers.build(optimizers=container, training_steps=8)
    trainer.loss_fn = lambda output, labels, tokens: (cross_entropy(output, labels, reduction="sum") / tokens, {})
    trainer.metrics_processor = SimpleNamespace(should_log=lambda step: True, log=log)
    trainer.checkpointer, trainer.train_context, trainer.device = Staging(model), nullcontext, torch.device("cpu")
    trainer.gradient_accumulation_steps, trainer.num_pipeline_parallel_microbatches = accumulate, 1
    trainer.step = trainer.ntokens_seen = 0
    trainer.fwd_bwd_fn = trainer._forward_backward_body
    return trainer


def one_optimizer(model, every=1, **options):
    group = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.05, **options})
    config = recipe("torchtitan")["FriendlyOptimizers"].Config(param_groups=[group])
    config.optimizer_factory_kwargs_by_name = {"AdamW": {"every": every}}
    return config.build(model_parts=[model])


@pytest.mark.parametrize("accumulate", (1, 2))
@pytest.mark.parametrize("options", OPTIONS)
def test_its_training_step_with_the_recipe(options, accumulate, record):
    model, other = (reference.network(dropout=0.5, batch_norm=True) for _ in range(2))
    (optimizer,) = container = one_optimizer(model, **{"rho": 0.2, **OPTIONS[options]})
    logged = []
    trainer = trainer_of(model, container, accumulate, lambda *values, **_: logged.append(values))
    states = reference.RandomStates(model[0], lambda: optimizer.is_perturbed)
    data = iter([({"input": x}, y) for x, y in reference.batches()])
    for trainer.step in range(8 // accumulate):
        if trainer.step % 2:
            trainer.checkpointer.begin()  # after a step, as its CheckpointManager does
        trainer.train_step(data)
    assert trainer.checkpointer.seen == [True] * (len(logged) // 2)
    assert trainer.ntokens_seen == 8 * reference.SIZE

    plain = FriendlySAM(other.parameters(), torch.optim.AdamW, lr=0.05, fused=True, **{"rho": 0.2, **OPTIONS[options]})
    warm_up = trainer.lr_schedulers.schedulers[0].lr_lambdas[0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(plain, warm_up)
    tokens = reference.SIZE * accumulate
    how = {"accumulate": accumulate, "divide": lambda window: 1, "clip": CLIP, "scheduler": scheduler, "states": states}
    how["loss"] = lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction="sum") / tokens
    clean = reference.train(other, plain, reference.batches(), rho=OPTIONS[options].get("rho"), **how)
    for (_, loss, *_), first in zip(logged, range(0, 8, accumulate), strict=True):
        assert loss == pytest.approx(sum(clean[first : first + accumulate]), rel=1e-6)
    record("torchtitan", f"train_step, {options}, accumulation {accumulate}", reference.difference(model, other))


def test_what_the_recipe_is_not_for():
    model = nn.Sequential(nn.Linear(10, 3), nn.Linear(3, 3))
    data = iter([({"input": x}, y) for x, y in reference.batches()])
    trainer = trainer_of(model, container_of([model]), 1, lambda *values, **_: None)
    with pytest.raises(ValueError, match="too many values to unpack"):  # two optimizers
        trainer.train_step(data)
    trainer = trainer_of(model, one_optimizer(model), 1, lambda *values, **_: None)
    trainer.config.training.disable_cuda_graphs = False
    with pytest.raises(AssertionError, match="CUDA graphs cannot hold the second pass"):
        trainer.train_step(data)
