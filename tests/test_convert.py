"""python -m fsam_ext.convert: files of other implementations, files for plain torch, and what is no checkpoint."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from fsam_ext import SAM, FriendlySAM
from fsam_ext.convert import main

from . import previous_formats
from .conformance import identical
from .official import OfficialFriendlySAM
from .test_optimizer import batches, network, train, worst

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
DATA = list(batches(10))


def official_run(path, **options):
    """Five steps of the official code, and the file that its training script would leave."""
    model = network()
    optimizer = OfficialFriendlySAM(model.parameters(), SGD, rho=0.2, lr=0.05, **options)
    train(model, optimizer, DATA[:5])
    params = list(model.parameters())
    group = {k: v for k, v in optimizer.base.param_groups[0].items() if k != "params"}
    state = {
        i: {"first_grad": p.grad.clone(), "momentum": optimizer.momentum[p], "old_p": optimizer.saved[p]}
        for i, p in enumerate(params)
    }
    groups = [{"rho": 0.2, "adaptive": False, **group, "params": list(range(len(params)))}]
    content = {"epoch": 5, "state_dict": model.state_dict(), "optimizer": {"state": state, "param_groups": groups}}
    torch.save(content, path)
    return model, optimizer


def test_the_official_code_to_ours(tmp_path, capsys):
    source, target = tmp_path / "official.pt", tmp_path / "ours.pt"
    official, reference = official_run(source)
    assert main([str(source), str(target)]) == 0
    said = capsys.readouterr().out
    assert "from the official F-SAM code" in said and "'momentum'" in said and "to fsam_ext: " in said
    converted = torch.load(target, weights_only=True)
    assert converted["epoch"] == 5  # what else the file holds stays
    assert all(set(entry) == {"fsam_ema"} for entry in converted["optimizer"]["state"].values())
    mine = network()
    mine.load_state_dict(converted["state_dict"])
    optimizer = FriendlySAM(mine.parameters(), SGD, rho=0.7, sigma=1.0, lmbda=0.9, lr=1.0)
    optimizer.load_state_dict(converted["optimizer"])
    train(official, reference, DATA[5:])
    train(mine, optimizer, DATA[5:])
    assert worst(official, mine) < 1e-12


def test_davda54_to_ours(tmp_path, capsys):
    """Its optimizer has `old_p` (once `e_w`) for each parameter, and the base's state is not in the file."""
    model = network()
    params = list(model.parameters())
    state = {i: {"old_p": p.detach().clone(), "e_w": torch.ones_like(p)} for i, p in enumerate(params)}
    group = {"rho": 0.1, "adaptive": True, "lr": 0.02, "momentum": 0.5, "params": list(range(len(params)))}
    source, target = tmp_path / "sam.pt", tmp_path / "ours.pt"
    torch.save({"state": state, "param_groups": [group]}, source)
    assert main([str(source), str(target)]) == 0
    assert "from a SAM implementation" in capsys.readouterr().out
    optimizer = SAM(model.parameters(), SGD, lr=1.0, momentum=0.9)
    optimizer.load_state_dict(torch.load(target, weights_only=True))
    options = optimizer.param_groups[0]
    assert [options[name] for name in ("rho", "adaptive", "lr", "momentum")] == [0.1, True, 0.02, 0.5]
    assert not any(optimizer.state.values())
    train(model, optimizer, DATA[:2])


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_ours_to_plain_torch_and_back(base, tmp_path, capsys):
    model = network()
    optimizer = FriendlySAM(model.parameters(), base, lr=0.01, **({"momentum": 0.9} if base is SGD else {}))
    train(model, optimizer, DATA[:5])
    ours, plain, back = (tmp_path / name for name in ("ours.pt", "plain.pt", "back.pt"))
    torch.save({"run": {"optimizer": optimizer.state_dict()}, "model": model.state_dict()}, ours)
    assert main([str(ours), str(plain), "--to", "torch"]) == 0
    assert "from fsam_ext" in capsys.readouterr().out
    content = torch.load(plain, weights_only=True)
    twin = copy.deepcopy(model)
    alone = base(twin.parameters(), lr=1.0)
    fresh = alone.state_dict()["param_groups"][0]
    assert content["run"]["optimizer"]["param_groups"][0].keys() == fresh.keys()
    alone.load_state_dict(content["run"]["optimizer"])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert alone.state[q].keys() == optimizer.state[p].keys() - {"fsam_ema"}
        assert all(identical(alone.state[q][name], optimizer.state[p][name]) for name in alone.state[q])

    assert main([str(plain), str(back)]) == 0
    assert "from a torch optimizer" in capsys.readouterr().out
    other = FriendlySAM(twin.parameters(), base, lr=1.0)
    other.load_state_dict(torch.load(back, weights_only=True)["run"]["optimizer"])
    for q in twin.parameters():
        assert all(identical(other.state[q][name], alone.state[q][name]) for name in alone.state[q])


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_files_that_cannot_be_converted(tmp_path, capsys):
    whole, cut, text, target = (tmp_path / name for name in ("whole.pt", "cut.pt", "text.pt", "target.pt"))
    optimizer = SGD([nn.Parameter(torch.ones(500))], lr=0.1)
    torch.save({"a": optimizer.state_dict(), "b": optimizer.state_dict()}, whole)
    cut.write_bytes(whole.read_bytes()[:-200])
    text.write_text("no checkpoint")
    for source in (cut, text, tmp_path / "absent.pt"):
        assert f"{source} cannot be read, so nothing was written" in refusal(capsys, source, target)
    assert "at 'a', 'b'; say which one with --at" in refusal(capsys, whole, target)
    assert "say which one with --at" in refusal(capsys, whole, target, "--at", "c")
    torch.save({"model": {}}, text)
    assert "holds no state_dict of an optimizer" in refusal(capsys, text, target)
    newer = optimizer.state_dict()
    newer["param_groups"][0]["fsam_format"] = 99
    torch.save(newer, text)
    assert "the checkpoint has format 99" in refusal(capsys, text, target)
    assert not target.exists()
    assert main([str(whole), str(target), "--at", "b"]) == 0
    assert f"{target} exists" in refusal(capsys, whole, target, "--at", "b")


