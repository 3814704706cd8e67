"""FriendlySAM and SAM against the official algorithm, over hundreds of steps, with every base and option."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fsam_ext import SAM, FriendlySAM, flatten_parameters

from .conformance import identical, unit
from .official import OfficialFriendlySAM

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW

BASES = {
    "sgd": (SGD, {"lr": 0.05}),
    "sgd_momentum": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}),
    "sgd_dampening": (SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}),
    "sgd_nesterov": (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "sgd_maximize": (SGD, {"lr": 1e-3, "momentum": 0.9, "maximize": True}),
    "adam": (Adam, {"lr": 1e-2, "weight_decay": 1e-2}),
    "adamw": (AdamW, {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}),
    "adam_maximize": (Adam, {"lr": 1e-3, "maximize": True}),
    "adam_amsgrad": (Adam, {"lr": 1e-2, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
}


def network(dtype=torch.float64, seed=0) -> nn.Sequential:
    """Small, with every kind of shape. No bias before BatchNorm: its gradient is noise, which Adam would blow up."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [
            nn.Conv2d(2, 5, 3, bias=False),
            nn.BatchNorm2d(5),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(45, 7),
            nn.Linear(7, 3),
        ]
        return nn.Sequential(*layers).to(dtype)


def batches(count: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for _ in range(count):
        x = torch.randn(8, 2, 5, 5, generator=generator, dtype=torch.float64)
        yield x.to(dtype), torch.randn(8, 3, generator=generator, dtype=torch.float64).to(dtype)


def backward(model, batch, sign=1):
    loss = sign * (model(batch[0]) - batch[1]).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, data, before_step=lambda step: None, sign=1):
    """Two passes a step, written as users of the official code write them."""
    for step, batch in enumerate(data):
        before_step(step)
        for half in (optimizer.first_step, optimizer.second_step):
            for p in model.parameters():
                p.grad = None
            backward(model, batch, sign)
            half()


def worst(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of two models, relative to the largest weight."""
    pairs = [(p.detach(), q.detach()) for p, q in zip(a.parameters(), b.parameters(), strict=True)]
    return max(float((p - q).abs().max()) for p, q in pairs) / max(float(p.abs().max()) for p, _ in pairs)


@pytest.mark.parametrize("ema", ["previous", "updated"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
@pytest.mark.parametrize("base", BASES)
def test_200_steps_equal_the_official_code(base, adaptive, ema):
    base, kwargs = BASES[base]
    options = {"rho": 0.2, "sigma": 0.9, "lmbda": 0.8, "adaptive": adaptive, "ema": ema}
    mine, official = network(), network()
    data = list(batches(200))
    sign = -1 if kwargs.get("maximize") else 1  # what is maximised must not run away
    train(mine, FriendlySAM(mine.parameters(), base, **options, **kwargs), data, sign=sign)
    train(official, OfficialFriendlySAM(official.parameters(), base, **options, **kwargs), data, sign=sign)
    assert worst(official, mine) < 1e-12


def test_each_float32_step_is_the_float64_step_to_a_few_ulp():
    """From the same float32 state one step must be the exact one: w, then w' within the roundings of one pass each."""
    data = list(batches(50, torch.float32))
    model = network(torch.float32)
    optimizer = FriendlySAM(model.parameters(), SGD, rho=0.2, lr=0.05, momentum=0.9, weight_decay=1e-2)
    for x, y in data:
        exact = copy.deepcopy(model).double()
        reference = OfficialFriendlySAM(exact.parameters(), SGD, rho=0.2, lr=0.05, momentum=0.9, weight_decay=1e-2)
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            if "fsam_ema" in optimizer.state[p]:
                reference.momentum[q] = optimizer.state[p]["fsam_ema"].double()
                reference.base.state[q]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].double()
        for half in ("first_step", "second_step"):
            optimizer.zero_grad()
            backward(model, (x, y))
            for p, q in zip(model.parameters(), exact.parameters(), strict=True):
                q.grad = p.grad.double()  # the same gradients: what is compared is the optimizer
            getattr(optimizer, half)()
            getattr(reference, half)()
            for p, q in zip(model.parameters(), exact.parameters(), strict=True):
                # Terms of the update: w, lr g, rho d / n; each rounded a few times in float32.
                magnitude = q.abs() + p.grad.abs().double() + 0.2 + 0.05 * 10 * p.grad.abs().double()
                assert ((p.double() - q).abs() <= 12 * unit(torch.float32) * magnitude).all()


