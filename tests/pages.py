"""What the tests read of the README and of docs/: blocks of code with what is said above them, headings, links.

A block of Python or a diff runs in the tests, unless the comment above it says otherwise:

    <!-- run by tests/test_x.py -->     that test takes it from the page
    <!-- not run: REASON -->

Names that a page's blocks take for granted are made by the code in a comment that begins with `given:`; it holds for
the blocks after it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "fsam_ext/backends/README.md", *DOCS.glob("*.md")])

_PARTS = re.compile(
    r"^<!-- given:\n(?P<given>.*?)^-->"
    r"|^(?:<!-- (?P<note>(?:not run:|run by)[^\n]*) -->\n+)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```"
    r"|^#+ (?P<heading>[^\n]*)",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: str  # from the root
    line: int
    heading: str
    language: str
    text: str
    note: str  # what the comment above it says
    given: str  # code that makes the names it takes for granted

    def before(self) -> str:
        """Of a diff: the program without what it adds."""
        return "".join(line[1:] or "\n" for line in self.text.splitlines(keepends=True) if line[0] in " -\n")

    def after(self) -> str:
        """Of a diff: the program without what it takes away."""
        return "".join(line[1:] or "\n" for line in self.text.splitlines(keepends=True) if line[0] in " +\n")

    def run(self, text: str | None = None) -> dict:
        """Runs the block, or another form of it; returns the names that are there then."""
        names: dict = {}
        exec(compile(self.given, f"{self.page}, given", "exec"), names)
        exec(compile("\n" * self.line + (self.text if text is None else text), self.page, "exec"), names)
        return names

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text, found, heading, given = page.read_text(), [], "", ""
    for part in _PARTS.finditer(text):
        if part["heading"] is not None:
            heading = part["heading"]
        elif part["given"] is not None:
            given = part["given"]
        else:
            line = text.count("\n", 0, part.start("text"))
            name = page.relative_to(ROOT).as_posix()
            found.append(Block(name, line, heading, part["language"], part["text"], part["note"] or "", given))
    return found


def prose(page: Path) -> str:
    """A page without its blocks of code and code in lines."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """What may follow a page's `#`, as GitHub names headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", found) for found in re.findall(r"^#+ +(.*)", text, re.MULTILINE))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Where a page's links and pictures lead."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))