def packed(thing, **options):
    stream = io.BytesIO()
    torch.save(thing, stream, **options)
    return stream.getvalue()


def stepped(base=AdamW):
    param = nn.Parameter(torch.ones(5, 3))
    optimizer = base([param], lr=0.01)
    param.grad = torch.ones(5, 3)
    optimizer.step()
    return optimizer.state_dict()


def converted_at(old, new, path=()):
    """Where a converted file has an optimizer of ours; all else is as it was."""
    assert type(old) is type(new)
    if isinstance(new, dict) and "param_groups" in new and new["param_groups"][0].get("fsam_format") == 2:
        return [".".join(map(str, path))]
    if not isinstance(old, (dict, list, tuple)):
        assert repr(old) == repr(new)
        return []
    keys = list(old) if isinstance(old, dict) else range(len(old))
    assert len(old) == len(new)
    return [place for key in keys for place in converted_at(old[key], new[key], (*path, key))]


@pytest.mark.parametrize(
    "content, at, place",
    [
        ({"state_dict": {}, "optimizer_states": [stepped()]}, None, "optimizer_states.0"),  # as Lightning writes it
        ({"state_dict": {}, "optimizer_states": [stepped(SGD), stepped()]}, "optimizer_states.1", "optimizer_states.1"),
        ({0: {1: (3, stepped())}}, None, "0.1.1"),
        ({"run": ({}, [stepped(), 5])}, "run.1.0", "run.1.0"),
    ],
)
def test_optimizers_in_lists_and_under_numbers(content, at, place, tmp_path):
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    torch.save(content, source)
    assert main([str(source), str(target), *(["--at", at] if at else [])]) == 0
    assert converted_at(torch.load(source), torch.load(target)) == [place]


