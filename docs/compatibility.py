"""Writes the tables of compatibility.md from compatibility.csv: ``python docs/compatibility.py``."""

from __future__ import annotations

import csv
from pathlib import Path

PAGE = Path(__file__).with_suffix(".md")
DATA = Path(__file__).with_suffix(".csv")
HEADER = "| | version | with | what was run | when |\n|---|---|---|---|---:|"


def rows() -> list[dict[str, str]]:
    """What was run: a row for each version of each thing."""
    with open(DATA, newline="") as file:
        return list(csv.DictReader(file))


def filled(page: str) -> str:
    """The page with each table between its markers made anew.

    Raises:
        ValueError: a table of the data has no markers.
    """
    tables: dict[str, list[str]] = {}
    for row in rows():
        cells = (row[name] for name in ("what", "version", "with", "run", "when"))
        tables.setdefault(row["table"], []).append(f"| {' | '.join(cells)} |")
    for name, lines in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, found, rest = page.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{PAGE.name} has no lines {begin} and {end}; add them where the table is to be")
        page = "\n".join([head + begin, HEADER, *lines, end + tail])
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