def test_options_are_per_group():
    def groups(model):
        conv, *rest = [list(layer.parameters()) for layer in model if list(layer.parameters())]
        others = [p for params in rest for p in params]
        return [
            {"params": conv, "rho": 0.5, "sigma": 0.3, "lmbda": 0.5, "adaptive": True, "lr": 0.01, "weight_decay": 0.1},
            {"params": others[:3], "sigma": 0.0},
            {"params": others[3:]},
        ]

    mine, official = network(), network()
    data = list(batches(50))
    kwargs = {"rho": 0.1, "lr": 0.05, "momentum": 0.9}
    optimizer = FriendlySAM(groups(mine), SGD, **kwargs)
    train(mine, optimizer, data)
    train(official, OfficialFriendlySAM(groups(official), SGD, **kwargs), data)
    assert worst(official, mine) < 1e-12
    assert "fsam_ema" not in optimizer.state[optimizer.param_groups[1]["params"][0]]  # sigma = 0 keeps no average


def test_options_may_change_between_steps():
    mine, official = network(), network()
    a = FriendlySAM(mine.parameters(), SGD, lr=0.05, momentum=0.9)
    b = OfficialFriendlySAM(official.parameters(), SGD, lr=0.05, momentum=0.9)

    def change(groups, base_groups):
        def at(step):
            if step == 7:
                groups[0].update(rho=0.5, sigma=0.2, lmbda=0.5, adaptive=True)
                base_groups[0].update(lr=0.01, momentum=0.5)

        return at

    data = list(batches(20))
    train(mine, a, data, change(a.param_groups, a.param_groups))
    train(official, b, data, change(b.groups, b.base.param_groups))
    assert worst(official, mine) < 1e-12


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_is_sigma_zero_and_keeps_no_average(adaptive):
    mine, official = network(), network()
    data = list(batches(50))
    optimizer = SAM(mine.parameters(), SGD, 0.1, adaptive, lr=0.05, momentum=0.9)
    train(mine, optimizer, data)
    train(
        official,
        OfficialFriendlySAM(official.parameters(), SGD, 0.1, 0.0, adaptive=adaptive, lr=0.05, momentum=0.9),
        data,
    )
    assert worst(official, mine) < 1e-12
    assert not any("fsam_ema" in entry for entry in optimizer.state.values())
    assert all("fsam_ema" not in flat.names for flat in optimizer._passes.layout.flats.values())


def test_at_sigma_one_both_forms_of_the_average_point_the_same_way():
    """d_updated = lmbda d_previous where sigma = 1 and both averages are equal."""
    models = [network(), network()]
    optimizers = [
        FriendlySAM(model.parameters(), SGD, lr=0.0, ema=ema)
        for model, ema in zip(models, ("previous", "updated"), strict=True)
    ]
    data = list(batches(3))
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, data[:1])
        for p in model.parameters():  # the same average in both
            optimizer.state[p]["fsam_ema"].fill_(0.01)
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.zero_grad()
        backward(model, data[1])
        optimizer.first_step()
    assert worst(*models) < 1e-12


def test_several_dtypes_in_one_optimizer():
    generator = torch.Generator().manual_seed(1)
    params = [
        nn.Parameter(torch.randn(33, generator=generator).to(dtype))
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float16)
    ]
    exact = [nn.Parameter(p.detach().double()) for p in params]
    optimizer = FriendlySAM(params, SGD, rho=0.5, lr=0.1)
    reference = OfficialFriendlySAM(exact, SGD, rho=0.5, lr=0.1)
    for p, q in zip(params, exact, strict=True):
        p.grad = torch.randn(33, generator=generator).to(p.dtype)
        q.grad = p.grad.double()
    optimizer.first_step()
    reference.first_step()
    for p, q in zip(params, exact, strict=True):  # one norm over all of them
        assert torch.allclose(p.double(), q, rtol=4 * torch.finfo(p.dtype).eps, atol=0.1 * torch.finfo(p.dtype).eps)
    optimizer.second_step()
    assert {optimizer.state[p]["fsam_ema"].dtype for p in params} == {torch.float32, torch.float64}


