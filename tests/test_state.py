"""State at rest: what tools do to ``optimizer.state`` between and within steps counts as it does in torch."""

from __future__ import annotations

import copy
import gc
import io
import os

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.nn.utils import parametrizations, parametrize
from torch.optim import SGD, AdamW, NAdam

from fsam_ext import SAM, FriendlySAM
from fsam_ext.state.entries import at_home, moved

from .conformance import identical

MOMENTUM = {"lr": 0.1, "momentum": 0.9}


def drawn(shape: tuple[int, ...], *, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(optimizer, number: int, between=lambda: None) -> None:
    """Both passes with gradients that depend on the number of the step."""
    for half, act in ((optimizer.first_step, between), (optimizer.second_step, lambda: None)):
        for i, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
            param.grad = drawn(param.shape, seed=100 * number + 10 * i + (act is between)).to(param.dtype)
        half()
        act()


def everything(optimizer) -> list[torch.Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [*params, *(value for p in params for _, value in sorted(optimizer.state[p].items()))]


def trained(edit=None, shapes=((2, 3), (3,)), base=AdamW, steps=6, **options):
    """The parameters and state after some steps, with an edit of ``state`` before the third."""
    params = [Parameter(drawn(shape, seed=i)) for i, shape in enumerate(shapes)]
    optimizer = FriendlySAM(params, base, rho=0.1, **({"lr": 0.1} | options))
    for number in range(steps):
        if number == 2 and edit is not None:
            edit(optimizer)
        step(optimizer, number)
    return [value.detach().clone() for value in everything(optimizer)]


def replace(optimizer, make):
    for entry in optimizer.state.values():
        entry.update({name: make(name, value) for name, value in entry.items()})


# ---- A tensor that is replaced ---------------------------------------------------------------------------------------

SAME_VALUES = {
    "clones": lambda name, value: value.clone(),
    "only step": lambda name, value: torch.tensor(float(value)) if name == "step" else value,
    "from numpy": lambda name, value: torch.from_numpy(value.numpy().copy()),
}


@pytest.mark.parametrize("how", SAME_VALUES)
@pytest.mark.parametrize("shapes", [((),), ((1,), ()), ((2, 3), (4,))], ids=str)
@pytest.mark.parametrize("base, options", [(SGD, MOMENTUM), (AdamW, {}), (NAdam, {})])
def test_state_replaced_by_equal_tensors_changes_nothing_and_is_written_on(base, options, shapes, how):
    """One of a single element compares equal to what it replaces, and was taken for it."""
    expected = trained(None, shapes, base, **options)
    found = trained(lambda optimizer: replace(optimizer, SAME_VALUES[how]), shapes, base, **options)
    assert all(map(identical, found, expected))


def test_a_tensor_that_somebody_kept_when_it_was_replaced_is_theirs():
    """It lies where the new one is copied to, and was overwritten."""
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
    optimizer = SAM(params, SGD, rho=0.0, **MOMENTUM)
    step(optimizer, 0)
    kept = optimizer.state[params[0]]["momentum_buffer"]
    before = kept.clone()
    optimizer.state[params[0]]["momentum_buffer"] = torch.full((3,), 5.0)
    step(optimizer, 1)
    assert identical(kept, before)
    optimizer.state[params[0]]["momentum_buffer"] = kept
    step(optimizer, 2)
    gradient = drawn((3,), seed=200)
    torch.testing.assert_close(optimizer.state[params[0]]["momentum_buffer"], 0.9 * before + gradient)


def test_an_int8_average_that_lies_with_gaps_in_memory_is_read_as_it_is():
    """A slice of a larger tensor, as tools that pack state make it."""

    def edit(optimizer):
        for entry in optimizer.state.values():
            wide = torch.full((*entry["fsam_ema"].shape, 3), 9, dtype=torch.int8)
            wide[..., 1] = entry["fsam_ema"]
            entry["fsam_ema"] = wide[..., 1]

    options = {"shapes": ((20, 30), (7,), ()), "ema_dtype": torch.int8}
    assert all(map(identical, trained(edit, **options), trained(**options)))


@pytest.mark.parametrize("keep", (False, True))
def test_a_tensor_that_was_given_other_memory_counts(keep):
    """``tensor.data = ...`` leaves it the same object; whoever keeps the old memory hides that it was left."""
    kept = []

    def edit(optimizer, new):
        for entry in optimizer.state.values():
            if keep:
                kept.append(entry["exp_avg"].data)
            if new:
                entry["exp_avg"].data = entry["exp_avg"].data * 2
            else:
                entry["exp_avg"].mul_(2)

    expected, found = (trained(lambda optimizer, new=new: edit(optimizer, new)) for new in (False, True))
    assert all(map(identical, found, expected))


@pytest.mark.parametrize("how", ("in place", "by data"))
def test_a_tensor_that_was_transposed_over_its_memory_counts(how):
    def edit(optimizer, how):
        (value,) = (entry["exp_avg"] for entry in optimizer.state.values())
        if how == "in place":
            value.t_()
        elif how == "by data":
            value.data = value.data.t()
        else:
            value.copy_(value.t().clone())

    expected = trained(lambda optimizer: edit(optimizer, "copied"), ((3, 3),))
    assert all(map(identical, trained(lambda optimizer: edit(optimizer, how), ((3, 3),)), expected))


LATER = {"kept": lambda value, new: value.copy_(new), "transposed": lambda value, _: value.copy_(value.t().clone())}


@pytest.mark.parametrize("how", ("let go", "kept", "transposed"))
@pytest.mark.parametrize("base, name", ((AdamW, "exp_avg"), (SGD, "momentum_buffer"), (NAdam, "fsam_ema")))
def test_other_memory_between_the_passes(base, name, how):
    """The second pass writes to where the tensor lay, unless that memory is gone: then it sees what replaces it."""

    def run(edited):
        param, kept = Parameter(drawn((3, 3), seed=1)), []
        options = MOMENTUM if base is SGD else {"lr": 0.05}
        optimizer = FriendlySAM([param], base, rho=0.05, **options)
        for number in range(6):
            later = []

            def between(later=later):
                value = optimizer.state[param][name]
                new = value * 0.5
                if how == "let go":
                    value.copy_(new) if not edited else setattr(value, "data", new)
                elif not edited:
                    later.append((value, new))
                elif how == "kept":
                    kept.append(value.data)
                    value.data = new
                else:
                    value.t_()

            step(optimizer, number, between if number in (2, 4) else lambda: None)
            for value, new in later:
                LATER[how](value, new)
        return everything(optimizer)

    assert all(map(identical, run(True), run(False)))


@pytest.mark.parametrize("moment", ("between", "pre hook", "in the block", "after the block"))
@pytest.mark.parametrize("base, options", [(SGD, MOMENTUM), (AdamW, {"lr": 0.05}), (NAdam, {"lr": 0.05})])
def test_state_edited_within_a_step_counts(base, options, moment):
    """torch's step() takes what is there when it is called."""
    ours, theirs = Parameter(torch.ones(2, 3)), Parameter(torch.ones(2, 3))
    optimizer, plain = SAM([ours], base, rho=0.0, **options), base([theirs], **options)

    def halve(one):
        for entry in one.state.values():
            entry.update({k: v * 0.5 for k, v in entry.items() if k in ("momentum_buffer", "exp_avg")})

    for one in (optimizer, plain) if moment == "pre hook" else ():
        one.register_step_pre_hook(lambda one, *_: halve(one))
    for number in range(6):
        theirs.grad = drawn((2, 3), seed=number)
        if moment != "pre hook":
            halve(plain)
        plain.step()
        ours.grad = drawn((2, 3), seed=number)
        if "block" in moment:
            with optimizer.perturbed(zero_grad=False):
                halve(optimizer) if moment == "in the block" else None
            halve(optimizer) if moment == "after the block" else None
        else:
            optimizer.first_step()
            halve(optimizer) if moment == "between" else None
        optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("base", (NAdam, torch.optim.Adadelta))
def test_options_edited_in_a_step_that_is_skipped_are_kept(base):
    """A base that is not fused did not run, and its groups of an earlier step overwrote the new lr."""
    param = Parameter(torch.ones(3))
    optimizer = FriendlySAM([param], base, lr=0.1, **({} if base is NAdam else {"base_rho": 0.5}))
    for lr in (0.25, 0.5):
        param.grad = torch.full((3,), torch.inf)
        optimizer.first_step()
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.ones(3)
        optimizer.second_step()
        assert optimizer.param_groups[0]["lr"] == lr and param.eq(1).all()
        step(optimizer, 0)
        assert optimizer.param_groups[0]["lr"] == lr
        with torch.no_grad():
            param.fill_(1.0)


# ---- Forward passes that keep copies of weights ----------------------------------------------------------------------


def losses(block, module) -> list[float]:
    x, y = drawn((32, 8), seed=1), drawn((32, 1), seed=2)
    optimizer = SAM(module.parameters(), rho=0.5, lr=0.05)
    found = []

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.mse_loss(module(x).float(), y)
        loss.backward()
        found.append(loss.item())
        return loss

    for _ in range(3):
        with block():
            optimizer.step(closure)
    return found


def linear(weight_norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(8, 1)
    return parametrizations.weight_norm(layer) if weight_norm else layer


def test_one_autocast_block_around_both_passes_sees_the_perturbed_weights():
    """It keeps the 16-bit copy of a weight until its outermost block ends."""
    found = losses(lambda: torch.autocast("cpu", torch.bfloat16), linear())
    assert found == losses(lambda: torch.autocast("cpu", torch.bfloat16, enabled=False), linear())
    assert len(found) == 6 and all(first != second for first, second in zip(found[::2], found[1::2]))


def test_one_block_of_cached_parametrizations_sees_the_perturbed_weights():
    found = losses(parametrize.cached, linear(weight_norm=True))
    assert found == losses(lambda: torch.autocast("cpu", torch.bfloat16, enabled=False), linear(weight_norm=True))
    assert all(first != second for first, second in zip(found[::2], found[1::2]))


# ---- Hooks -----------------------------------------------------------------------------------------------------------


def hooked(make) -> list[str]:
    """The order of hooks and what each sees, of one save and one load."""
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(3))]
    optimizer, calls = make(params), []
    for param in params:
        param.grad = torch.ones_like(param)
    if isinstance(optimizer, FriendlySAM):
        optimizer.first_step()
    optimizer.step()

    def moments(state):
        return [float(entry["exp_avg"].sum()) if "exp_avg" in entry else None for entry in state.values()]

    def before_saving(one):
        calls.append(f"save pre {moments(one.state)}")
        one.state[params[0]]["exp_avg"] = torch.full((2,), 3.0)

    def after_saving(one, saved):
        calls.append(f"save post {sorted(saved)} {moments(saved['state'])}")
        return {"whole": saved}

    def before_loading(one, saved):
        calls.append(f"load pre {sorted(saved)} {moments(one.state)}")
        saved = copy.deepcopy(saved["whole"])
        saved["state"][0], saved["state"][1] = saved["state"].get(1), saved["state"].get(0)
        saved["param_groups"][0]["params"].reverse()
        return saved

    def after_loading(one):
        calls.append(f"load post {moments({p: one.state[p] for p in params})}")
        one.state[params[1]]["exp_avg"].zero_()

    optimizer.register_state_dict_pre_hook(before_saving)
    optimizer.register_state_dict_post_hook(after_saving)
    optimizer.register_state_dict_post_hook(lambda one, saved: calls.append(f"save last {sorted(saved)}"))
    optimizer.register_load_state_dict_pre_hook(before_loading)
    optimizer.register_load_state_dict_pre_hook(
        lambda one, saved: calls.append(f"load first {sorted(saved)}"), prepend=True
    )
    optimizer.register_load_state_dict_post_hook(after_loading)
    saved = optimizer.state_dict()
    calls.append(f"saved {sorted(saved)}")
    optimizer.load_state_dict(saved)
    calls.append(f"loaded {moments({p: optimizer.state[p] for p in params})}")
    return [call.replace(", 'fsam_ema'", "") for call in calls]


def test_hooks_of_state_dict_and_load_state_dict_see_and_change_what_torchs_do():
    found = hooked(lambda params: FriendlySAM(params, AdamW, rho=0.0, lr=0.1))
    assert len(found) == 8
    assert found == hooked(lambda params: AdamW(params, lr=0.1))


def test_a_checkpoint_mapped_by_parameter_names_in_a_hook():
    """torch's recipe for a model whose parameters come in another order."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    optimizer = FriendlySAM(model.named_parameters(), AdamW, lr=0.1)
    step(optimizer, 0)

    def by_name(one, saved):
        (group,) = saved["param_groups"]
        state = {name: saved["state"][i] for name, i in zip(group["param_names"], group["params"])}
        names = one.param_groups[0]["param_names"]
        state = {i: state[name] for i, name in enumerate(names)}
        return {"state": state, "param_groups": [{**group, "param_names": names}]}

    other = FriendlySAM(list(model.named_parameters())[::-1], AdamW, lr=0.1)
    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(optimizer.state_dict())
    for param in model.parameters():
        for name, value in optimizer.state[param].items():
            assert identical(other.state[param][name], value)


# ---- State that is moved away ----------------------------------------------------------------------------------------


def storages(optimizer) -> dict[str, StorageWeakRef]:
    """The flat buffers' memory, by weak references."""
    (flat,) = optimizer._passes.layout.flats.values()
    return {name: StorageWeakRef(flat.buffer(name).untyped_storage()) for name in flat.names}


def moved_away(optimizer, how: str) -> None:
    for entry in optimizer.state.values():
        for name, value in list(entry.items()):
            if how == "replaced":
                entry[name] = value.clone()
            else:
                value.data = value.data.clone()


@pytest.mark.parametrize("how", ("replaced", "data", "move_state"))
def test_state_that_is_moved_away_frees_all_of_its_memory(how):
    """The backup's too; and the next step goes on to the bit."""
    expected = trained()

    def edit(optimizer):
        memory = storages(optimizer)
        assert memory.keys() == {"fsam_ema", "exp_avg", "exp_avg_sq", "step", "backup"}
        assert not any(storage.expired() for storage in memory.values())
        if how == "move_state":
            copies = {p: {k: v.clone() for k, v in entry.items()} for p, entry in optimizer.state.items()}
            optimizer.move_state("meta")
            assert all(value.is_meta for entry in optimizer.state.values() for value in entry.values())
            assert [name for name, storage in memory.items() if not storage.expired()] == []
            optimizer.state.update(copies)
            optimizer.move_state()
        else:
            moved_away(optimizer, how)
        gc.collect()
        assert [name for name, storage in memory.items() if not storage.expired()] == []

    assert all(map(identical, trained(edit), expected))


def test_one_buffer_that_is_moved_away_frees_its_own_memory_only():
    expected = trained()

    def edit(optimizer):
        memory = storages(optimizer)
        replace(optimizer, lambda name, value: value.clone() if name == "exp_avg" else value)
        gc.collect()
        assert [name for name, storage in memory.items() if storage.expired()] == ["exp_avg"]

    assert all(map(identical, trained(edit), expected))


@pytest.mark.parametrize("how", ("replaced", "data"))
@pytest.mark.parametrize("end", ("restore", "second_step"))
def test_state_that_is_moved_away_while_weights_are_perturbed(how, end):
    """What they are restored from lives as long as they are perturbed."""
    results = []
    for edit in (False, True):
        params = [Parameter(drawn((2, 3), seed=0)), Parameter(drawn((3,), seed=1))]
        optimizer = FriendlySAM(params, AdamW, rho=0.1, lr=0.1)
        step(optimizer, 0)
        before = [param.detach().clone() for param in params]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.first_step()
        memory = storages(optimizer)
        if edit:
            moved_away(optimizer, how)
            gc.collect()
            assert [name for name, storage in memory.items() if not storage.expired()] == ["backup"]
        if end == "restore":
            optimizer.restore()
            assert all(map(identical, params, before))
        else:
            optimizer.second_step()
        step(optimizer, 1)
        results.append([value.detach().clone() for value in everything(optimizer)])
    assert all(map(identical, *results))


def test_state_on_the_meta_device_is_refused_by_name():
    param = Parameter(torch.ones(3))
    optimizer = FriendlySAM([param], AdamW, lr=0.1)
    step(optimizer, 0)
    before = param.detach().clone()
    optimizer.move_state("meta")
    param.grad = torch.ones(3)
    with pytest.raises(
        RuntimeError, match="state 'fsam_ema' of parameter 0 .* is on the meta device and has no values"
    ):
        optimizer.first_step()
    assert identical(param, before)


# ---- In files --------------------------------------------------------------------------------------------------------


def test_one_parameters_state_saved_alone_writes_its_own_bytes(tmp_path):
    params = [Parameter(torch.ones(1000)) for _ in range(100)]
    optimizer = FriendlySAM(params, lr=0.1)
    step(optimizer, 0)
    torch.save(optimizer.state[params[0]], tmp_path / "ours")
    torch.save({"fsam_ema": torch.ones(1000)}, tmp_path / "one tensor")
    assert os.path.getsize(tmp_path / "ours") < os.path.getsize(tmp_path / "one tensor") + 500


def test_a_users_own_keys_in_a_group_survive_a_round_trip():
    own = {"cast": torch.bfloat16, "name": "torch.int8", "nested": {"a": [1, None]}, "scale": torch.ones(2)}
    optimizer = FriendlySAM([{"params": [Parameter(torch.ones(3))], **own}], lr=0.1, ema_dtype=torch.bfloat16)
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    saved = torch.load(stream)
    for one in (copy.deepcopy(optimizer.state_dict()), saved):
        optimizer.load_state_dict(one)
        (group,) = optimizer.param_groups
        assert {name: group[name] for name in ("cast", "name", "nested")} == {
            k: own[k] for k in ("cast", "name", "nested")
        }
        assert torch.equal(group["scale"], own["scale"]) and group["ema_dtype"] is torch.bfloat16


# ---- Parameters that come and change ---------------------------------------------------------------------------------


@pytest.mark.parametrize("base", (SGD, AdamW, NAdam))
def test_lazy_parameters_get_their_state_when_they_get_their_shape(base):
    def run(lazy):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyLinear(3) if lazy else nn.Linear(4, 3), nn.Linear(3, 1))
        optimizer = FriendlySAM(model.parameters(), base, rho=0.1, lr=0.1)
        x = drawn((2, 4), seed=3)
        model(x)  # the dry run, in which a lazy module draws its weights
        for i, param in enumerate(model.parameters()):
            param.data = drawn(param.shape, seed=i)
        for _ in range(3):
            optimizer.step(lambda: model(x).square().mean().backward())
        return [param.detach() for param in model.parameters()]

    assert all(map(identical, run(True), run(False)))


