"""Parameters that C++ holds on to: the same numbers as from lists, and nothing that changed goes unnoticed."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from fsam_ext import FriendlySAM, backends, flatten_parameters
from fsam_ext.step import held

from .conformance import BACKENDS, identical
from .test_optimizer import BASES, backward, batches, network, one_step

OPS = torch.ops.fsam_ext
LOOKS = {"held": held.look_at, "listed": lambda params, key: held.Listed(params)}


def key(count: int = 1) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int64)


def parameters(with_grads: bool = True, copies: int = 1) -> list[Parameter]:
    params = [Parameter(torch.randn(shape)) for shape in ((3, 5), (), (0,), (7,)) * copies]
    for param in params:
        param.grad = torch.randn(param.shape) if with_grads else None
    return params


def some_of(count: int, chosen: int) -> list[int]:
    return torch.randperm(count)[:chosen].tolist()


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    monkeypatch.setattr(held, "FEWEST", 1)


def with_new_grad(make):
    """An edit that gives a parameter what is made of its gradient."""

    def edit(param):
        grad, param.grad = param.grad, None
        param.grad_dtype = None  # any
        param.grad = make(grad)

    return edit


def with_new_data(make):
    def edit(param):
        param.data = make(param.data)

    return edit


def reversed_order(tensor):
    """Equal values in another order of memory."""
    dims = range(tensor.dim())[::-1]
    return tensor.permute(*dims).contiguous().permute(*dims) if tensor.dim() else tensor.clone()


EDITS_OF_FORMS = {
    "nothing": lambda param: None,
    "another gradient": with_new_grad(torch.clone),
    "a gradient in another order": with_new_grad(reversed_order),
    "a gradient with gaps": with_new_grad(lambda grad: torch.stack([grad, grad], dim=-1)[..., 0]),
    "a gradient with its sign to be changed": with_new_grad(torch._neg_view),
    "no memory": with_new_grad(lambda grad: torch._efficientzerotensor(grad.shape)),
    "a gradient of another dtype": with_new_grad(lambda grad: grad.double()),
    "the gradient's memory as another dtype": with_new_grad(lambda grad: grad.view(torch.int32)),
    "a sparse gradient": with_new_grad(lambda grad: grad.to_sparse()),
    "a part of the gradient": lambda param: setattr(param.grad, "data", param.grad.data[:1]) if param.dim() else None,
    "no gradient": lambda param: setattr(param, "grad", None),
    "the gradient transposed in place": lambda param: param.grad.transpose_(0, -1) if param.dim() else None,
    "the gradient's memory let go": lambda param: param.grad.untyped_storage().resize_(0),
    "other weights": with_new_data(torch.clone),
    "weights in another order": with_new_data(reversed_order),
    "the weights' memory as another dtype": with_new_data(lambda data: data.view(torch.complex32)),
    "the weights' memory let go": lambda param: param.untyped_storage().resize_(0),
    "the weights transposed in place": lambda param: param.data.transpose_(0, -1) if param.dim() else None,
    "one dimension more": lambda param: param.data.unsqueeze_(0),
}


@pytest.mark.parametrize("look", LOOKS)
class TestLook:
    def test_have_grads(self, look):
        params = parameters(with_grads=False)
        looked = LOOKS[look](params, key())
        assert not looked.have_grads() and not looked.in_place()
        for param in params:
            assert not looked.have_grads()
            param.grad = torch.zeros_like(param)
        assert looked.have_grads()
        params[2].grad = None
        assert not looked.have_grads()

    @pytest.mark.parametrize("index", (0, 1, 3))
    def test_what_moves_is_noticed(self, look, index):
        params = parameters()
        looked = LOOKS[look](params, key())
        param, grad, data = params[index], params[index].grad, params[index].data
        assert looked.in_place()
        grad.mul_(2), param.data.mul_(2)
        assert looked.in_place()
        for other in (grad.clone(), None):
            param.grad = other
            assert not looked.in_place()
            param.grad = grad
            assert looked.in_place()
        at = grad.detach()
        param.grad.data = grad.clone()
        assert not looked.in_place()
        param.grad.data = at
        assert looked.in_place()
        param.data = data.clone()
        assert not looked.in_place()
        param.data = data
        assert looked.in_place()
        with torch.no_grad():
            param.set_(data.clone())
        assert not looked.in_place()

    @pytest.mark.usefixtures("three_threads")
    def test_one_among_many_is_noticed(self, look):
        params = parameters(copies=300)
        looked = LOOKS[look](params, key())
        for param in (params[0], params[-1], *(params[i] for i in some_of(len(params), 20))):
            assert looked.have_grads() and looked.in_place()
            param.grad, grad = None, param.grad
            assert not looked.have_grads() and not looked.in_place()
            param.grad = grad
            if param.dim():
                data = param.data
                param.data = data.flatten().clone()[:, None]
                assert not looked.have_grads()
                param.data = data
        versions = [param._version for param in params]
        looked.written()
        assert [param._version for param in params] == [version + 1 for version in versions]

    def test_a_sparse_gradient_is_in_no_place(self, look):
        params = parameters()
        looked = LOOKS[look](params, key())
        params[0].grad = params[0].grad.to_sparse()
        assert not looked.in_place()

    def test_written_tells_autograd(self, look):
        params = parameters()
        looked = LOOKS[look](params, key())
        versions = [param._version for param in params]
        loss = (params[0] ** 2).sum()
        looked.written()
        assert [param._version for param in params] == [version + 1 for version in versions]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("edit", EDITS_OF_FORMS)
@pytest.mark.parametrize("shape", ((), (0,), (3, 3), (2, 1, 3), (3, 3, 3), (2, 3, 1, 2, 3), (3, 2, 1, 2, 3, 3)))
@pytest.mark.parametrize("order", ("contiguous", "first dimensions swapped"))
def test_what_a_look_remembers_is_found_out(edit, shape, order):
    """It knows the forms that it found in order. One that has found nothing yet says and does the same of each edit."""
    param = Parameter(torch.randn(shape))
    param.grad = torch.randn(shape)
    if order != "contiguous" and len(shape) > 1:
        param.data, param.grad.data = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (param.data, param.grad))
    first = Parameter(torch.ones(2))  # in whose object the words are looked up
    first.grad = torch.ones(2)
    keys = [32 * key(2) for _ in range(2)]
    looks = fresh, looked = [held.look_at([first, param], one) for one in keys]
    for _ in range(2):
        assert looked.have_grads() and looked.in_place()
    EDITS_OF_FORMS[edit](param)
    for ask in ("in_place", "have_grads", "in_place", "have_grads"):
        assert getattr(looked, ask)() == getattr(fresh, ask)()
    if not looked.have_grads():
        return
    data, results = param.data.clone(), []
    for look, offsets in zip(looks, keys, strict=True):
        with torch.no_grad():
            param.data.copy_(data)
        look.have_grads()
        try:
            BACKENDS["cpu"]().restore_sgd([], [], offsets, *[None] * 5, 0.5, None, 0.0, 0.0, 0.0, False, False, None)
        except RuntimeError as error:
            assert edit not in ("nothing", "another gradient", "a gradient in another order"), error
            results.append(str(error))
        else:
            assert identical(param.data, data - 0.5 * param.grad)
            results.append("updated")
    assert results[0] == results[1]


def test_cpp_holds_what_python_would_list(monkeypatch):
    assert type(held.look_at(parameters(), key())) is held.Held

    class Wrapped(torch.Tensor):
        pass

    with torch.inference_mode():
        frozen = torch.ones(3)
    for other in (Parameter(torch.ones(2).as_subclass(Wrapped)), frozen):
        assert type(held.look_at([*parameters(), other], key())) is held.Listed
    major, minor = held.NEWEST_TORCH
    for version, reason in (
        (f"{major}.{minor}.1+cpu", None),
        (f"{major}.{minor + 1}.0a0+cpu", f"{major}.{minor + 1}.0a0+cpu is newer than {major}.{minor}, the last one"),
        (f"{major + 1}.0.0", f"torch {major + 1}.0.0 is newer than {major}.{minor}, the last one"),
    ):
        monkeypatch.setattr(torch, "__version__", version)
        said = held.unavailable()
        assert said is None if reason is None else reason in said


def test_the_headers_of_this_torch_say_what_the_names_promise():
    """csrc/held.h, NOTE [symbols outside the stable ABI]. Where this passes, NEWEST_TORCH may be this torch."""
    include = Path(torch.__file__).parent / "include"
    tensor_impl = (include / "c10/core/TensorImpl.h").read_text()
    assert re.search(r"^  const at::Tensor& grad\(\) const;", tensor_impl, re.MULTILINE)
    # And csrc/words.h, NOTE [a form is words of an object].
    members = re.findall(
        r"^  (?:[\w:]+|std::optional<c10::Device>) (\w+_)(?: = \w+| : \d)?;", tensor_impl, re.MULTILINE
    )
    start, end = members.index("sizes_and_strides_"), members.index("key_set_")
    numbers = ["sizes_and_strides_", "storage_offset_", "numel_", "data_type_", "device_opt_"]
    assert members[start : start + len(numbers)] == numbers
    assert all(
        flag.startswith(("is_", "storage_access", "allow_", "reserved_", "has_", "custom_", "python_custom_"))
        or flag.endswith("policy_")
        for flag in members[start + len(numbers) : end]
    )
    variable = (include / "torch/csrc/autograd/variable.h").read_text()
    assert re.search(r"TORCH_API void bump_version\(const Variable&", variable)
    assert re.search(r"^using Variable = at::Tensor;", variable, re.MULTILINE)
    is_neg = (include / "ATen/ops/is_neg_native.h").read_text()
    assert re.search(r"^TORCH_API bool is_neg\(const at::Tensor & self\);", is_neg, re.MULTILINE)
    assert held.unavailable() is None


# ---- The ops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ("cpu", "cuda_emulated"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("base", ("sgd_momentum", "adamw", "rmsprop"))
def test_training_has_the_same_bits_as_from_lists(backend, dtype, base, monkeypatch):
    serving = BACKENDS[backend]()
    monkeypatch.setitem(backends.CANDIDATES, "cpu", lambda device: (serving, None))
    models = [network().to(dtype) for _ in range(2)]
    base, kwargs = BASES[base]
    optimizers = [FriendlySAM(model.parameters(), base, rho=0.2, **kwargs) for model in models]
    kinds = []
    for step, batch in enumerate(batches(6)):
        batch = [part.to(dtype) if part.is_floating_point() else part for part in batch]
        for model, optimizer, reason in zip(models, optimizers, (None, "a test wants lists"), strict=True):
            monkeypatch.setattr(held, "_REASON", reason)
            for half in (optimizer.first_step, optimizer.second_step):
                optimizer.zero_grad()
                backward(model, batch)
                if step == 2:  # parameters come and go
                    model[4].weight.grad = None
                if step == 3:  # a gradient in another order of the dimensions
                    grad = model[4].weight.grad
                    model[4].weight.grad = grad.t().contiguous().t()
                half()
            kinds.append({type(one._look) for one in optimizer._passes.layout.segments_of(0)})
    assert kinds[0] == {held.Held} and kinds[1] == {held.Listed}
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert identical(one, other)
        for name, value in optimizers[0].state[one].items():
            assert identical(torch.as_tensor(value), torch.as_tensor(optimizers[1].state[other][name]))


def test_gradients_are_those_of_the_moment():
    """Between two looks anything may replace them: clipping out of place, a scaler, set_to_none."""
    w = Parameter(torch.zeros(2))
    optimizer = FriendlySAM([w], lr=1.0, rho=1.0)
    for value in (1.0, -2.0, 3.0):
        w.grad = torch.full_like(w, value)
        before = w.detach().clone()
        optimizer.first_step()
        w.grad = torch.full_like(w, 10 * value)
        optimizer.second_step()
        assert identical(w.detach(), before - 10 * value)


def test_a_bad_gradient_is_named_and_nothing_changes():
    model = network()
    optimizer = FriendlySAM(model.named_parameters(), lr=0.1, momentum=0.9)
    for batch in batches(2):
        one_step(model, optimizer, batch, "two_steps")
    backward(model, next(batches(1)))
    before = [param.detach().clone() for param in model.parameters()]
    model[4].weight.grad = model[4].weight.grad.to_sparse()
    with pytest.raises((RuntimeError, TypeError), match=r"4\.weight.*sparse"):
        optimizer.first_step()
    assert all(map(identical, before, model.parameters()))


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("hold", ("listed", "held", "looked_at", "looked_at_in_order"))
@pytest.mark.parametrize("name", ("cpu", "cuda_emulated"))
def test_many_rows_are_each_checked_and_none_is_mixed_up(name, hold):
    """Threads share the look at them: the first misfit is named, and a row gets its own gradient in its own order."""
    shapes = [(3, 1 + i % 7) for i in range(1500)]
    params = [torch.randn(shape) for shape in shapes]
    grads = [torch.randn(shape) for shape in shapes]
    for i in some_of(1500, 0 if hold == "looked_at_in_order" else 300):
        grads[i] = grads[i].t().contiguous().t()
    for param, grad in zip(params, grads):
        param.grad = grad
    offsets = 32 * key(1500)
    look = held.look_at(params, offsets) if hold != "listed" else None
    lists = (params, grads) if hold == "listed" else ([], [])
    if hold.startswith("looked_at"):
        assert look.have_grads()

    def step(lists):
        BACKENDS[name]().restore_sgd(*lists, offsets, *[None] * 5, 0.5, None, 0.0, 0.0, 0.0, False, False, None)

    before = [param.clone() for param in params]
    step(lists)
    for param, old, grad in zip(params, before, grads):
        assert identical(param, old - 0.5 * grad)

    before = [param.clone() for param in params]
    wrong = sorted(some_of(1500, 3))
    for i in wrong:
        grads[i].resize_(1)
    if look is not None:
        look.written()
    with pytest.raises(RuntimeError, match=rf"grads\[{wrong[0]}\] has another shape"):
        step(lists)
    assert all(map(identical, params, before))
    del look


@pytest.mark.parametrize("name", ("cpu", "cuda_emulated"))
def test_a_look_serves_until_the_next_one_or_until_what_it_saw_is_written(name):
    """csrc/held.h, NOTE [a look serves a pass]."""
    params = [Parameter(torch.randn(shape)) for shape in ((3, 5), (), (0,), (7,))]
    offsets = 64 * key(4)
    look = held.look_at(params, offsets)

    def fed() -> torch.Tensor:
        ema = torch.zeros(256)
        BACKENDS[name]().update_ema([], [], offsets, ema, None, None, None, None, 0.0)
        return ema[:15].view(3, 5)

    def give() -> torch.Tensor:
        for param in params:
            param.grad = torch.randn(param.shape)
        return params[0].grad

    for ends in (look.written, partial(look.have_their_forms, False), look.in_place, look.have_grads):
        old = give().clone()
        assert look.have_grads() and identical(fed(), old)
        gone = weakref.ref(params[0].grad)
        new = give()
        assert gone() is not None and identical(fed(), old)
        ends()
        assert gone() is None and identical(fed(), new)
        assert look.have_grads()
        params[1].grad = None
        assert not look.have_grads()
        with pytest.raises(RuntimeError, match=r"grads\[1\] is missing"):
            fed()
    # What the op brings into order is no business of the look.
    give()
    params[0].grad = torch.randn(5, 3).t()
    assert look.have_grads() and identical(fed(), params[0].grad)


def test_an_update_that_was_interrupted_goes_on_with_the_gradients_of_now(monkeypatch):
    """Ctrl-C twice: the second one stops what finishes the update after the first. The gradients of then are gone."""
    params = [Parameter(torch.zeros(4)) for _ in range(6)]
    optimizer = FriendlySAM([{"params": params[:3]}, {"params": params[3:]}], lr=1.0, rho=0.0)

    def give(value: float) -> None:
        for param in params:
            param.grad = torch.full((4,), value)

    give(1.0)
    optimizer.first_step()
    serving = optimizer._passes.layout.segments_of(1)[0]
    real, calls = serving.backend, []

    class Interrupted:
        def __getattr__(self, op):
            if op == "restore_sgd" and len(calls) < 2:
                calls.append(op)
                raise KeyboardInterrupt
            return getattr(real, op)

    monkeypatch.setattr(serving, "backend", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        optimizer.second_step()
    assert [param[0].item() for param in params] == [-1, -1, -1, 0, 0, 0]
    give(2.0)
    gc.collect()
    optimizer.restore()
    assert [param[0].item() for param in params] == [-1, -1, -1, -2, -2, -2]


def test_ops_say_what_is_missing():
    offsets = key(3) + 7
    backup = torch.zeros(16)
    with pytest.raises(RuntimeError, match="one entry for each of the 0 parameters"):
        OPS.restore([], offsets, backup)
    with pytest.raises(RuntimeError, match="no parameters are held under these offsets"):
        OPS.in_place(offsets)
    params = [Parameter(torch.randn(2)) for _ in range(3)]
    look = held.look_at(params, offsets)
    with pytest.raises(RuntimeError, match="held under these offsets already"):
        held.look_at(params, offsets)
    with torch.no_grad():
        OPS.restore([], offsets, backup)
    assert all(identical(param.detach(), torch.zeros(2)) for param in params)
    with pytest.raises(RuntimeError, match=r"grads\[0\] is missing"):
        OPS.update_ema([], [], offsets, torch.zeros(16), None, None, None, None, 0.9)
    del look
    with pytest.raises(RuntimeError, match="no parameters are held"):
        OPS.written(offsets)


def test_what_is_held_is_let_go():
    params = parameters()
    looked = held.look_at(params, key())
    kept = [weakref.ref(param) for param in params]
    del params
    gc.collect()
    assert all(param() is not None for param in kept)
    del looked
    gc.collect()
    assert not any(param() is not None for param in kept)


def test_a_process_ends_while_parameters_are_held():
    program = """
import torch, fsam_ext
model = torch.nn.Linear(3, 2)
optimizer = fsam_ext.FriendlySAM(model.parameters(), lr=0.1)
for half in (optimizer.first_step, optimizer.second_step):
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    half()
torch.kept = optimizer  # outlives the interpreter's own cleaning up
print("trained")
"""
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "trained\n", "")


# ---- Flat gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", (0, 2))
def test_one_optimizer_does_not_clear_anothers_gradients(steps):
    model = network()
    flatten_parameters(model, grads=True)
    params = list(model.parameters())
    optimizers = [FriendlySAM(part, lr=0.1) for part in (params[:3], params[3:])]
    for batch in batches(steps):
        for half in ("first_step", "second_step"):
            model.zero_grad(set_to_none=False)
            backward(model, batch)
            for optimizer in optimizers:
                getattr(optimizer, half)()
    backward(model, next(batches(1)))
    others = [param.grad.clone() for param in params[3:]]
    assert any(grad.abs().sum() > 0 for grad in others)
    optimizers[0].zero_grad()
    assert all(param.grad.abs().sum() == 0 for param in params[:3])
    assert all(identical(param.grad, grad) for param, grad in zip(params[3:], others, strict=True))
