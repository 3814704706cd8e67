"""Converts files: ``python -m fsam_ext.convert official.pt ours.pt``, or ``--to torch`` for plain SGD or AdamW.

``load_state_dict`` reads all these checkpoints as they are; a converted file is for other programs, and for good.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoints
from .checkpoints import CURRENT_FORMAT, check_form, in_our_names, in_words, is_optimizer_state, to_torch
from .keys import FORMAT

# Keys that lead to a part of nested dicts and lists.
Keys = tuple[Any, ...]


def origin(state_dict: dict[str, Any]) -> str:
    """Which implementation an optimizer's state_dict is of, as far as it tells."""
    kind = checkpoints.origin(state_dict)
    names = {name for entry in _entries(state_dict) for name in entry}
    if kind == "sam":
        return "the official F-SAM code" if "momentum" in names else "a SAM implementation"
    return {"fsam_ext": "fsam_ext", "torch": "a torch optimizer"}[kind]


def convert(state_dict: dict[str, Any], to: str) -> dict[str, Any]:
    """A state_dict of any of the origins, for ``to``: "fsam_ext" or "torch".

    Raises:
        ValueError: this is no state_dict of an optimizer, is damaged, or is one of a later release.
    """
    check_form(state_dict)
    _check_entries(state_dict)
    if to == "torch":
        return to_torch(state_dict)
    groups = [{**group, FORMAT: CURRENT_FORMAT} for group in checkpoints.groups_in_our_names(state_dict)]
    state = {key: entry for key, entry in in_our_names(state_dict).items() if entry != {}}
    return in_words({**state_dict, "state": state, "param_groups": groups})


def _check_entries(state_dict: dict[str, Any]) -> None:
    """Raises ValueError where the state of a parameter is none."""
    for key in (key for group in state_dict["param_groups"] for key in group["params"]):
        entry = state_dict["state"].get(key, {})
        if not isinstance(entry, dict) or not all(isinstance(name, str) for name in entry):
            kind = (
                "a dict with other keys than names" if isinstance(entry, dict) else f"{type(entry).__name__}, no dict"
            )
            raise ValueError(f"the state of parameter {key!r} is {kind}; take a file that is whole")


def optimizers_in(content: Any) -> Iterator[Keys]:
    """Where the state_dicts of optimizers are in nested dicts, lists and tuples, as keys."""
    seen: set[int] = set()
    waiting: list[tuple[Keys, Any]] = [((), content)]
    while waiting:
        path, thing = waiting.pop()
        if is_optimizer_state(thing):
            yield path
        elif id(thing) not in seen:  # a dict may hold itself
            seen.add(id(thing))
            items = thing.items() if isinstance(thing, dict) else enumerate(thing)
            inner = [((*path, key), value) for key, value in items if isinstance(value, (dict, list, tuple))]
            waiting += reversed([item for item in inner if isinstance(item[0][-1], (str, int))])


def _at(content: Any, path: Keys) -> Any:
    for key in path:
        content = content[key]
    return content


def _replace(content: Any, path: Keys, value: Any) -> Any:
    """``content`` with another value at a path: lists and dicts are edited, tuples made anew."""
    while path:
        *path, key = path
        holder = _at(content, path)
        if not isinstance(holder, tuple):
            holder[key] = value
            return content
        value = (*holder[:key], value, *holder[key + 1 :])
    return value


def _entries(state_dict: dict[str, Any]) -> list[dict[Any, Any]]:
    return [entry for entry in state_dict["state"].values() if isinstance(entry, dict)]


def _summary(state_dict: dict[str, Any]) -> str:
    counts: dict[Any, int] = {}
    for entry in _entries(state_dict):
        for name, value in entry.items():
            counts[name] = counts.get(name, 0) + isinstance(value, Tensor)
    return ", ".join(f"{count} x '{name}'" for name, count in counts.items()) or "no state"