def on_two_devices(optimizer):
    """Every other parameter counts as on `cpu:0`: another device than `cpu` to the optimizer, the same to torch."""
    layout = optimizer._passes.layout
    kind_of, params = layout.kind_of, optimizer.param_groups[0]["params"]

    def kind_there(group, param):
        place = [q is param for q in params].index(True)
        return kind_of(group, param)._replace(device=torch.device("cpu", 0) if place % 2 else param.device)

    layout.kind_of = kind_there
    return optimizer


@pytest.mark.parametrize("base", ["sgd_momentum", "adamw"])
def test_several_devices_in_one_optimizer(base):
    """One norm over all of them, and a gradient that is not finite on one skips the step on each."""
    base, kwargs = BASES[base]
    mine, official = network(), network()
    optimizer = on_two_devices(FriendlySAM(mine.parameters(), base, rho=0.2, **kwargs))
    data = list(batches(20))
    train(mine, optimizer, data)
    train(official, OfficialFriendlySAM(official.parameters(), base, rho=0.2, **kwargs), data)
    assert len(optimizer._passes.norm.totals) == 2
    assert worst(official, mine) < 1e-12
    before = [p.detach().clone() for p in mine.parameters()]
    for half in (optimizer.first_step, optimizer.second_step):
        for p in mine.parameters():
            p.grad = torch.ones_like(p)
        next(mine.parameters()).grad.view(-1)[0] = torch.inf
        half()
        assert all(map(identical, before, mine.parameters()))


def test_state_keys_are_those_of_torch():
    model = network()
    for base, kwargs, keys in [
        (SGD, {"lr": 0.1, "momentum": 0.9}, {"fsam_ema", "momentum_buffer"}),
        (SGD, {"lr": 0.1}, {"fsam_ema"}),
        (AdamW, {"lr": 0.1}, {"fsam_ema", "exp_avg", "exp_avg_sq", "step"}),
    ]:
        optimizer = FriendlySAM(model.parameters(), base, **kwargs)
        train(model, optimizer, batches(3))
        for p in model.parameters():
            entry = optimizer.state[p]
            assert set(entry) == keys
            assert all(entry[key].shape == p.shape for key in keys - {"step"})
            if "step" in keys:
                assert entry["step"].shape == () and entry["step"] == 3


def test_eps_belongs_to_the_base_that_has_one():
    params = list(network().parameters())
    adam = FriendlySAM(params, Adam, eps=1e-3).param_groups[0]
    assert (adam["eps"], adam["perturb_eps"]) == (1e-3, 1e-12)
    sgd = FriendlySAM(params, SGD, eps=1e-3).param_groups[0]
    assert sgd["perturb_eps"] == 1e-3 and "eps" not in sgd


def test_lr_and_rho_as_tensors():
    mine, other = network(), network()
    data = list(batches(20))
    rho, lr = torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64)
    train(mine, FriendlySAM(mine.parameters(), SGD, rho=rho, lr=lr, momentum=0.9), data)
    train(other, FriendlySAM(other.parameters(), SGD, rho=0.2, lr=0.05, momentum=0.9), data)
    assert all(map(identical, mine.parameters(), other.parameters()))


def test_non_contiguous_parameters():
    mine, official = network(), network()
    for model in (mine, official):
        model.to(memory_format=torch.channels_last)
        model[4].weight.data = model[4].weight.data.t().contiguous().t()
    assert not mine[0].weight.is_contiguous() and not mine[4].weight.is_contiguous()
    data = list(batches(20))
    optimizer = FriendlySAM(mine.parameters(), SGD, lr=0.05, momentum=0.9)
    train(mine, optimizer, data)
    train(official, OfficialFriendlySAM(official.parameters(), SGD, lr=0.05, momentum=0.9), data)
    assert worst(official, mine) < 1e-12
    assert optimizer.state[mine[4].weight]["fsam_ema"].stride() == mine[4].weight.stride()


def test_ten_thousand_tiny_tensors():
    generator = torch.Generator().manual_seed(2)
    values = [torch.randn(n % 9, generator=generator, dtype=torch.float64) for n in range(10_000)]
    mine, official = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    a = FriendlySAM(mine, SGD, lr=0.1, momentum=0.9)
    b = OfficialFriendlySAM(official, SGD, lr=0.1, momentum=0.9)
    for _ in range(2):
        for half in ("first_step", "second_step"):
            for p, q in zip(mine, official, strict=True):
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                q.grad = p.grad.clone()
            getattr(a, half)()
            getattr(b, half)()
    assert max(float((p - q).detach().abs().max()) for p, q in zip(mine, official, strict=True) if p.numel()) < 1e-12


