"""Converts files: ``python -m fsam_ext.convert official.pt ours.pt``, or ``--to torch`` for plain SGD or AdamW.

``load_state_dict`` reads all these checkpoints as they are; a converted file is for other programs, and for good.
"""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoints
from .checkpoints import CURRENT_FORMAT, check_form, in_our_names, is_optimizer_state, to_torch
from .keys import FORMAT


def origin(state_dict: dict[str, Any]) -> str:
    """Which implementation an optimizer's state_dict is of, as far as it tells."""
    kind = checkpoints.origin(state_dict)
    names = {name for entry in state_dict["state"].values() for name in entry}
    if kind == "sam":
        return "the official F-SAM code" if "momentum" in names else "a SAM implementation"
    return {"fsam_ext": "fsam_ext", "torch": "a torch optimizer"}[kind]


def convert(state_dict: dict[str, Any], to: str) -> dict[str, Any]:
    """A state_dict of any of the origins, for ``to``: "fsam_ext" or "torch".

    Raises:
        ValueError: this is no state_dict of an optimizer, or one of a later release.
    """
    if to == "torch":
        return to_torch(state_dict)
    check_form(state_dict)
    groups = [{**group, FORMAT: CURRENT_FORMAT} for group in state_dict["param_groups"]]
    state = {key: entry for key, entry in in_our_names(state_dict).items() if entry}
    return {"state": state, "param_groups": groups}


def optimizers_in(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where the state_dicts of optimizers are in nested dicts."""
    if is_optimizer_state(content):
        yield path
    elif isinstance(content, dict):
        for key, value in content.items():
            if isinstance(key, str):
                yield from optimizers_in(value, (*path, key))


def _replaced(content: Any, path: tuple[str, ...], value: Any) -> Any:
    return {**content, path[0]: _replaced(content[path[0]], path[1:], value)} if path else value


def _summary(state_dict: dict[str, Any]) -> str:
    counts: dict[str, int] = {}
    for entry in state_dict["state"].values():
        for name, value in entry.items():
            counts[name] = counts.get(name, 0) + isinstance(value, Tensor)
    return ", ".join(f"{count} x '{name}'" for name, count in counts.items()) or "no state"


def main(argv: list[str] | None = None) -> int:
    """Converts a file; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fsam_ext.convert", description="Converts the optimizer's part of a file that torch.save wrote."
    )
    parser.add_argument("source", type=Path, help="the file; it is not changed")
    parser.add_argument("target", type=Path, help="the file to write; must not exist")
    parser.add_argument("--to", choices=("fsam_ext", "torch"), default="fsam_ext", help="(default: fsam_ext)")
    parser.add_argument("--at", help="where in the file the optimizer is, as keys with dots (default: the only one)")
    parser.add_argument("--trust", action="store_true", help="unpickle any object in the file, which can run code")
    options = parser.parse_args(argv)
    if options.target.exists():
        parser.error(f"{options.target} exists; give another name, or move it away")
    try:
        content = torch.load(options.source, map_location="cpu", weights_only=not options.trust)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        parser.error(f"{options.source} cannot be read, so nothing was written: {reason}")
    found = list(optimizers_in(content))
    paths = [path for path in found if options.at in (None, ".".join(path))]
    if not found:
        parser.error(f"{options.source} holds no state_dict of an optimizer (a dict with 'state' and 'param_groups')")
    if len(paths) != 1:
        where = ", ".join(repr(".".join(path)) for path in found)
        parser.error(f"{options.source} holds state_dicts of optimizers at {where}; say which one with --at")
    (path,) = paths
    state_dict = content
    for key in path:
        state_dict = state_dict[key]
    try:
        converted = convert(state_dict, options.to)
    except ValueError as error:
        parser.error(f"{options.source}: {error}")
    unfinished = options.target.with_name(f"{options.target.name}.unfinished")
    torch.save(_replaced(content, path, converted), unfinished)
    os.replace(unfinished, options.target)
    print(f"from {origin(state_dict)}: {_summary(state_dict)}")
    print(f"to {options.to}: {_summary(converted)}")
    print(f"wrote {options.target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
