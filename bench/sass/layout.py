"""The parameters of a kernel as bytes, laid out as the structs of csrc/cuda say: their own text is the description.

The headers are read, so a changed struct changes the layout, and a field that is new needs a value. The size is
compared with the binary's, which notices what this reader of a few lines of C++ would get wrong.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# enum class X : int is one, too.
SCALARS = {
    "bool": "?", "int8_t": "b", "int16_t": "h", "int32_t": "i", "int64_t": "q", "int": "i", "uint32_t": "I",
    "uint64_t": "Q", "float": "f", "double": "d", "AverageStorage": "i", "Forward": "i",
}  # fmt: skip


class MissingValue(Exception):
    """What a kernel needs and this package has no value for, or the headers no longer have."""


@dataclass(frozen=True)
class Field:
    """A member of a struct: a type, a name and, for an array, its length as it is written."""

    type: str
    name: str
    count: str | None


@cache
def _headers() -> str:
    shared = (CSRC / name for name in ("average.h", "kept.h", "tensor_table.h"))
    paths = [*shared, *sorted((CSRC / "cuda").glob("*.*h"))]
    text = re.sub(r"//[^\n]*", "", "\n".join(path.read_text() for path in paths))
    return re.sub(r"\n[^;{}]*\boperator\b[^;{}]*\{[^{}]*\}", "", text)  # the one kind of method in plain structs


@cache
def fields_of(name: str) -> list[Field]:
    """The members of a plain struct of the CUDA backend."""
    body = re.search(rf"\bstruct {name} \{{\n(.*?)\n\}};", _headers(), re.S)[1]
    fields = []
    for line in body.split(";"):
        line = re.sub(r"\s*=[^,;]*", "", " ".join(line.split()))  # without initial values
        if not line or line.startswith("static "):
            continue
        kind, names = re.fullmatch(r"((?:const )?[\w:]+(?:<.*>)?\s?\**)\s?(.+)", line).groups()
        for declared in names.split(","):
            member, count = re.fullmatch(r"\s*(\w+)(?:\[([^\]]+)\])?\s*", declared).groups()
            fields.append(Field("pointer" if "*" in kind else kind.strip(), member, count))
    return fields


@cache
def constant(name: str) -> int:
    """A constant of the headers, which may be given as a macro."""
    found = re.search(rf"(?:\b{name} =|#define {name}) (\w+)", _headers())
    if found is None:
        raise MissingValue(f"the headers of csrc/cuda have no constant {name} (any more)")
    return int(found[1]) if found[1].isdigit() else constant(found[1])


def length(text: str, constants: dict[str, int]) -> int:
    """The length of an array: a sum of numbers, template parameters and constants."""
    parts = [part.strip() for part in text.split("+")]
    return sum(int(part) if part.isdigit() else constants.get(part) or constant(part) for part in parts)


class Parameters:
    """A kernel's parameters: bytes, one struct or number behind the other."""

    def __init__(self) -> None:
        self.data = bytearray()

    def _align(self, to: int) -> None:
        self.data.extend(bytes(-len(self.data) % to))

    def scalar(self, code: str, value: object) -> None:
        """A number, aligned to its size."""
        self._align(struct.calcsize("<" + code))
        self.data.extend(struct.pack("<" + code, value))

    def struct(self, name: str, values: dict, constants: dict[str, int] | None = None) -> None:
        """A struct; `values` has its fields by name, and those of the structs in it that have no value themselves."""
        self._align(alignment(name))
        for field in fields_of(name):
            inner = field.type.partition("<")[0]
            if field.name not in values and not (field.type != "pointer" and inner not in SCALARS):
                raise MissingValue(f"{name} has a field {field.name} without a value: bench/sass/calls.py")
            value = values.get(field.name, values)
            items = value if field.count else [value]
            if field.count and len(items) != length(field.count, constants or {}):
                raise MissingValue(f"{name}.{field.name} takes {length(field.count, constants or {})} values")
            for item in items:
                if field.type == "pointer":
                    self.scalar("Q", item)
                elif field.type in SCALARS:
                    self.scalar(SCALARS[field.type], item)
                else:
                    self.struct(inner, item)
        self._align(alignment(name))


def alignment(name: str) -> int:
    """Of a struct: that of its widest field."""
    return max(
        8 if field.type == "pointer"
        else struct.calcsize("<" + SCALARS[field.type]) if field.type in SCALARS
        else alignment(field.type.partition("<")[0])
        for field in fields_of(name)
    )  # fmt: skip