def grown_and_pruned(optimizer, rows: torch.Tensor, more: torch.Tensor) -> None:
    """The recipe of Gaussian splatting: points are dropped and cloned, and their state with them."""
    (group,) = optimizer.param_groups
    (old,) = group["params"]
    entry = optimizer.state.pop(old)
    for name, value in entry.items():
        if value.shape == old.shape:
            entry[name] = torch.cat([value[rows], torch.zeros(more.shape, dtype=value.dtype)])
    new = Parameter(torch.cat([old.detach()[rows], more]))
    optimizer.state[new] = entry
    group["params"] = [new]


@pytest.mark.parametrize("base, options", [(SGD, MOMENTUM), (AdamW, {"lr": 0.1}), (NAdam, {"lr": 0.1})])
def test_parameters_that_grow_and_are_pruned_keep_their_rows_state(base, options):
    points = drawn((6, 3), seed=0)
    optimizer, plain = (
        FriendlySAM([Parameter(points.clone())], base, rho=0.0, **options),
        base([Parameter(points)], **options),
    )
    average = None
    for number in range(8):
        if number in (2, 3, 6):
            count = optimizer.param_groups[0]["params"][0].shape[0]
            rows, more = torch.arange(count)[number % 2 :: 2], drawn((5, 3), seed=number)
            for one in (optimizer, plain):
                grown_and_pruned(one, rows, more)
            average = torch.cat([average[rows], torch.zeros(5, 3)])
        ours, theirs = (one.param_groups[0]["params"][0] for one in (optimizer, plain))
        first, second = drawn(ours.shape, seed=10 + number), drawn(ours.shape, seed=20 + number)
        average = first if average is None else 0.9 * average + (1 - 0.9) * first
        ours.grad = first
        optimizer.first_step()
        ours.grad, theirs.grad = second, second.clone()
        optimizer.second_step()
        plain.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizer.state[ours]["fsam_ema"], average, rtol=1e-5, atol=1e-6)


