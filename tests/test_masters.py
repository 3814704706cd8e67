"""What others write into weights counts, through whatever door: clamps, model averagers, ``p.data = ...``.

16-bit weights with float32 masters are their rounded copies, and most of these writes leave no trace on a tensor.
Weights without masters count of themselves; their optimizer has to notice where they lie.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import vector_to_parameters

from fsam_ext import SAM, flatten_parameters

from .conformance import identical

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
KWARGS = {SGD: {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}, AdamW: {"lr": 0.01, "weight_decay": 0.1}}
RHO = 0.3
BF16 = torch.bfloat16


class Plain:
    """What must come out, in plain PyTorch: float32 weights that torch's optimizer updates with the second gradients.

    An element that someone writes becomes what they wrote; the others keep the bits that 16-bit weights lack.
    """

    def __init__(self, params, base):
        self.weights = [p.detach().float().clone() for p in params]
        self.optimizer = base(self.weights, **KWARGS[base])

    def take(self, before, params):
        """Others have written into ``params``, which were ``before``."""
        for weight, old, param in zip(self.weights, before, params, strict=True):
            weight.copy_(torch.where(param.detach() == old, weight, param.detach().float()))

    def perturbed(self, grads, dtype):
        norm = torch.cat([g.flatten() for g in grads]).norm()
        return [(w + RHO * g / norm).to(dtype) for w, g in zip(self.weights, grads, strict=True)]

    def step(self, grads):
        for weight, grad in zip(self.weights, grads, strict=True):
            weight.grad = grad
        self.optimizer.step()


class Run:
    """A model, its optimizer with masters (or float32 weights), and what must come out."""

    def __init__(self, dtype=BF16, base=SGD, flatten=None, layers=2, **options):
        # One weight lies in another order than contiguous tensors.
        blocks = [nn.Sequential(nn.Linear(5, 33), nn.LayerNorm(33)) for _ in range(layers)]
        self.model = nn.Sequential(nn.Conv2d(4, 6, 3), *blocks).to(memory_format=torch.channels_last).to(dtype)
        if flatten is not None:
            flatten_parameters(self.model, grads=flatten)
        self.params = list(self.model.parameters())
        self.options = {
            "rho": RHO,
            "master_weights": dtype != torch.float32,
            **KWARGS[base],
            **options,
        }
        self.optimizer = SAM(self.params, base, **self.options)
        self.plain = Plain(self.params, base)

    def write(self, how):
        before = [p.detach().clone() for p in self.params]
        how(self.model)
        assert not all(map(identical, before, self.params)), "nothing was written"
        self.plain.take(before, self.params)

    def backward(self):
        """Random gradients, which do not depend on weights; returned in float32."""
        grads = [torch.randn(p.shape).to(p.dtype) for p in self.params]
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad.clone()
        return [grad.float() for grad in grads]

    def ascend(self):
        grads, dtype = self.backward(), self.params[0].dtype
        self.optimizer.first_step()
        for param, exact in zip(self.params, self.plain.perturbed(grads, dtype), strict=True):
            # The two may be rounded to neighbours.
            torch.testing.assert_close(param.detach(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)

    def descend(self):
        grads = self.backward()
        self.optimizer.step()
        self.plain.step(grads)
        self.check()

    def step(self):
        if self.optimizer.ascends:
            self.ascend()
        self.descend()

    def check(self):
        for param, exact in zip(self.params, self.plain.weights, strict=True):
            master = self.optimizer.state[param].get("fsam_master", param.detach())
            torch.testing.assert_close(master, exact, check_stride=False)
            assert identical(param, master.to(param.dtype))


# ---- What others do --------------------------------------------------------------------------------------------------


def vector_of(params):
    """torch's parameters_to_vector, which refuses weights in another order than contiguous tensors."""
    return torch.cat([p.detach().reshape(-1) for p in params])


def clamp(model):
    for param in model.parameters():
        param.data.clamp_(-0.1, 0.1)


def copy_into(model):
    for param in model.parameters():
        param.data.copy_(torch.randn_like(param))


def give_other_memory(model):
    for param in model.parameters():
        param.data = torch.randn_like(param)


def give_memory_in_another_order(model):
    """As torch's model averagers do: views of one vector, off any bounds, contiguous whatever the strides were."""
    flat, offset = vector_of(model.parameters()).mul(0.5), 0
    for param in model.parameters():
        param.data = flat[offset : offset + param.numel()].view(param.shape)
        offset += param.numel()


def through_a_vector(model):
    vector_to_parameters(vector_of(model.parameters()) * 0.5, model.parameters())


def some_elements(model):
    for param in model.parameters():
        param.data[torch.rand(param.shape) < 0.2] = 0.25
    model[0].weight.data[1, 2] = 3.0


@torch.no_grad()
def openly(model):
    for param in model.parameters():
        param.mul_(0.75)


def load(model):
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})


WRITES = [clamp, copy_into, give_other_memory, give_memory_in_another_order, through_a_vector, openly, load]
EVERY_WRITE = pytest.mark.parametrize("how", WRITES, ids=lambda how: how.__name__)
DTYPES = pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)


