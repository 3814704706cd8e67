"""nvdisasm's text, parsed: the instructions of one kernel, their operands and the scheduling that nvcc encoded.

The text has to come from ``nvdisasm -c -gi -hex``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field


class UnknownInstruction(Exception):
    """An instruction, or a form of one, that this interpreter does not know: it never guesses."""


@dataclass(frozen=True)
class Operand:
    """One operand. ``kind``: R, UR, P, UP, B (a register of that file), int, float, c, address, label or name."""

    kind: str
    index: int = 0  # of the register; the value of an int
    negative: bool = False
    absolute: bool = False
    inverted: bool = False
    suffix: str = ""
    text: str = ""
    base: tuple[Operand, ...] = ()  # the registers that are added up for an address
    offset: int = 0
    bank: int = 0  # of constants


@dataclass(frozen=True)
class Control:
    """What the upper bits of an instruction tell the scheduler: NOTE [cycles] in timeline.py."""

    stall: int
    sets: int  # the scoreboard that is released when the result is there, or 7
    read: int  # the one that is released when the operands have been read, or 7
    waits: int  # a mask of scoreboards


@dataclass(frozen=True)
class Instruction:
    """One instruction."""

    address: int
    text: str
    guard: Operand | None
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    control: Control
    in_main_loop: bool

    def refuse(self) -> UnknownInstruction:
        """The error for this instruction."""
        return UnknownInstruction(f"unknown instruction at 0x{self.address:x}: {self.text}")


_REGISTER = re.compile(r"(UR|UP|R|P|B)(Z|T|\d+)((?:\.\w+)*)$")
_LAST = {"R": 255, "UR": 255, "P": 7, "UP": 7}  # RZ, PT and the like
ZERO = _LAST["R"]
TRUE = _LAST["P"]


def _register(text: str) -> Operand | None:
    found = _REGISTER.match(text)
    if found is None:
        return None
    kind, number, suffixes = found.groups()
    if (number == "Z") > (kind in ("R", "UR")) or (number == "T") > (kind in ("P", "UP")):
        return None
    index = int(number) if number.isdigit() else _LAST[kind]
    return Operand(kind, index, suffix=suffixes.replace(".reuse", "").lstrip("."))


def _sum(text: str) -> tuple[tuple[Operand, ...], int]:
    """The registers and the offset of an address such as ``R2.64+0x200``."""
    base, offset = [], 0
    for part in text.replace("+-", "+ -").split("+"):
        part = part.strip()
        if re.fullmatch(r"-?0x[0-9a-f]+", part):
            offset += int(part, 16)
        elif register := _register(part):
            base.append(register)
        else:
            raise UnknownInstruction(f"unknown part of an address: {part} in {text}")
    return tuple(base), offset


def operand(text: str) -> Operand:
    """One operand from its text."""
    text = text.strip()
    if address := re.fullmatch(r"(?:desc\[UR\d+\])?\[([^\[\]]*)\]", text):
        base, offset = _sum(address[1])
        return Operand("address", text=text, base=base, offset=offset)
    if label := re.fullmatch(r"`\((.*)\)", text):
        return Operand("label", text=label[1])
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return Operand("int", int(text, 16) & 0xFFFFFFFF)
    if re.fullmatch(r"[+-]?(\d+(\.\d+)?(e[+-]?\d+)?|INF|QNAN)", text):
        return Operand("float", text=text.replace("INF", "inf").replace("QNAN", "nan"))
    signs = {"negative": False, "inverted": False, "absolute": False}
    plain = text
    if plain[:1] in ("-", "!", "~"):
        signs["inverted" if plain[0] == "~" else "negative"] = True
        plain = plain[1:]
    if absolute := re.fullmatch(r"\|(.*)\|((?:\.\w+)*)", plain):
        signs["absolute"] = True
        plain = absolute[1] + absolute[2]
    if constant := re.fullmatch(r"c\[0x(\d)\]\[(.*)\]", plain):
        base, offset = _sum(constant[2])
        return Operand("c", text=text, base=base, offset=offset, bank=int(constant[1]), **signs)
    if register := _register(plain):
        return Operand(register.kind, register.index, suffix=register.suffix, **signs)
    if not any(signs.values()):
        return Operand("name", text=text)
    raise UnknownInstruction(f"unknown operand: {text}")


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z]\S*)\s*(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND_HALF = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/$")


def _instruction(line: str, second_half: str, in_main_loop: bool) -> Instruction:
    address, guard, opcode, rest = _LINE.search(line).groups()[:4]
    base, *modifiers = opcode.split(".")
    # RET names its register and its function without a comma between them.
    parts = re.split(r",(?![^\[]*\])|\s(?=`)", rest) if rest else []
    upper = int(_SECOND_HALF.match(second_half)[1], 16)
    return Instruction(
        int(address, 16),
        " ".join(f"{'@' + guard if guard else ''} {opcode} {rest}".split()),
        operand(guard) if guard else None,
        base,
        tuple(modifiers),
        tuple(operand(part) for part in parts if part.strip()),
        Control(upper >> 41 & 15, upper >> 46 & 7, upper >> 49 & 7, upper >> 52 & 63),
        in_main_loop,
    )


@dataclass
class Program:
    """The instructions of one kernel, one for each 16 bytes of code. What is never executed is never parsed."""

    name: str
    arch: str
    lines: list[tuple[str, str, bool]] = field(default_factory=list)  # both halves; whether of the main loop
    labels: dict[str, int] = field(default_factory=dict)  # to an index into `lines`
    _parsed: dict[int, Instruction] = field(default_factory=dict)

    def instruction(self, index: int) -> Instruction:
        """The instruction at 16 * index."""
        if index not in self._parsed:
            found = self._parsed[index] = _instruction(*self.lines[index])
            assert found.address == 16 * index, found.text
        return self._parsed[index]

    def executed(self) -> list[Instruction]:
        """The instructions that some walk has come to."""
        return list(self._parsed.values())


def parse(name: str, arch: str, text: list[str], is_main_loop: Callable[[str], bool]) -> Program:
    """The program of a kernel from the lines of its section; is_main_loop(line) tells the main loop's source lines."""
    program = Program(name, arch)
    first_half, in_main_loop, fresh = None, False, True
    for line in text:
        if "//##" in line:
            # The chain of calls through which the instructions that follow were inlined, a line of text a call.
            if fresh:
                in_main_loop, fresh = False, False
            in_main_loop |= is_main_loop(line)
        elif first_half:
            program.lines.append((first_half, line, in_main_loop))
            first_half = None
        elif line.lstrip().startswith("/*"):
            first_half, fresh = line, True
        elif line.endswith(":"):
            program.labels[line.strip().rstrip(":")] = len(program.lines)
    return program
