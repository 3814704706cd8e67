"""GradScaler: unscaled averages, one back-off a step, and a step that overflows leaves no trace."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from fsam_ext import SAM, FriendlySAM

from .conformance import identical

SGD, AdamW, RMSprop = torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop
KWARGS = {
    SGD: {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    AdamW: {"lr": 0.01},
    RMSprop: {"lr": 0.01},  # not fused
}


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (300, 17)]


def gradients(steps, dtype=torch.float32):
    """[step][pass] lists of gradients that a scale of a power of two changes exactly."""
    generator = torch.Generator().manual_seed(1)
    return [
        [[torch.randn(n, generator=generator).to(dtype) for n in (300, 17)] for _ in range(2)] for _ in range(steps)
    ]


def set_gradients(params, grads, scale=1.0, poison=False):
    for p, g in zip(params, grads, strict=True):
        p.grad = g * scale
    if poison:
        params[1].grad[3] = math.inf


def scaled_step(optimizer, params, scaler, grads, poison=(), clip=None):
    """The documented recipe, with given gradients in the place of the backwards."""
    for half in range(2):
        scaler.scale(torch.ones(()))  # a scaler makes its tensors on the first use
        set_gradients(params, grads[half], scaler.get_scale(), half in poison)
        if half == 0:
            optimizer.first_step(grad_scaler=scaler)
    if clip is not None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, clip)
    scaler.step(optimizer)
    scaler.update()


def plain_step(optimizer, params, grads, clip=None):
    set_gradients(params, grads[0])
    optimizer.first_step()
    set_gradients(params, grads[1])
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(params, clip)
    optimizer.second_step()


def everything(optimizer, params):
    return [*params, *(value for p in params for _, value in sorted(optimizer.state[p].items()))]


def make(base, dtype=torch.float32, cls=FriendlySAM, **options):
    params = parameters(dtype)
    return params, cls(params, base, rho=0.3, **KWARGS[base], **options)


def scaler_of(scale=2.0**10, interval=10**6):
    return GradScaler("cpu", init_scale=scale, growth_interval=interval)


@pytest.mark.parametrize("clip", [None, 0.5], ids=["", "clipped"])
@pytest.mark.parametrize("base", [SGD, AdamW, RMSprop])
def test_a_scaled_run_is_the_unscaled_run_to_the_bit(base, clip):
    params, optimizer = make(base)
    twins, plain = make(base)
    scaler = scaler_of()
    for grads in gradients(5):
        scaled_step(optimizer, params, scaler, grads, clip=clip)
        plain_step(plain, twins, grads, clip=clip)
        assert all(map(identical, everything(optimizer, params), everything(plain, twins)))
    assert scaler.get_scale() == 2.0**10


@pytest.mark.parametrize("poison", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
@pytest.mark.parametrize("base", [SGD, AdamW, RMSprop])
def test_an_overflow_skips_the_step_and_backs_off_once(base, poison):
    """Equal to a run without that step, to the bit, average included where the first pass overflowed."""
    params, optimizer = make(base)
    twins, plain = make(base)
    scaler = scaler_of()
    data = gradients(6)
    for step, grads in enumerate(data):
        if step == 3:
            before = copy.deepcopy([t.detach() for t in everything(optimizer, params)])
            scaled_step(optimizer, params, scaler, grads, poison=poison)
            assert scaler.get_scale() == 2.0**9
            after = everything(optimizer, params)
            if 0 in poison:
                assert all(map(identical, before, after))
                continue
            # The average has seen the first gradient, which was good; nothing else has moved.
            set_gradients(twins, grads[0])
            plain.first_step()
            plain.restore()
            assert all(map(identical, after, everything(plain, twins)))
            continue
        scaled_step(optimizer, params, scaler, grads)
        plain_step(plain, twins, grads)
    assert all(map(identical, everything(optimizer, params), everything(plain, twins)))


AFTERWARDS = {
    "clipped": lambda params: [
        torch.nn.utils.clip_grad_norm_(p, 1.0) for p in params if p.grad.nan_to_num_(7.0, 7.0).any()
    ],
    "clamped": lambda params: [p.grad.nan_to_num_().clamp_(-1, 1) for p in params],
    "sign": lambda params: [p.grad.nan_to_num_().sign_() for p in params],
    "replaced": lambda params: [setattr(p, "grad", torch.ones_like(p)) for p in params],
}


@pytest.mark.parametrize("afterwards", AFTERWARDS)
@pytest.mark.parametrize("value", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("base", [SGD, AdamW, RMSprop])
def test_an_overflow_of_the_first_pass_counts_whatever_is_done_to_the_gradient_afterwards(base, value, afterwards):
    params, optimizer = make(base)
    scaler = scaler_of()
    steps = gradients(4)
    for grads in steps[:2]:
        scaled_step(optimizer, params, scaler, grads)
    before = [value.detach().clone() for value in everything(optimizer, params)]
    scale = scaler.get_scale()
    set_gradients(params, steps[2][0], scale)
    params[1].grad[3] = value
    scaler.unscale_(optimizer)
    AFTERWARDS[afterwards](params)
    assert all(p.grad.isfinite().all() for p in params)
    optimizer.first_step(grad_scaler=scaler)
    assert bool(optimizer.stats()["found_inf"])
    set_gradients(params, steps[2][1], scale)
    scaler.step(optimizer)
    scaler.update()
    assert all(map(identical, before, everything(optimizer, params)))
    assert scaler.get_scale() == scale / 2
    scaled_step(optimizer, params, scaler, steps[3])
    assert not identical(params[0], before[0]) and scaler.get_scale() == scale / 2


def test_a_scale_that_is_too_large_comes_down_and_training_goes_on():
    model = nn.Linear(20, 20).half()
    params = list(model.parameters())
    optimizer = FriendlySAM(params, SGD, rho=0.1, lr=0.01, momentum=0.9)
    scaler = GradScaler("cpu", init_scale=2.0**30)
    x = torch.randn(8, 20).half()
    start = [p.detach().clone() for p in params]
    losses = []
    for _ in range(40):
        for half in range(2):
            optimizer.zero_grad()
            loss = model(x).float().square().mean()
            scaler.scale(loss).backward()
            if half == 0:
                losses.append(loss.item())
                optimizer.first_step(grad_scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() > 2.0**27:
            assert all(map(identical, params, start))
    assert scaler.get_scale() < 2.0**25
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.isfinite().all() for p in params)
    assert all(optimizer.state[p]["fsam_ema"].isfinite().all() for p in params)


def test_the_average_sees_unscaled_gradients():
    params, optimizer = make(SGD)
    scaler = scaler_of(2.0**14)
    (grads,) = gradients(1)
    scaled_step(optimizer, params, scaler, grads)
    for p, g in zip(params, grads[0], strict=True):
        assert identical(optimizer.state[p]["fsam_ema"], g)
    norm = torch.cat(grads[0]).double().norm()
    assert math.isclose(optimizer.stats()["grad_norm"], norm, rel_tol=1e-6)


def test_clipping_in_both_passes():
    params, optimizer = make(SGD)
    twins, plain = make(SGD)
    scaler = scaler_of()
    for grads in gradients(3):
        set_gradients(params, grads[0], scaler.scale(torch.ones(())))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.first_step(grad_scaler=scaler)
        set_gradients(params, grads[1], scaler.get_scale())
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(optimizer)
        scaler.update()
        for half, step in enumerate((plain.first_step, plain.second_step)):
            set_gradients(twins, grads[half])
            torch.nn.utils.clip_grad_norm_(twins, 0.5)
            step()
    assert all(map(identical, everything(optimizer, params), everything(plain, twins)))


def test_within_the_perturbed_block():
    params, optimizer = make(SGD)
    twins, plain = make(SGD)
    scaler = scaler_of()
    for grads in gradients(3):
        set_gradients(params, grads[0], scaler.scale(torch.ones(())))
        with optimizer.perturbed(grad_scaler=scaler):
            set_gradients(params, grads[1], scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        plain_step(plain, twins, grads)
    assert all(map(identical, everything(optimizer, params), everything(plain, twins)))


def test_in_a_step_without_an_ascent():
    params, optimizer = make(SGD, every=2)
    twins, plain = make(SGD, every=2)
    scaler = scaler_of()
    for step, grads in enumerate(gradients(4)):
        if step % 2 == 0:
            scaled_step(optimizer, params, scaler, grads)
            plain_step(plain, twins, grads)
            continue
        poison = step == 3
        set_gradients(params, grads[0], scaler.get_scale(), poison)
        scaler.step(optimizer)
        scaler.update()
        if not poison:
            set_gradients(twins, grads[0])
            plain.step()
    assert scaler.get_scale() == 2.0**9
    assert all(map(identical, everything(optimizer, params), everything(plain, twins)))


def test_masters_and_a_scaler():
    params, optimizer = make(AdamW, torch.float16, master_weights=True)
    twins, plain = make(AdamW, torch.float16, master_weights=True)
    scaler = scaler_of(2.0**4)
    data = gradients(5, torch.float16)
    for step, grads in enumerate(data):
        scaled_step(optimizer, params, scaler, grads, poison=(0,) if step == 2 else ())
        if step != 2:
            plain_step(plain, twins, grads)
    assert all(map(identical, everything(optimizer, params), everything(plain, twins)))


def test_a_closure_through_the_scaler_is_refused():
    params, optimizer = make(SGD)
    scaler = scaler_of()
    (grads,) = gradients(1)
    before = [p.detach().clone() for p in params]
    scaler.scale(torch.ones(()))
    set_gradients(params, grads[0], scaler.get_scale())
    with pytest.raises(RuntimeError, match="GradScaler, which does not see the closure's gradients"):
        scaler.step(optimizer, lambda: torch.zeros(()))
    assert all(map(identical, params, before))


def test_a_scaler_in_one_pass_only_is_refused_and_can_be_undone():
    (grads,) = gradients(1)
    for with_scaler_first in (True, False):
        params, optimizer = make(SGD)
        before = [p.detach().clone() for p in params]
        scaler = scaler_of()
        scaler.scale(torch.ones(()))
        set_gradients(params, grads[0], scaler.get_scale())
        optimizer.first_step(grad_scaler=scaler if with_scaler_first else None)
        set_gradients(params, grads[1], scaler.get_scale())
        if with_scaler_first:
            with pytest.raises(RuntimeError, match="finish the step with scaler.step"):
                optimizer.second_step()
        else:
            with pytest.raises(RuntimeError, match="call first_step\\(grad_scaler=scaler\\)"):
                scaler.step(optimizer)
        optimizer.restore()
        assert all(map(identical, params, before))


def test_a_step_that_was_forgotten_is_refused_through_the_scaler_too():
    params, optimizer = make(SGD)
    scaler = scaler_of()
    scaler.scale(torch.ones(()))
    set_gradients(params, gradients(1)[0][0], scaler.get_scale())
    with pytest.raises(RuntimeError, match="without first_step"):
        scaler.step(optimizer)


def test_what_is_no_scaler_is_refused():
    params, optimizer = make(SGD)
    before = [p.detach().clone() for p in params]
    set_gradients(params, gradients(1)[0][0])
    with pytest.raises(TypeError, match="grad_scaler must be a torch.amp.GradScaler, not str"):
        optimizer.first_step(grad_scaler="scaler")
    assert all(map(identical, params, before))
    optimizer.first_step()  # nothing has begun


def test_a_disabled_scaler_is_no_scaler():
    """One path for GradScaler(enabled=use_amp)."""
    scaler = GradScaler("cpu", enabled=False)
    (params, optimizer), (others, plain) = make(SGD), make(SGD)
    for first, second in gradients(3):
        for half, other, grads in (
            (lambda: optimizer.first_step(grad_scaler=scaler), plain.first_step, first),
            (lambda: scaler.step(optimizer), plain.second_step, second),
        ):
            set_gradients(params, grads)
            set_gradients(others, grads)
            half()
            other()
        scaler.update()
    assert all(map(identical, params, others))


@pytest.mark.parametrize("cls", [FriendlySAM, SAM])
def test_no_gradients_at_all_with_a_scaler(cls):
    params, optimizer = make(SGD, cls=cls)
    scaler = scaler_of()
    scaler.scale(torch.ones(()))
    optimizer.first_step(grad_scaler=scaler)
    with pytest.raises(AssertionError):  # the scaler's own: it recorded no gradient
        scaler.step(optimizer)
        scaler.update()
    optimizer.restore()
