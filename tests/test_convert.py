"""python -m fsam_ext.convert: files of other implementations, files for plain torch, and what is no checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fsam_ext import SAM, FriendlySAM
from fsam_ext.convert import main

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