def test_several_optimizers_are_named_by_keys_with_dots(tmp_path, capsys):
    source = tmp_path / "lightning.ckpt"
    torch.save({"optimizer_states": [stepped(), stepped(SGD)]}, source)
    assert "at 'optimizer_states.0', 'optimizer_states.1'; say which" in refusal(capsys, source, tmp_path / "new.pt")


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("case", previous_formats.CASES)
def test_earlier_formats_become_this_one_and_plain_torch(number, case, tmp_path):
    cases = torch.load(Path(__file__).parent / "checkpoints" / f"format{number}.pt", weights_only=True)
    source, ours, plain = (tmp_path / name for name in ("source.pt", "ours.pt", "plain.pt"))
    torch.save({"optimizer": cases[case]["optimizer"]}, source)
    assert main([str(source), str(ours)]) == main([str(ours), str(plain), "--to", "torch"]) == 0
    params, optimizer = previous_formats.make(case)
    state_dict = torch.load(ours, weights_only=True)["optimizer"]
    names = {name for entry in state_dict["state"].values() for name in entry}
    assert "fsam_ema" in names and not names & {"ema", "ema_scale", "master"}
    assert {type(value) for group in state_dict["param_groups"] for value in group.values()}.isdisjoint({torch.dtype})
    with torch.no_grad():
        for param, weight in zip(params, cases[case]["weights"], strict=True):
            param.copy_(weight)
    optimizer.load_state_dict(state_dict)
    previous_formats.train(params, optimizer, previous_formats.BEFORE, previous_formats.AFTER)
    assert all(identical(param, later) for param, later in zip(params, cases[case]["later"], strict=True))

    base, _, options = previous_formats.CASES[case]
    alone = base(params, **{name: options[name] for name in ("lr", "momentum") if name in options})
    keys = alone.state_dict()["param_groups"][0].keys()
    alone.load_state_dict(torch.load(plain, weights_only=True)["optimizer"])
    assert alone.state_dict()["param_groups"][0].keys() == keys
    assert {name for entry in alone.state.values() for name in entry} == names - {
        "fsam_ema",
        "fsam_ema_scale",
        "fsam_master",
    }


def test_an_option_with_a_name_of_ours_stays_the_bases(tmp_path):
    """Adadelta has a rho."""
    param = nn.Parameter(torch.ones(3))
    source, ours, plain = (tmp_path / name for name in ("source.pt", "ours.pt", "plain.pt"))
    torch.save(torch.optim.Adadelta([param], rho=0.8).state_dict(), source)
    assert main([str(source), str(ours)]) == main([str(ours), str(plain), "--to", "torch"]) == 0
    for path in (source, ours):
        optimizer = FriendlySAM([param], torch.optim.Adadelta, rho=0.3)
        optimizer.load_state_dict(torch.load(path))
        assert optimizer.param_groups[0]["rho"] == 0.3
        assert optimizer.param_groups[0]["base_rho"] == 0.8
    assert torch.load(plain)["param_groups"][0]["rho"] == 0.8


class Own:
    """What only --trust unpickles."""


def looped():
    content = {"state": {}}
    content["self"] = content
    return content


FILES = {
    "empty": (b"", "it is empty"),
    "text": (b"no checkpoint", "torch.save did not write it, or it is damaged"),
    "json": (json.dumps({"state": {}, "param_groups": []}).encode(), "torch.save did not write it"),
    "pickle": (pickle.dumps({"state": {}, "param_groups": []}), "torch.save did not write it"),
    "object": (
        packed({"x": Own()}),
        "Own, which can run code when it is read; give --trust",
    ),
    "safetensors": ((2).to_bytes(8, "little") + b"{}" + bytes(4), "it is a safetensors file"),
    "tensors": (packed({"weight": torch.ones(3)}), "holds no state_dict of an optimizer"),
    "one tensor": (packed(torch.ones(3)), "holds no state_dict of an optimizer"),
    "tensors as keys": (packed({torch.ones(1): stepped()}), "holds no state_dict of an optimizer"),
    "itself": (packed(looped()), "holds no state_dict of an optimizer"),
    "deep": (packed(eval("[" * 90 + "]" * 90)), "holds no state_dict of an optimizer"),
    "entry": (packed({**stepped(), "state": {0: torch.ones(2)}}), "the state of parameter 0 is Tensor, no dict"),
    "names": (
        packed({**stepped(), "state": {0: {1: 2}}}),
        "the state of parameter 0 is a dict with other keys than names",
    ),
    "numbers": (packed({"state": {}, "param_groups": [{"params": [0, 0]}]}), "'params' has to hold distinct numbers"),
    "format": (packed({"state": {}, "param_groups": [{"params": [], "fsam_format": "x"}]}), "are whole numbers"),
    "legacy, cut": (packed(stepped(), _use_new_zipfile_serialization=False)[:-40], "or it is damaged"),
}


