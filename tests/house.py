"""The plan of the package as its imports draw it: floors, arrows, circles, and how large its parts are.

``python -m tests.house`` prints the figures; tests/test_house.py holds them to the limits.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "fsam_ext"

# From the ground up: an arrow runs from a floor to one below it, or stays on its own.
FLOORS = (
    ("_version", "_library", "_cuda_matrix"),
    ("backends",),
    ("state",),
    ("step",),
    ("options", "schedule", "batch_norm"),
    ("stateful",),
    ("optimizer", "sam"),
    ("second_pass",),
    ("__init__",),
    ("info", "convert", "checkpoint", "integrations"),
)


@dataclass
class Module:
    """One file: what it imports of the package, and how long its parts are."""

    name: str
    lines: int
    imports: set[str] = field(default_factory=set)
    classes: dict[str, int] = field(default_factory=dict)
    functions: dict[str, int] = field(default_factory=dict)


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def _imported(node: ast.ImportFrom, module: str, known: dict[str, str]) -> set[str]:
    """What a relative import names: modules, or else the one that the names are in."""
    base = module.split(".")[: -node.level] + (node.module.split(".") if node.module else [])
    names = [".".join([*base, alias.name]) for alias in node.names]
    return {known[name] if name in known else known[".".join(base)] for name in names}


def read() -> dict[str, Module]:
    """Every module of the package."""
    paths = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    known = {name.removesuffix(".__init__"): name for name in paths}
    modules = {}
    for name, path in paths.items():
        text = path.read_text()
        module = modules[name] = Module(name, text.count("\n"))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                module.imports |= _imported(node, name, known) - {name}
            elif isinstance(node, ast.ClassDef):
                module.classes[node.name] = node.end_lineno - node.lineno + 1
            elif isinstance(node, ast.FunctionDef):
                module.functions[node.name] = node.end_lineno - node.lineno + 1
    return modules


def floor(name: str) -> int:
    """The floor that a module is on."""
    room = name.partition(".")[0]
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def upward(modules: dict[str, Module]) -> list[str]:
    """The arrows that run up."""
    return [f"{m.name} -> {other}" for m in modules.values() for other in m.imports if floor(other) > floor(m.name)]


def circles(modules: dict[str, Module]) -> list[str]:
    """The circles among files, each as a path."""
    found: list[str] = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for other in sorted(modules[name].imports):
                walk(other, [*path, name])
            done.add(name)

    for name in modules:
        walk(name, [])
    return found


def is_kernel(name: str) -> bool:
    """Kernels are as long as they have to be."""
    return name.startswith("backends.triton")


def largest(modules: dict[str, Module]) -> dict[str, tuple[int, str]]:
    """The most lines that a file, a class and a function have, and which: kernels excepted."""
    ours = [module for module in modules.values() if not is_kernel(module.name)]
    return {
        "file": max((m.lines, m.name) for m in ours),
        "class": max((n, f"{m.name}.{c}") for m in ours for c, n in m.classes.items()),
        "function": max((n, f"{m.name}.{f}") for m in ours for f, n in m.functions.items()),
    }


def main() -> None:
    """Prints the figures."""
    modules = read()
    for kind, (lines, name) in largest(modules).items():
        print(f"largest {kind}: {lines} lines, {name}")
    print(f"circles: {len(circles(modules))}", *circles(modules))
    print(f"arrows that run up: {len(upward(modules))}", *upward(modules))


if __name__ == "__main__":
    main()
