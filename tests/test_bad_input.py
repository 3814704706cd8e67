"""Bad input: one sentence that names the parameter, the value and the remedy, before anything is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fsam_ext import SAM, FriendlySAM, flatten_parameters

from .conformance import identical

SGD = torch.optim.SGD


def model_of(*shapes):
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


@pytest.mark.parametrize(
    "options,message",
    [
        ({"rho": -0.1}, r"rho must be a finite number of at least 0, or a function of the step.s number, not -0.1"),
        ({"rho": float("nan")}, r"rho must be .* not nan"),
        ({"rho": "big"}, r"rho must be .* not 'big'"),
        ({"rho": torch.ones(2)}, r"rho must be .* shape \(2,\)"),
        ({"sigma": float("inf")}, r"sigma must be .* not inf"),
        ({"lmbda": 1.0}, r"lmbda must be a number in \[0, 1\), not 1.0"),
        ({"lmbda": -0.1}, r"lmbda must be .* not -0.1"),
        ({"lmbda": float("nan")}, r"lmbda must be .* not nan"),
        ({"perturb_eps": -1.0}, r"perturb_eps must be .* not -1.0"),
        ({"ema": "sometimes"}, r"ema must be 'previous'.* or 'updated'.*, not 'sometimes'"),
        ({"backend": "abacus"}, r"backend must be one of cpu, .* not 'abacus'"),
        ({"lr": -1.0}, r"lr|learning rate"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        FriendlySAM(model_of(3), SGD, **options)


def test_an_option_of_one_group():
    optimizer = FriendlySAM(model_of(3), SGD, lr=0.1)
    with pytest.raises(ValueError, match="lmbda must be"):
        optimizer.add_param_group({"params": model_of(3), "lmbda": 2.0})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": model_of(3)})


def test_an_option_edited_to_nonsense():
    params = model_of(3)
    optimizer = FriendlySAM(params, SGD, lr=0.1)
    before = params[0].detach().clone()
    params[0].grad = torch.ones(3)
    optimizer.param_groups[0]["rho"] = -1
    with pytest.raises(ValueError, match="rho must be .* not -1"):
        optimizer.first_step()
    assert identical(params[0], before) and not optimizer.state


@pytest.mark.parametrize("seed", (2**63, -(2**63) - 1, "a", 1.5, True, None))
def test_a_rounding_seed_is_checked_by_the_constructor(seed):
    with pytest.raises(ValueError, match="rounding_seed must be an integer of 64 bits, not"):
        FriendlySAM(model_of(3), lr=0.1, rounding_seed=seed)


EDITS = [
    (torch.float32, torch.optim.Adam, {"amsgrad": True}, "group 0 asks Adam for amsgrad"),
    (torch.float32, torch.optim.AdamW, {"differentiable": True}, "group 0 asks AdamW for amsgrad or differentiable"),
    (
        torch.float32,
        torch.optim.Adam,
        {"amsgrad": torch.ones(2)},
        "amsgrad of group 0 must be True or False, not tensor",
    ),
    (torch.bfloat16, torch.optim.RMSprop, {"master_weights": True}, "master_weights needs SGD, Adam or AdamW"),
    (
        torch.bfloat16,
        torch.optim.RMSprop,
        {"stochastic_rounding": True},
        "stochastic_rounding needs SGD, Adam or AdamW",
    ),
    (torch.float32, torch.optim.SGD, {"master_weights": True}, "master_weights is for bfloat16 and float16 parameters"),
    (torch.float64, torch.optim.SGD, {"ema_dtype": torch.int8}, "is float64, which ema_dtype=torch.int8 does not go"),
    (
        torch.float64,
        torch.optim.SGD,
        {"ema_dtype": torch.bfloat16},
        "is float64, which ema_dtype=torch.bfloat16 does not",
    ),
    (
        torch.float64,
        torch.optim.SGD,
        {"forward_dtype": torch.bfloat16},
        "is float64, which forward_dtype=torch.bfloat16",
    ),
    (torch.float32, torch.optim.SGD, {"forward_dtype": []}, "forward_dtype must be torch.bfloat16 or torch.float16"),
    (torch.float32, torch.optim.SGD, {"lmbda": float("nan")}, r"lmbda must be a number in \[0, 1\), not nan"),
    (torch.float32, torch.optim.SGD, {"sigma": 10**400}, "sigma must be a finite number"),
    (torch.float32, torch.optim.SGD, {"momentum": "much"}, "momentum of group 0 must be a finite number, not 'much'"),
    (
        torch.float32,
        torch.optim.SGD,
        {"nesterov": torch.ones(2)},
        "nesterov of group 0 must be True or False, not tensor",
    ),
]


@pytest.mark.parametrize("kind", ("ascent", "plain step", "update"))
@pytest.mark.parametrize("dtype, base, edit, message", EDITS)
def test_an_option_edited_in_training_is_checked_in_every_step_before_anything_is_written(
    dtype, base, edit, message, kind
):
    param = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = FriendlySAM([param], base, lr=0.1, every=2)

    def half(act):
        param.grad = torch.ones_like(param)
        act()

    half(optimizer.first_step)
    half(optimizer.second_step)
    half(optimizer.step)
    if kind == "plain step":
        half(optimizer.first_step)
        half(optimizer.second_step)
    elif kind == "update":
        half(optimizer.first_step)
    before = [param.detach().clone(), *(value.clone() for value in optimizer.state[param].values())]
    number, known = optimizer.param_groups[0]["fsam_step"], dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(edit)
    with pytest.raises((ValueError, TypeError), match=message):
        half(optimizer.first_step if kind == "ascent" else optimizer.step)
    assert all(map(identical, before, [param.detach(), *optimizer.state[param].values()]))
    assert optimizer.param_groups[0]["fsam_step"] == number
    optimizer.param_groups[0].clear()
    optimizer.param_groups[0].update(known)
    half(optimizer.first_step if kind == "ascent" else optimizer.step)  # mended, it goes on


def test_float32_gradients_of_a_16_bit_parameter_are_refused_with_their_cause():
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    param.grad_dtype = torch.float32
    param.grad = torch.ones(4)
    with pytest.raises(
        RuntimeError, match="is torch.float32, which its grad_dtype allows.*do not set grad_dtype, or keep"
    ):
        FriendlySAM([param], lr=0.1).first_step()
    assert param.eq(1).all()


def test_unknown_option():
    with pytest.raises(TypeError, match="bananas"):
        FriendlySAM(model_of(3), SGD, bananas=3)


@pytest.mark.parametrize(
    "base,message",
    [(SGD(model_of(1), lr=0.1), "must be a class of torch.optim"), (torch.optim.LBFGS, "LBFGS .* needs no closure")],
)
def test_base_optimizer(base, message):
    with pytest.raises(TypeError, match=message):
        FriendlySAM(model_of(3), base)


def test_empty_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        FriendlySAM([], SGD)


def test_parameters_on_meta():
    layer = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"parameter 'weight' is on the meta device; materialise"):
        FriendlySAM(layer.named_parameters(), SGD)


def test_parameters_with_gaps():
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 .*strides \(6, 2\).*contiguous"):
        FriendlySAM([nn.Parameter(torch.zeros(3, 6)[:, ::2])], SGD)


def test_amsgrad_in_one_group_only():
    optimizer = FriendlySAM(model_of(3), torch.optim.Adam)
    with pytest.raises(ValueError, match="group 1 asks Adam for amsgrad"):
        optimizer.add_param_group({"params": model_of(3), "amsgrad": True})


class Steps:
    """A good step, so that there is state to be left alone; then a bad gradient in one of the passes."""

    def __init__(self, groups: int) -> None:
        self.params = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
        named = [(f"layer{i}.weight", p) for i, p in enumerate(self.params)]
        grouped = [{"params": named[:2]}, {"params": named[2:]}] if groups == 2 else named
        self.optimizer = FriendlySAM(grouped, torch.optim.AdamW, lr=0.1)
        self.passes(2)

    def passes(self, count: int) -> None:
        for half in (self.optimizer.first_step, self.optimizer.second_step)[:count]:
            for p in self.params:
                p.grad = torch.randn_like(p)
            half()

    def snapshot(self):
        state = [t.clone() for p in self.params for t in self.optimizer.state[p].values()]
        return [p.detach().clone() for p in self.params] + state


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("which", ["first_step", "second_step"])
@pytest.mark.parametrize("bad", ["sparse", "shape", "dtype"])
def test_gradients_that_changed(bad, which, groups):
    steps = Steps(groups)
    optimizer, victim = steps.optimizer, steps.params[2]
    before = steps.snapshot()
    steps.passes(0 if which == "first_step" else 1)
    during = steps.snapshot()
    for p in steps.params:
        p.grad = torch.randn_like(p)
    if bad == "sparse":
        victim.grad = torch.randn(4, 3).to_sparse()
    elif bad == "shape":
        victim.grad.data = torch.randn(5, 3)
    else:
        victim.grad.data = torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"the gradient of parameter 'layer2.weight'"):
        getattr(optimizer, which)()
    assert all(map(identical, during, steps.snapshot()))
    optimizer.restore()
    assert all(map(identical, before[:3], steps.params))


def test_a_sparse_gradient_in_the_first_step_of_all():
    layer = nn.Embedding(5, 3, sparse=True)
    optimizer = FriendlySAM(layer.named_parameters(), SGD, lr=0.1)
    layer(torch.tensor([1, 2])).sum().backward()
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"the gradient of parameter 'weight' is sparse; use sparse=False"):
        optimizer.first_step()
    assert identical(layer.weight, before) and not optimizer.state


def test_stats_before_an_ascent():
    """Loggers ask in every step, also in those before a schedule's first ascent."""
    stats = SAM(model_of(3), SGD).stats()
    assert not stats.pop("found_inf")
    assert len(stats) == 4 and all(value.isnan() for value in stats.values())


def test_a_checkpoint_of_another_model():
    params, others = model_of(3, 4), model_of(3, 5)
    optimizer = FriendlySAM(params, SGD, lr=0.1, momentum=0.9)
    other = FriendlySAM(others, SGD, lr=0.1, momentum=0.9)
    for p in others:
        p.grad = torch.ones_like(p)
    other.first_step()
    other.second_step()
    with pytest.raises(
        ValueError,
        match=r"state 'fsam_ema' of parameter 1 of group 0 .*shape \(5,\), .* in the checkpoint",
    ):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(FriendlySAM(model_of(3), SGD).state_dict())


@pytest.mark.parametrize(
    "param,error,message",
    [
        (nn.Parameter(torch.zeros(3, 6)[:, ::2]), ValueError, r"'weight' with strides \(6, 2\)"),
        (nn.Parameter(torch.zeros(3, device="meta")), ValueError, r"'weight' \(meta"),
    ],
)
def test_parameters_that_cannot_be_flattened(param, error, message):
    module = nn.Module()
    module.weight = param
    with pytest.raises(error, match=message):
        flatten_parameters(module)