@pytest.mark.parametrize("kind", FILES)
def test_any_file_is_answered_with_a_sentence(kind, tmp_path, capsys):
    content, sentence = FILES[kind]
    source, target = tmp_path / "source", tmp_path / "target.pt"
    source.write_bytes(content)
    assert sentence in refusal(capsys, source, target)
    assert list(tmp_path.iterdir()) == [source]


def test_a_directory_a_zip_a_program(tmp_path, capsys):
    archive, program, target = tmp_path / "a.zip", tmp_path / "program.pt", tmp_path / "target.pt"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "a")
    torch.jit.script(nn.Linear(2, 2)).save(program)
    assert "it is a directory; a distributed checkpoint becomes a file by" in refusal(capsys, tmp_path, target)
    assert "it is a zip archive" in refusal(capsys, archive, target)
    assert "it is a TorchScript program" in refusal(capsys, program, target)
    assert not target.exists()


def test_trusted_objects_stay_as_they_are(tmp_path):
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    content = looped()
    torch.save({**content, "x": Own(), "optimizer": stepped()}, source)
    assert main([str(source), str(target), "--trust"]) == 0
    assert isinstance(torch.load(target, weights_only=False)["x"], Own)


def test_targets_that_cannot_be_written(tmp_path, capsys):
    source, file = tmp_path / "source.pt", tmp_path / "file"
    torch.save(stepped(), source)
    file.touch()
    before = sorted(tmp_path.iterdir())
    for target in (tmp_path / "absent" / "t.pt", file / "t.pt", Path("/proc/t.pt"), tmp_path / ("x" * 300)):
        assert f"{target} cannot be written, so nothing was: " in refusal(capsys, source, target)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "link exists; give another name" in refusal(capsys, source, tmp_path / "link")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "link"])


def damaged_structures(chance):
    """A state_dict in which one thing, anywhere, is something else."""
    junk = [None, 7, -1, 1e300, "x", b"x", [], {}, (), torch.ones(2), True, {"params": 3}, [[1]], {"state": {}}]
    junk += [torch.ones(2, 2, dtype=torch.complex64), torch.ones(3).to_sparse(), torch.empty(2, device="meta")]
    content = {"optimizer_states": [stepped(chance.choice([SGD, AdamW]))], "epoch": 3}
    if chance.random() < 0.5:
        param = nn.Parameter(torch.ones(5, 3))
        content["optimizer_states"][0] = FriendlySAM([param], AdamW, ema_dtype=torch.int8).state_dict()
    places = []

    def walk(thing):
        for key in list(thing) if isinstance(thing, dict) else range(len(thing)):
            places.append((thing, key))
            if isinstance(thing[key], (dict, list)):
                walk(thing[key])

    walk(content)
    for _ in range(chance.choice([1, 1, 2])):
        holder, key = chance.choice(places)
        holder[key] = chance.choice(junk)
        if isinstance(holder, dict) and chance.random() < 0.2:
            holder[chance.choice([None, 3, "momentum", "rho", (1, 2)])] = holder.pop(key)
    return packed(content)


def damaged_bytes(chance):
    data = bytearray(packed(stepped(), _use_new_zipfile_serialization=chance.random() < 0.5))
    for _ in range(chance.choice([1, 3, 30])):
        begin = chance.randrange(len(data))
        if chance.random() < 0.3:
            del data[begin : begin + chance.choice([1, 10, len(data)])]
        else:
            data[begin : begin + 1] = bytes([chance.randrange(256)])
        data = data or bytearray(b"x")
    return bytes(data)


@pytest.mark.parametrize("damage", [damaged_structures, damaged_bytes])
def test_hundreds_of_damaged_files(damage, tmp_path, capsys):
    """Converted into what loads, or one sentence and no file."""
    converted = 0
    for seed in range(400):
        chance = random.Random(seed)
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(damage(chance))
        arguments = [str(source), str(target), "--to", chance.choice(["torch", "fsam_ext"])]
        try:
            assert main(arguments) == 0
            converted += 1
            torch.load(target, weights_only=True)
            target.unlink()
        except SystemExit as stopped:
            assert stopped.code == 2
            last = capsys.readouterr().err.splitlines()[-1]
            assert str(source) in last or str(target) in last
        assert list(tmp_path.iterdir()) == [source]
    assert 0 < converted < 400