def _read(path: Path, trust: bool) -> Any:
    """What torch.load makes of a file.

    Raises:
        ValueError: nothing; it says why.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of files that are none of its own
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # of damaged files torch's unpickler raises whatever it stumbles over
        raise ValueError(_why_unreadable(path, error)) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    if path.is_dir():
        return (
            "it is a directory; a distributed checkpoint becomes a file by "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    if isinstance(error, OSError):
        return error.strerror or str(error)
    with open(path, "rb") as file:
        head = file.read(9)
    if not head:
        return "it is empty"
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "it is a safetensors file, which holds tensors alone and no optimizer"
    if isinstance(error, ImportError):
        return f"its objects need a module that is not installed here ({error})"
    forbidden = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
    if forbidden is not None:
        return f"it holds {forbidden[1]}, which can run code when it is read; give --trust if you know who wrote it"
    names = _names_in_zip(path)
    if names is not None and ("data.pkl" not in names or "constants.pkl" in names):
        return f"it is {'a TorchScript program' if 'data.pkl' in names else 'a zip archive'}, no file of torch.save"
    gist = _gist(error)
    return "torch.save did not write it, or it is damaged" + (f" ({gist})" if " " in gist else "")


def _names_in_zip(path: Path) -> set[str] | None:
    """The names of a zip archive's files, without folders; None where it is none, or is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return None


def _gist(error: Exception) -> str:
    """What an error says, without the advice that torch puts around it."""
    text = str(error)
    if text.startswith("Weights only load failed"):
        text = text.partition("WeightsUnpickler error: ")[2]
    return (text.splitlines() or [""])[0][:200] or type(error).__name__


def _write(content: Any, path: Path) -> None:
    """Saves a file whole or not at all.

    Raises:
        ValueError: not at all; it says why.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        torch.save(content, unfinished)
        os.replace(unfinished, path)
    except Exception as error:  # what --trust has read may raise anything when it is pickled
        if os.path.isfile(unfinished):
            unfinished.unlink()
        raise ValueError((isinstance(error, OSError) and error.strerror) or _gist(error)) from error


def _chosen(found: list[Keys], at: str | None) -> Keys:
    """The place of the optimizer that is meant.

    Raises:
        ValueError: there is none, or more than one.
    """
    if not found:
        raise ValueError("holds no state_dict of an optimizer (a dict with 'state' and 'param_groups')")
    paths = [path for path in found if at in (None, _dotted(path))]
    if len(paths) != 1:
        where = ", ".join(repr(_dotted(path)) for path in found)
        raise ValueError(f"holds state_dicts of optimizers at {where}; say which one with --at")
    return paths[0]


def _dotted(path: Keys) -> str:
    return ".".join(map(str, path))


def _parsed(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m fsam_ext.convert", description="Converts the optimizer's part of a file that torch.save wrote."
    )
    parser.add_argument("source", type=Path, help="the file; it is not changed")
    parser.add_argument("target", type=Path, help="the file to write; must not exist")
    parser.add_argument("--to", choices=("fsam_ext", "torch"), default="fsam_ext", help="(default: fsam_ext)")
    parser.add_argument(
        "--at",
        help="where in the file the optimizer is, as keys with dots: optimizer_states.0 (default: the only one)",
    )
    parser.add_argument("--trust", action="store_true", help="unpickle any object in the file, which can run code")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Converts a file; returns the exit status."""
    parser, options = _parsed(argv)
    source, target = options.source, options.target
    if os.path.lexists(target):
        parser.error(f"{target} exists; give another name, or move it away")
    try:
        content = _read(source, options.trust)
    except ValueError as error:
        parser.error(f"{source} cannot be read, so nothing was written: {error}")
    try:
        path = _chosen(list(optimizers_in(content)), options.at)
    except ValueError as error:
        parser.error(f"{source} {error}")
    state_dict = _at(content, path)
    try:
        converted = convert(state_dict, options.to)
    except ValueError as error:
        parser.error(f"{source}: {' '.join(str(error).split())}")  # it may quote a tensor
    said = f"from {origin(state_dict)}: {_summary(state_dict)}\nto {options.to}: {_summary(converted)}"
    try:
        _write(_replace(content, path, converted), target)
    except ValueError as error:
        parser.error(f"{target} cannot be written, so nothing was: {error}")
    print(f"{said}\nwrote {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