# ---- What the rest of torch does with an optimizer -----------------------------------------------------------------


@pytest.mark.parametrize("base", ["sgd_momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_a_copied_optimizer_goes_on_as_the_original(base, how):
    base, kwargs = BASES[base]
    data = list(batches(20))
    model = network()
    optimizer = FriendlySAM(model.parameters(), base, rho=0.2, **kwargs)
    train(model, optimizer, data[:10])
    if how == "deepcopy":
        twin, other = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    elif how == "torch.save":
        stream = io.BytesIO()
        torch.save((model, optimizer), stream)
        stream.seek(0)
        twin, other = torch.load(stream, weights_only=False)
    else:
        twin = copy.deepcopy(model)
        other = FriendlySAM(twin.parameters(), base, rho=0.2, **kwargs)
        other.load_state_dict(optimizer.state_dict())
    assert type(other) is FriendlySAM
    train(model, optimizer, data[10:])
    train(twin, other, data[10:])
    assert all(map(identical, model.parameters(), twin.parameters()))


def test_add_param_group_in_training():
    mine, official = network(), network()
    data = list(batches(20))
    a = FriendlySAM(mine[0].parameters(), SGD, lr=0.05, momentum=0.9)
    b = OfficialFriendlySAM(official[0].parameters(), SGD, lr=0.05, momentum=0.9)
    train(mine, a, data[:10])
    train(official, b, data[:10])
    a.add_param_group({"params": list(mine[4].parameters()), "rho": 0.3})
    late = list(official[4].parameters())
    b.groups.append({**b.groups[0], "params": late, "rho": 0.3})
    b.base.add_param_group({"params": late})
    train(mine, a, data[10:])
    train(official, b, data[10:])
    assert worst(official, mine) < 1e-12


def test_edits_of_the_parameter_list():
    """Accelerate and others rewrite group["params"]; nothing may go on with the old list."""
    mine, official = network(), network()
    data = list(batches(30))
    a = FriendlySAM(mine.parameters(), AdamW, lr=0.01)
    b = OfficialFriendlySAM(official.parameters(), AdamW, lr=0.01)
    for cut, order in ((0, 1), (2, 1), (2, -1)):
        chosen = list(mine.parameters())[cut:][::order], list(official.parameters())[cut:][::order]
        a.param_groups[0]["params"], b.groups[0]["params"] = chosen
        b.base.param_groups[0]["params"] = list(chosen[1])
        train(mine, a, data[cut * 5 : cut * 5 + 10])
        train(official, b, data[cut * 5 : cut * 5 + 10])
        assert worst(official, mine) < 1e-12


def test_tied_and_frozen_parameters():
    def build():
        model = network()
        model.append(nn.Linear(3, 3, bias=False).double())
        model.append(nn.Linear(3, 3, bias=False).double())
        with torch.no_grad():
            model[6].weight.copy_(torch.eye(3))
        model[7].weight = model[6].weight
        model[0].requires_grad_(False)
        return model

    mine, official = build(), build()
    frozen = mine[0].weight.clone()
    data = list(batches(20))
    optimizer = FriendlySAM(mine.parameters(), SGD, lr=0.05, momentum=0.9)
    train(mine, optimizer, data)
    train(official, OfficialFriendlySAM(official.parameters(), SGD, lr=0.05, momentum=0.9), data)
    assert worst(official, mine) < 1e-12
    assert torch.equal(mine[0].weight, frozen)
    assert mine[0].weight not in optimizer.state


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("api", ["closure", "two_steps", "perturbed"])
def test_lr_schedulers_work_without_a_warning(api):
    model = network()
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for batch in batches(3):
        one_step(model, optimizer, batch, api)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(scheduler.get_last_lr()[0]) != 0.1


def one_step(model, optimizer, batch, api):
    if api == "closure":

        def closure():
            optimizer.zero_grad()
            return backward(model, batch)

        return optimizer.step(closure)
    optimizer.zero_grad()
    backward(model, batch)
    if api == "two_steps":
        optimizer.first_step(zero_grad=True)
        backward(model, batch)
        optimizer.second_step(zero_grad=True)
    else:
        with optimizer.perturbed():
            backward(model, batch)
        optimizer.step()
    return None


def test_the_three_ways_to_write_a_step_are_the_same():
    models = [network() for _ in range(3)]
    for model, api in zip(models, ("closure", "two_steps", "perturbed"), strict=True):
        optimizer = FriendlySAM(model.parameters(), SGD, rho=0.2, lr=0.05, momentum=0.9)
        for batch in batches(10):
            one_step(model, optimizer, batch, api)
    for model in models[1:]:
        assert all(map(identical, model.parameters(), models[0].parameters()))


@pytest.mark.parametrize("base", ["sgd", "rmsprop"])
@pytest.mark.parametrize("api", ["closure", "two_steps", "perturbed"])
def test_hooks_and_profiler_ranges_fire_once_per_step(base, api):
    base, kwargs = BASES[base]
    model = network()
    optimizer = FriendlySAM(model.parameters(), base, **kwargs)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *a: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *a: calls.append("global post")),
        optimizer.register_step_pre_hook(lambda *a: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *a: calls.append("post")),
    ]
    try:
        with torch.profiler.profile() as profile:
            one_step(model, optimizer, next(batches(1)), api)
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(calls) == ["global post", "global pre", "post", "pre"]
    assert sum(event.key.startswith("Optimizer.step#") and event.count for event in profile.key_averages()) == 1


