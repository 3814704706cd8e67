"""The figures of finished arms, in one file that a later run goes on from and reads its tables out of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from gpt_measure import Point
from gpt_training import OtherRecipe, Recipe


@dataclasses.dataclass
class Row:
    """One arm of one seed. Losses are nats a token."""

    arm: str
    seed: int
    passes: int  # forward-backward passes, the trunk's included
    loss: float  # on what is held out of text 1
    loss4: float  # the same, with matrices of 4 bits
    loss3: float
    finetune: list[list[Point]]  # a curve for each of FINETUNE_LRS

    def __post_init__(self) -> None:
        self.finetune = [[Point(*point) for point in curve] for curve in self.finetune]


class Results:
    """``results.json`` of a folder, written anew with each row."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        """Reads what is there already. Raises ``OtherRecipe``."""
        self.path, self.recipe = folder / "results.json", recipe
        self.rows: list[Row] = []
        try:
            content: dict[str, Any] = json.loads(self.path.read_text())
            written: dict[str, Any] = content["recipe"]
            self.rows = [Row(**row) for row in content["rows"]]
        except FileNotFoundError:
            folder.mkdir(parents=True, exist_ok=True)
            self._write()
            return
        except (ValueError, TypeError, KeyError) as error:
            raise OtherRecipe(f"{self.path} is not what this demo writes ({error}): name another --out") from None
        recipe.check_same(written, self.path)

    def has(self, arm: str, seed: int) -> bool:
        return any(row.arm == arm and row.seed == seed for row in self.rows)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        content = {"recipe": dataclasses.asdict(self.recipe), "rows": [dataclasses.asdict(row) for row in self.rows]}
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.path)
