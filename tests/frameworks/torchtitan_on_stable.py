"""torchtitan's own optimizer container and training step, with a released torch.

torchtitan 0.3 needs a nightly torch and packages of its own, so it cannot be imported whole. Of its files, those named
here are loaded; whatever else they import (parallelism, models, metrics) is a stand-in, and nothing of that is tested.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from unittest.mock import MagicMock

import pytest

FILES = ("components.optimizer", "components.checkpointer.utils", "config.configurable", "observability", "trainer")
OTHERS = ("spmd_types", "tyro")

found = PathFinder.find_spec("torchtitan")
if found is None or not found.submodule_search_locations:
    pytest.skip("torchtitan is not installed", allow_module_level=True)
WHERE = Path(found.submodule_search_locations[0])


class _StandIns:
    """Finds a stand-in for every module of torchtitan but FILES, and for OTHERS."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        root, _, rest = name.partition(".")
        if root not in ("torchtitan", *OTHERS) or any(f"{rest}.".startswith(f"{file}.") for file in FILES):
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> MagicMock:
        parts = spec.name.split(".")[1:]
        return MagicMock(__spec__=spec, __path__=[str(WHERE.joinpath(*parts))], __all__=[])

    def exec_module(self, module: MagicMock) -> None:
        pass


@contextmanager
def _stand_ins() -> Iterator[None]:
    finder = _StandIns()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in OTHERS:
            sys.modules.pop(name, None)


with _stand_ins():
    import torchtitan.config
    import torchtitan.config.configurable

    torchtitan.config.Configurable = torchtitan.config.configurable.Configurable
    import torchtitan.components.optimizer
    import torchtitan.trainer