def test_stats():
    model = network()
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.05, sigma=0.7)
    train(model, optimizer, batches(5))
    average = torch.cat([optimizer.state[p]["fsam_ema"].flatten() for p in model.parameters()]).clone()
    optimizer.zero_grad()
    backward(model, next(batches(1)))
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.first_step()
    stats = optimizer.stats()
    assert all(value.shape == () for value in stats.values())
    assert torch.allclose(stats["noise_norm"], (gradient - 0.7 * average).norm(), rtol=1e-12)
    assert torch.allclose(stats["grad_norm"], gradient.norm(), rtol=1e-12)
    assert torch.allclose(stats["ema_norm"], average.norm(), rtol=1e-12)
    assert torch.allclose(stats["cosine"], torch.cosine_similarity(gradient, average, dim=0), rtol=1e-10)
    assert stats["found_inf"].dtype == torch.bool and not stats["found_inf"]


# ---- Memory ---------------------------------------------------------------------------------------------------------


def test_pointers_and_buffers_stay_where_they_are():
    model = network()
    optimizer = FriendlySAM(model.parameters(), AdamW, lr=0.01)
    train(model, optimizer, batches(1))

    def addresses():
        state = [t.data_ptr() for p in model.parameters() for t in optimizer.state[p].values()]
        flats = [b.data_ptr() for flat in optimizer._passes.layout.flats.values() for b in map(flat.buffer, flat.names)]
        return [p.data_ptr() for p in model.parameters()], state, flats

    before = addresses()
    train(model, optimizer, batches(5))
    assert addresses() == before


@pytest.mark.parametrize("base", ["sgd_momentum", "adamw"])
def test_a_step_allocates_nothing_but_scalars(base):
    base, kwargs = BASES[base]
    params = [nn.Parameter(torch.randn(100_000)) for _ in range(3)]
    optimizer = FriendlySAM(params, base, **kwargs)

    def step():
        optimizer.first_step()
        optimizer.second_step()

    for p in params:
        p.grad = torch.randn_like(p)
    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    allocated = [event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0]
    assert max(allocated, default=0) <= 64
    assert len(allocated) <= 12


@pytest.mark.large
def test_a_tensor_beyond_2_31_elements():
    """Offsets are 64-bit all the way: the last elements must move like the first ones."""
    numel = 2**31 + 4097
    p = nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = SAM([p], SGD, rho=float(numel) ** 0.5, lr=0.5)
    optimizer.first_step()
    for part in (p[:5000], p[-5000:], p[2**31 - 10 : 2**31 + 10]):
        assert torch.equal(part, torch.ones_like(part))
    optimizer.second_step()
    for part in (p[:5000], p[-5000:], p[2**31 - 10 : 2**31 + 10]):
        assert torch.equal(part, torch.full_like(part, -0.5))


def test_flattened_models_take_the_same_steps():
    models = [network() for _ in range(2)]
    flatten_parameters(models[1], grads=True)
    for model in models:
        optimizer = FriendlySAM(model.parameters(), AdamW, rho=0.2, lr=0.01)
        for batch in batches(30):
            one_step(model, optimizer, batch, "two_steps")
    assert worst(*models) < 1e-12
