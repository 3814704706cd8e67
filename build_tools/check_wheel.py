"""Installs the wheel of dist/ with plain pip into clean environments and trains ten steps: ``make wheel-check``.

An environment for each Python and torch, under build/wheel-check. The table at the end goes into docs/building.md.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

from .commands import ROOT, checked, find_python, fresh_environment, run, ten_steps

PYTHONS = ("3.10", "3.12", "3.13")
TORCHS = ("2.10.0", "2.15.0")
# What the registry has for a Python that the newest torch has left behind.
NEWEST_FOR = {("3.10", "2.15.0"): "2.14.1"}


def check(wheel: Path, version: str, torch: str, folder: Path) -> str:
    """What a user of this Python and torch gets; ends the program where that fails."""
    python = find_python(version)
    if python is None:
        sys.exit(f"fsam_ext: Python {version} was found neither on PATH nor in ~/.pyenv/versions.")
    interpreter = fresh_environment(folder, python, f"torch=={torch}", "numpy")
    said = checked(interpreter, "-m", "pip", "install", wheel)
    installed = re.search(r"Successfully installed (.*)", said)
    if installed is None or installed[1].replace("_", "-").split() != [f"fsam-ext-{wheel.name.split('-')[1]}"]:
        sys.exit(f"{said}\nfsam_ext: the wheel alone was to be installed into {folder}.")
    info = checked(interpreter, "-m", "fsam_ext.info", "--device", "cpu")
    if "cpu is served by 'cpu'" not in info or "not built" in info:
        sys.exit(f"{info}\nfsam_ext: both libraries were to load in {folder}.")
    said = checked(interpreter, "-c", ten_steps("cpu"))
    if str(folder) not in said or "CUDA library: loads" not in said:
        sys.exit(f"{said}\nfsam_ext: the wheel of {folder} was to be used, with both libraries.")
    full = run(interpreter, "-c", "import sys; print('.'.join(map(str, sys.version_info[:3])))").stdout.strip()
    found = re.search(r"^torch (\S+) .*\n(ten steps .*)$", said, re.MULTILINE)
    return f"| {full} | {found[1]} | {found[2]} |"


def main() -> None:
    """Goes through the matrix and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pythons", nargs="+", default=PYTHONS)
    parser.add_argument("--torchs", nargs="+", default=TORCHS)
    parser.add_argument("--keep", action="store_true", help="leave the environments where they are")
    arguments = parser.parse_args()
    wheels = list((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"fsam_ext: dist/ holds {len(wheels)} wheels; make one with `make wheel`.")
    pairs = [
        (version, NEWEST_FOR.get((version, torch), torch))
        for version in arguments.pythons
        for torch in arguments.torchs
    ]
    rows = []
    for version, torch in pairs:
        folder = ROOT / f"build/wheel-check/python{version}-torch{torch}"
        print(f"Python {version}, torch {torch}", flush=True)
        rows.append(check(wheels[0], version, torch, folder))
        if not arguments.keep:
            shutil.rmtree(folder)
    print(f"\n{wheels[0].name}\n\n| Python | torch | what ran |\n|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