def test_an_int8_average_that_was_cut_without_its_scales_is_refused_in_one_sentence():
    param = Parameter(drawn((200, 3), seed=0))
    optimizer = FriendlySAM([param], rho=0.1, ema_dtype=torch.int8, **MOMENTUM)
    step(optimizer, 0)
    grown_and_pruned(optimizer, torch.arange(100), drawn((50, 3), seed=1))
    (new,) = optimizer.param_groups[0]["params"]
    before = new.detach().clone()
    new.grad = torch.ones_like(new)
    message = r"state 'fsam_ema_scale' of parameter 0 .* put the average there in float32.*or delete both"
    with pytest.raises(RuntimeError, match=message):
        optimizer.first_step()
    assert identical(new, before) and not optimizer.is_perturbed
    del optimizer.state[new]["fsam_ema"], optimizer.state[new]["fsam_ema_scale"]
    step(optimizer, 1)  # the average starts anew
    assert optimizer.state[new]["momentum_buffer"].shape == (150, 3)


def test_a_buffer_that_no_group_asks_for_any_more_does_not_take_the_backup_along():
    """momentum set to 0 leaves old momentum in state; then the buffers grow."""
    params = [nn.Parameter(torch.randn(3)) for _ in range(2)]
    optimizer = SAM(params, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)

    def step(*having):
        for half in (optimizer.first_step, optimizer.second_step):
            for param in params:
                param.grad = torch.ones(3) if any(param is one for one in having) else None
            half()

    step(params[0])
    optimizer.param_groups[0]["momentum"] = 0.0
    before = [param.detach().clone() for param in params]
    step(*params)
    assert all(torch.allclose(param, old - 0.1) for param, old in zip(params, before))
    assert optimizer.state[params[0]]["momentum_buffer"].eq(1).all()


def test_state_of_any_shape_comes_back_to_where_it_was():
    """NOTE [where state is at home]: a base's tables are not where their parameter is because of their shape."""
    with FakeTensorMode():
        param = torch.empty(3, device="cuda")
        moment, table, count = torch.empty(3, device="cuda"), torch.empty(256, device="cuda"), torch.empty(())
        away = [moved(value, param, "cpu") for value in (moment, table, count)]
        assert [value.device.type for value in away] == ["cpu"] * 3
        entry = at_home(dict(zip("mtc", away)), param)
        assert [value.device.type for value in entry.values()] == ["cuda", "cuda", "cpu"]
        assert all(one is other for one, other in zip(entry.values(), at_home(entry, param).values()))