# ---- When they do it -------------------------------------------------------------------------------------------------


@EVERY_WRITE
@DTYPES
@pytest.mark.parametrize("base", [SGD, AdamW])
@pytest.mark.parametrize("layers", [2, 12])
def test_between_steps(how, dtype, base, layers):
    """2 + 4 layers parameters: few, and more than C++ holds on to."""
    run = Run(dtype, base, layers=layers)
    run.step()
    run.write(how)
    run.step()
    run.step()


@EVERY_WRITE
@DTYPES
@pytest.mark.parametrize("grads", [False, True])
def test_between_steps_of_a_flattened_model(how, dtype, grads):
    run = Run(dtype, flatten=grads)
    run.step()
    run.write(how)
    run.step()
    run.step()


@EVERY_WRITE
@DTYPES
@pytest.mark.parametrize("base", [SGD, AdamW])
@pytest.mark.parametrize("flatten", [None, True])
def test_before_a_step_without_an_ascent(how, dtype, base, flatten):
    run = Run(dtype, base, flatten, every=2)
    run.step()
    for _ in range(3):
        run.write(how)
        run.step()


@EVERY_WRITE
@DTYPES
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_between_the_ascent_and_its_step(how, dtype, base):
    """The block has brought the weights back."""
    run = Run(dtype, base)
    run.step()
    run.backward()
    with run.optimizer.perturbed():
        run.backward()
    run.write(how)
    run.descend()


@EVERY_WRITE
@DTYPES
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_before_the_first_step_after_a_checkpoint(how, dtype, base):
    run = Run(dtype, base)
    run.step()
    state = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer = SAM(run.params, base, **run.options)
    run.optimizer.load_state_dict(state)
    run.write(how)
    run.step()


@EVERY_WRITE
@DTYPES
def test_into_perturbed_weights_is_undone(how, dtype):
    run = Run(dtype)
    run.step()
    for again in (run.descend, run.optimizer.restore):
        run.ascend()
        how(run.model)
        again()
        run.check()


@pytest.mark.parametrize("base", [SGD, AdamW])
@pytest.mark.parametrize("found_in", ["first", "plain", "second"])
def test_a_step_that_is_skipped_keeps_what_was_written(base, found_in):
    """An infinite gradient in the ascent; in a step without one, and in a second pass, a gradient scaler's word."""
    run = Run(torch.float16, base, every=2)
    run.step()
    if found_in != "plain":
        run.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    state = [run.optimizer.state[p] for p in run.params]
    moments = [{name: value.clone() for name, value in entry.items() if name != "fsam_master"} for entry in state]
    run.write(some_elements)
    written = [p.detach().clone() for p in run.params]
    scaler.scale(torch.ones((), requires_grad=True)).backward()
    if found_in != "plain":
        run.backward()
        if found_in == "first":
            run.params[1].grad[0] = torch.inf
        run.optimizer.first_step(grad_scaler=scaler)
    run.backward()
    if found_in != "first":
        run.params[1].grad[0] = torch.inf
    scaler.step(run.optimizer)
    scaler.update()
    assert all(map(identical, run.params, written))
    for entry, before in zip(state, moments, strict=True):
        assert all(identical(entry[name], value) for name, value in before.items() if name != "ema")
    run.check()
    run.optimizer.zero_grad()
    run.step()


def test_not_a_number_counts_and_stays():
    run = Run()
    run.step()
    run.params[1].data[2] = torch.nan
    run.backward()
    run.params[1].grad[0] = torch.inf  # the step is skipped
    run.optimizer.first_step()
    run.backward()
    run.optimizer.second_step()
    master = run.optimizer.state[run.params[1]]["fsam_master"]
    assert run.params[1].isnan().nonzero().tolist() == master.isnan().nonzero().tolist() == [[2]]


def test_what_only_the_second_pass_has_counts_in_it():
    """Parameters without a gradient in the first pass are not perturbed: what is written between the passes counts."""
    run = Run(base=AdamW)
    run.step()
    later = run.model[0].weight
    run.backward()
    later.grad = None
    run.optimizer.first_step()
    run.write(lambda model: later.data.clamp_(-0.1, 0.1))
    run.descend()


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_untouched_masters_keep_the_bits_that_weights_lack(base):
    """A write of the value that a weight has is none."""
    runs = [Run(base=base, every=2) for _ in range(2)]
    runs[1].model.load_state_dict(runs[0].model.state_dict())
    for number in range(4):
        for run in runs:
            torch.manual_seed(number)
            if run is runs[1]:
                vector_to_parameters(vector_of(run.params), run.params)
            if run.optimizer.ascends:
                run.backward()
                run.optimizer.first_step()
            run.backward()
            run.optimizer.step()
    masters = [[run.optimizer.state[p]["fsam_master"] for p in run.params] for run in runs]
    assert all(map(identical, *masters)) and all(map(identical, runs[0].params, runs[1].params))
