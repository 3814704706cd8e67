"""Reuse of second gradients: LookSAM on F-SAM, against plain PyTorch, and what may happen to it between two ascents."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fsam_ext import FriendlySAM, backends, flatten_parameters

from .conformance import BACKENDS, identical, load
from .official import OfficialFriendlySAM
from .test_optimizer import BASES, backward, batches, network, worst

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


def closure_of(model, batch, sign=1):
    def closure():
        return backward(model, batch, sign)

    return closure


def train(model, optimizer, data, sign=1):
    for batch in data:
        optimizer.step(closure_of(model, batch, sign))


def official(model, base, kwargs, data, every, reuse, sign=1, **options):
    optimizer = OfficialFriendlySAM(model.parameters(), base, **options, **kwargs)
    optimizer.every, optimizer.reuse = every, reuse

    def again(batch):
        model.zero_grad()
        with torch.enable_grad():
            backward(model, batch, sign)

    for batch in data:
        optimizer.looking_step(lambda batch=batch: again(batch))
    return optimizer


def reusing(model, **options):
    return FriendlySAM(model.parameters(), SGD, **{"rho": 0.2, "lr": 0.05, "every": 3, "reuse": 0.5, **options})


def norm_sq(optimizer):
    return float(optimizer.param_groups[0]["fsam_reuse_sq"])


def directions(optimizer):
    return [optimizer.state[p]["fsam_reuse"] for group in optimizer.param_groups for p in group["params"]]


# ---- The numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every, reuse", [(2, 0.4), (5, 0.3)])
@pytest.mark.parametrize("options", [{}, {"sigma": 0.0}, {"sigma": 0.9, "adaptive": True}, {"ema": "updated"}], ids=str)
@pytest.mark.parametrize("base", ["sgd", "sgd_nesterov", "sgd_maximize", "adam", "adamw"])
def test_200_steps_equal_the_algorithm_in_plain_pytorch(base, options, every, reuse):
    base, kwargs = BASES[base]
    options = {"rho": 0.2, "lmbda": 0.8, **options}
    mine, theirs = network(), network()
    data, sign = list(batches(200)), -1 if kwargs.get("maximize") else 1
    optimizer = FriendlySAM(mine.parameters(), base, every=every, reuse=reuse, **options, **kwargs)
    train(mine, optimizer, data, sign)
    other = official(theirs, base, kwargs, data, every, reuse, sign, **options)
    assert worst(theirs, mine) < 1e-12
    exact = [other.direction[p] for p in theirs.parameters()]
    assert norm_sq(optimizer) == pytest.approx(float(sum((v * v).sum() for v in exact)), rel=1e-9)
    for v, expected in zip(directions(optimizer), exact, strict=True):
        assert torch.allclose(v, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_makes_these_steps(backend, monkeypatch):
    serving, device = load(backend)
    monkeypatch.setitem(backends.CANDIDATES, "cpu", lambda _: (serving, None))
    base, kwargs = BASES["sgd_nesterov"]
    mine, theirs = (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double() for _ in range(2))
    theirs.load_state_dict(mine.state_dict())
    data = [(torch.randn(8, 6).double(), torch.randn(8, 3).double()) for _ in range(200)]
    optimizer = FriendlySAM(mine.to(device).parameters(), base, rho=0.2, every=4, reuse=0.4, **kwargs)
    train(mine, optimizer, [tuple(part.to(device) for part in batch) for batch in data])
    official(theirs, base, kwargs, data, 4, 0.4, rho=0.2)
    assert worst(theirs, mine.cpu()) < 1e-12


def test_several_groups_dtypes_and_layouts_share_one_norm():
    base, kwargs = BASES["adamw"]
    plain, several, flat = network(), network(), network()
    flatten_parameters(flat, grads=True)
    options = dict(rho=0.2, every=3, reuse=0.5, **kwargs)
    params = list(several.parameters())
    made = [
        FriendlySAM(plain.parameters(), base, **options),
        FriendlySAM([{"params": params[::2]}, {"params": params[1::2]}], base, **options),
        FriendlySAM(flat.parameters(), base, **options),
    ]
    data = list(batches(20))
    for model, optimizer in zip((plain, several, flat), made):
        train(model, optimizer, data)
        assert worst(plain, model) < 1e-13
        assert norm_sq(optimizer) == pytest.approx(norm_sq(made[0]), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"master_weights": True}, {"ema_dtype": torch.int8}], ids=str)
def test_a_step_between_of_stored_v(dtype, options):
    """v as it is stored, with the norm of what is stored, is added to the gradient; nothing writes it."""
    weights = torch.bfloat16 if "master_weights" in options else torch.float32
    data = list(batches(2, weights))
    model = network(weights)
    optimizer = reusing(model, reuse_dtype=dtype, **options)
    optimizer.step(closure_of(model, data[0]))
    kept = [optimizer.state[p].get("fsam_master", p) for p in model.parameters()]
    before, v = [p.detach().double().clone() for p in kept], [v.double() for v in directions(optimizer)]
    sq = sum(float(direction.square().sum()) for direction in v)
    assert norm_sq(optimizer) == pytest.approx(sq, rel=1e-5)
    model.zero_grad()
    backward(model, data[1])
    grads = [p.grad.double() for p in model.parameters()]
    optimizer.step()
    length = 0.5 * sum(float(g.square().sum()) for g in grads) ** 0.5 / sq**0.5
    for p, old, g, direction in zip(kept, before, grads, v):
        assert torch.allclose(p.double(), old - 0.05 * (g + length * direction), rtol=1e-6, atol=1e-7)
    assert all(map(identical, directions(optimizer), [d.to(dtype) for d in v]))


def test_bytes_of_state():
    def of(**options):
        model = nn.Linear(100, 100, bias=False)
        optimizer = FriendlySAM(model.parameters(), SGD, every=2, momentum=0.9, **options)
        model.weight.grad = torch.ones(100, 100)
        optimizer.first_step()
        optimizer.second_step()
        return sum(t.nbytes for t in optimizer.state[model.weight].values())

    assert of(reuse=0.3) - of() == 4 * 10_000
    assert of(reuse=0.3, reuse_dtype=torch.bfloat16) - of() == 2 * 10_000


# ---- Where there is no v ---------------------------------------------------------------------------------------------


def test_until_there_is_a_v_steps_are_plain():
    data = list(batches(6))
    mine, plain = network(), network()
    reusing = FriendlySAM(mine.parameters(), SGD, rho=0.2, lr=0.05, every=2, start=4, reuse=0.5)
    reference = FriendlySAM(plain.parameters(), SGD, rho=0.2, lr=0.05, every=2, start=4)
    for model, optimizer in ((mine, reusing), (plain, reference)):
        train(model, optimizer, data[:5])
    assert all(map(identical, mine.parameters(), plain.parameters()))
    for model, optimizer in ((mine, reusing), (plain, reference)):
        train(model, optimizer, data[5:])
    assert worst(plain, mine) > 1e-6


def test_after_the_end_of_a_schedule_steps_are_plain():
    data = list(batches(6))
    mine, plain = network(), network()
    optimizer = FriendlySAM(mine.parameters(), SGD, rho=0.2, lr=0.05, every=2, end=4, reuse=0.5)
    train(mine, optimizer, data[:4])
    plain.load_state_dict(mine.state_dict())
    train(mine, optimizer, data[4:])
    reference = SGD(plain.parameters(), lr=0.05)
    for batch in data[4:]:
        reference.zero_grad()
        backward(plain, batch)
        reference.step()
    assert worst(plain, mine) < 1e-14


def test_an_ascent_that_is_not_finite_leaves_v():
    model, data = network(), list(batches(4))
    optimizer = reusing(model, every=2)
    train(model, optimizer, data[:2])
    v, sq = copy.deepcopy(directions(optimizer)), norm_sq(optimizer)
    optimizer.zero_grad()
    backward(model, data[2])
    next(model.parameters()).grad.view(-1)[0] = torch.inf
    optimizer.first_step(zero_grad=True)
    backward(model, data[2])
    optimizer.second_step()
    assert all(map(identical, v, directions(optimizer))) and norm_sq(optimizer) == sq > 0


def test_a_second_gradient_that_overflowed_leaves_no_v():
    model, data = network(torch.float32), list(batches(4, torch.float32))
    optimizer, scaler = reusing(model), torch.amp.GradScaler("cpu", init_scale=64.0)
    for number, batch in enumerate(data[:2]):
        optimizer.zero_grad()
        scaler.scale((model(batch[0]) - batch[1]).square().mean()).backward()
        if optimizer.ascends:
            optimizer.first_step(zero_grad=True, grad_scaler=scaler)
            scaler.scale((model(batch[0]) - batch[1]).square().mean()).backward()
            next(model.parameters()).grad.view(-1)[0] = torch.inf
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if number == 0:
            assert norm_sq(optimizer) == 0
    reference = network(torch.float32)
    for p, value in zip(reference.parameters(), before):
        p.data.copy_(value)
    plain = SGD(reference.parameters(), lr=0.05)
    backward(reference, data[1])
    plain.step()
    assert worst(reference, model) < 1e-6


@pytest.mark.parametrize("finite", [True, False], ids=["finite", "inf"])
def test_a_step_that_is_given_up(finite):
    """Its first gradient is in the place of v, unless the ascent was not finite."""
    model, data = network(), list(batches(5))
    optimizer = reusing(model, every=2)
    train(model, optimizer, data[:2])
    v, sq = copy.deepcopy(directions(optimizer)), norm_sq(optimizer)
    optimizer.zero_grad()
    backward(model, data[2])
    if not finite:
        next(model.parameters()).grad.view(-1)[0] = torch.nan
    optimizer.first_step()
    optimizer.restore()
    assert norm_sq(optimizer) == (0 if finite else sq)
    if not finite:
        assert all(map(identical, v, directions(optimizer)))
    train(model, optimizer, data[3:])
    assert norm_sq(optimizer) > 0


def test_a_gradient_that_is_not_finite_makes_a_plain_step():
    """Between two ascents nothing is skipped: as with ``every`` alone."""
    mine, plain, data = network(), network(), list(batches(2))
    made = [reusing(mine), FriendlySAM(plain.parameters(), SGD, rho=0.2, lr=0.05, every=3)]
    for model, optimizer in zip((mine, plain), made):
        train(model, optimizer, data[:1])
        optimizer.zero_grad()
        backward(model, data[1])
        next(model.parameters()).grad.view(-1)[0] = torch.inf
        optimizer.step()
    assert all(map(identical, mine.parameters(), plain.parameters()))


def test_parameters_with_one_of_the_two_gradients():
    """What is missing in a pass counts as zero."""
    a, b, c = (nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(3))
    optimizer = FriendlySAM([a, b, c], SGD, rho=0.1, lr=0.0, every=2, reuse=0.5)
    for _ in range(2):  # the second time there is a v already
        g1, g2 = torch.randn(2, 3, 5, dtype=torch.float64)
        a.grad, b.grad, c.grad = g1[0].clone(), g1[1].clone(), None
        optimizer.first_step()
        a.grad, b.grad, c.grad = g2[0].clone(), None, g2[2].clone()
        optimizer.second_step()
        v = g2[0] - (g2[0] @ g1[0]) / (g1[0] @ g1[0]) * g1[0]
        assert torch.allclose(optimizer.state[a]["fsam_reuse"], v, rtol=1e-12)
        assert not optimizer.state[b]["fsam_reuse"].any()
        assert torch.equal(optimizer.state[c]["fsam_reuse"], g2[2])
        assert norm_sq(optimizer) == pytest.approx(float(v @ v + g2[2] @ g2[2]), rel=1e-12)
        for p in (a, b, c):
            p.grad = torch.zeros(5, dtype=torch.float64)
        optimizer.step()


# ---- State -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["state_dict", "file", "pickle", "moved"])
def test_a_resumed_run_goes_on_to_the_bit(how, tmp_path):
    data = list(batches(12, torch.float32))
    whole, second = network(torch.float32), network(torch.float32)
    make = lambda model: FriendlySAM(  # noqa: E731
        model.parameters(), AdamW, rho=0.2, lr=0.01, every=4, reuse=0.3, reuse_dtype=torch.bfloat16
    )
    optimizer = make(whole)
    train(whole, optimizer, data[:6])
    second.load_state_dict(whole.state_dict())
    if how == "pickle":
        second, resumed = copy.deepcopy((whole, optimizer))
    else:
        resumed = make(second)
        saved = optimizer.state_dict()
        assert isinstance(saved["param_groups"][0]["fsam_reuse_sq"], float)
        if how == "file":
            torch.save(saved, tmp_path / "a.pt")
            saved = torch.load(tmp_path / "a.pt", weights_only=True)
        resumed.load_state_dict(copy.deepcopy(saved))
        if how == "moved":
            resumed.move_state("cpu")
    for model, one in ((whole, optimizer), (second, resumed)):
        train(model, one, data[6:])
    assert all(map(identical, whole.parameters(), second.parameters()))
    assert norm_sq(optimizer) == norm_sq(resumed)


def test_a_checkpoint_without_v_and_one_that_nobody_reuses():
    model, data = network(), list(batches(4))
    without, with_v = (FriendlySAM(model.parameters(), SGD, lr=0.05, every=3, reuse=r) for r in (0.0, 0.5))
    train(model, without, data[:2])
    model.zero_grad()
    with_v.load_state_dict(without.state_dict())
    with_v.param_groups[0]["reuse"] = 0.5
    backward(model, data[2])
    with_v.step()
    assert norm_sq(with_v) == 0
    model.zero_grad()
    saved = with_v.state_dict()
    without.load_state_dict(saved)
    without.param_groups[0]["reuse"] = 0.0
    train(model, without, data[3:])
    assert all("fsam_reuse" not in without.state[p] for p in model.parameters())


def test_frozen_and_added_parameters():
    model, data = network(), list(batches(9))
    optimizer = reusing(model)
    train(model, optimizer, data[:4])
    first, *_ = model.parameters()
    first.requires_grad_(False)
    first.grad = None
    train(model, optimizer, data[4:5])
    added = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [added]})
    added.grad = torch.ones(3, dtype=torch.float64)
    train(model, optimizer, data[5:])
    assert all(p.isfinite().all() for p in model.parameters())


# ---- Groups that are not perturbed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sgd_momentum", "adamw", "rmsprop"])
@pytest.mark.parametrize("closure", [False, True])
def test_a_group_that_is_not_perturbed(base, closure):
    """Equal to the official code that is handed the other groups only, and a base for the rest."""
    base, kwargs = BASES[base]
    mine, theirs = network(), network()
    split = lambda model: (list(model.parameters())[:2], list(model.parameters())[2:])  # noqa: E731
    (left, perturbed), (others, handed) = split(mine), split(theirs)
    groups = [{"params": left, "perturb": False}, {"params": perturbed}]
    optimizer = FriendlySAM(groups, base, rho=0.2, sigma=0.9, **kwargs)
    official_one, plain = OfficialFriendlySAM(handed, base, rho=0.2, sigma=0.9, **kwargs), base(others, **kwargs)
    for batch in batches(50):
        if closure:
            optimizer.step(closure_of(mine, batch))
        else:
            mine.zero_grad()
            backward(mine, batch)
            before = [p.detach().clone() for p in left]
            optimizer.first_step(zero_grad=True)
            assert all(map(identical, before, left))
            backward(mine, batch)
            optimizer.second_step()
        for half in (official_one.first_step, official_one.second_step):
            theirs.zero_grad()
            backward(theirs, batch)
            half()
        plain.step()
    assert worst(theirs, mine) < 1e-12
    assert all("fsam_ema" not in optimizer.state[p] for p in left)
    flats = optimizer._passes.layout.flats
    assert {kind.perturbed: "backup" in flat.names for kind, flat in flats.items()} == {False: False, True: True}


def test_a_group_that_is_not_perturbed_has_masters_that_adopt():
    groups = [nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = FriendlySAM(
        [{"params": groups[0], "perturb": False}, {"params": groups[1]}], SGD, lr=1e-3, master_weights=True
    )
    for half in (optimizer.first_step, optimizer.second_step):
        for p in groups:
            p.grad = torch.ones_like(p)
        half()
    assert torch.allclose(optimizer.state[groups[0]]["fsam_master"], torch.full((4,), 1 - 1e-3))
    groups[0].data.fill_(2.0)
    for half in (optimizer.first_step, optimizer.second_step):
        for p in groups:
            p.grad = torch.ones_like(p)
        half()
    assert torch.allclose(optimizer.state[groups[0]]["fsam_master"], torch.full((4,), 2 - 1e-3))


def test_restore_and_perturb_that_is_switched_in_training():
    model, data = network(), list(batches(6))
    params = list(model.parameters())
    optimizer = FriendlySAM([{"params": params[:2], "perturb": False}, {"params": params[2:]}], SGD, rho=0.5, lr=0.1)
    train(model, optimizer, data[:2])
    before = [p.detach().clone() for p in params]
    backward(model, data[2])
    optimizer.first_step()
    assert not torch.equal(before[-1], params[-1])
    optimizer.restore()
    assert all(map(identical, before, params))
    optimizer.param_groups[0]["perturb"], optimizer.param_groups[1]["perturb"] = True, False
    optimizer.first_step()
    assert torch.equal(before[-1], params[-1]) and not torch.equal(before[0], params[0])
    optimizer.second_step()
    train(model, optimizer, data[3:])
    assert "fsam_ema" in optimizer.state[params[0]]


# ---- rho as a function -----------------------------------------------------------------------------------------------


def test_rho_as_a_function_of_the_step():
    warm = lambda step: 0.05 * min(1.0, step / 4)  # noqa: E731
    mine, theirs = network(), network()
    optimizer = FriendlySAM(mine.parameters(), SGD, rho=warm, lr=0.05)
    other = OfficialFriendlySAM(theirs.parameters(), SGD, lr=0.05)
    for number, batch in enumerate(batches(10)):
        optimizer.step(closure_of(mine, batch))
        other.groups[0]["rho"] = warm(number)
        for half in (other.first_step, other.second_step):
            theirs.zero_grad()
            backward(theirs, batch)
            half()
    assert worst(theirs, mine) < 1e-13


def test_a_checkpoint_has_what_a_function_gives_and_a_function_stays(tmp_path):
    model, data = network(), list(batches(2))
    optimizer = FriendlySAM(model.parameters(), SGD, rho=lambda step: 0.1 * step, lr=0.05)
    train(model, optimizer, data)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    constant = FriendlySAM(model.parameters(), SGD, rho=0.3, lr=0.05)
    constant.load_state_dict(saved)
    assert constant.param_groups[0]["rho"] == 0.2 and constant.param_groups[0]["fsam_step"] == 2
    optimizer.load_state_dict(constant.state_dict())
    assert optimizer.param_groups[0]["rho"](7) == pytest.approx(0.7)


def test_a_function_of_one_group_and_one_that_gives_a_tensor():
    a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    groups = [{"params": [a], "rho": lambda step: torch.tensor(0.5 + step)}, {"params": [b]}]
    optimizer = FriendlySAM(groups, SGD, rho=0.1, lr=0.0, sigma=0.0)
    for rho in (0.5, 1.5):
        a.grad, b.grad = torch.ones(1), torch.zeros(1)
        optimizer.first_step()
        assert a.item() == pytest.approx(rho)
        optimizer.second_step()


@pytest.mark.parametrize("value", [-1.0, float("nan"), "a", None, torch.ones(2)])
def test_a_function_that_gives_no_radius(value):
    model, (batch,) = network(), batches(1)
    optimizer = FriendlySAM(model.parameters(), SGD, rho=lambda step: value, lr=0.05)
    backward(model, batch)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"rho\(0\), of the function given as rho, must be a finite number"):
        optimizer.first_step()
    assert all(map(identical, before, model.parameters())) and not optimizer.is_perturbed
    assert all(optimizer.state[p]["fsam_ema"].isnan().all() for p in model.parameters())


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reuse": 0.3}, "reuse=0.3 is for the steps between two ascents, and with every=1 there are none"),
        ({"reuse": -0.3, "every": 2}, "reuse must be a finite number of at least 0"),
        ({"reuse": float("nan"), "every": 2}, "reuse must be a finite number"),
        ({"reuse": "a", "every": 2}, "reuse must be a finite number"),
        ({"reuse_dtype": torch.bfloat16, "every": 2}, "reuse_dtype=torch.bfloat16 is of what reuse keeps"),
        ({"reuse": 0.3, "reuse_dtype": torch.int8, "every": 2}, "reuse_dtype must be torch.float32 or torch.bfloat16"),
        ({"reuse": 0.3, "every": 2, "base": torch.optim.RMSprop}, "reuse needs SGD, Adam or AdamW"),
        ({"reuse": 0.3, "every": 2, "base": AdamW, "amsgrad": True}, "reuse needs SGD, Adam or AdamW"),
        ({"reuse": 0.3, "every": 2, "ascent_sync": False}, "reuse=0.3 with ascent_sync=False"),
        ({"rho": math.sqrt, "capturable": True}, "rho is a function of the step's number"),
        ({"perturb": False}, "perturb is False in all groups"),
        ({"perturb": "no"}, "perturb must be True or False"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_options(options, message):
    options = {**options}
    group = {"params": [nn.Parameter(torch.ones(3))], **{n: options.pop(n) for n in ("perturb",) if n in options}}
    with pytest.raises(ValueError, match=message) as caught:
        FriendlySAM([group], options.pop("base", SGD), lr=0.1, **options)
    assert "\n" not in str(caught.value)


def test_reuse_dtype_of_float64_parameters():
    with pytest.raises(TypeError, match="is float64, which reuse_dtype=torch.bfloat16 does not go with"):
        FriendlySAM(network().parameters(), SGD, lr=0.1, every=2, reuse=0.3, reuse_dtype=torch.bfloat16)


def test_bad_groups_that_are_added_leave_the_optimizer_as_it_was():
    optimizer = FriendlySAM(network().parameters(), SGD, lr=0.1)
    with pytest.raises(ValueError, match="every=1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "reuse": 0.3})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("half", ["first_step", "step"])
def test_groups_that_are_all_switched_off_in_training(half):
    model, data = network(), list(batches(2))
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.1, every=2)
    if half == "step":
        train(model, optimizer, data[:1])
        model.zero_grad()
    optimizer.param_groups[0]["perturb"] = False
    backward(model, data[1])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="perturb is False in all groups"):
        getattr(optimizer, half)()
    assert all(map(identical, before, model.parameters()))


def test_a_group_whose_reuse_is_switched_between_the_passes():
    """What it kept goes, and the others go on without it."""
    a, b = (nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(2))
    optimizer = FriendlySAM([{"params": [a]}, {"params": [b]}], SGD, rho=0.1, lr=0.0, every=2, reuse=0.5)
    g1, g2 = torch.randn(2, 2, 5, dtype=torch.float64)
    a.grad, b.grad = g1.clone()
    optimizer.first_step()
    optimizer.param_groups[1]["reuse"] = 0.0
    a.grad, b.grad = g2.clone()
    optimizer.second_step()
    v = g2[0] - (g2[0] @ g1[0]) / (g1[0] @ g1[0]) * g1[0]
    assert torch.allclose(optimizer.state[a]["fsam_reuse"], v, rtol=1e-12)
    assert "fsam_reuse" not in optimizer.state[b]
    assert norm_sq(optimizer) == pytest.approx(float(v @ v), rel=1e-12)


def test_ascent_sync_that_is_switched_off_later():
    model, (batch,) = network(), batches(1)
    optimizer = reusing(model)
    optimizer.ascent_sync = False
    backward(model, batch)
    with pytest.raises(RuntimeError, match="reuse needs one ascent of all ranks"):
        optimizer.first_step()


@pytest.mark.parametrize("value", ["a", -1.0, float("nan"), None])
def test_a_checkpoint_with_a_bad_norm(value):
    model, data = network(), list(batches(1))
    optimizer = reusing(model)
    train(model, optimizer, data)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["fsam_reuse_sq"] = value
    with pytest.raises(ValueError, match="fsam_reuse_sq of a checkpoint's groups is a number of at least 0"):
        optimizer.load_state_dict(saved)
