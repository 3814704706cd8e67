"""CUDA's binary tools, and what is read from a library with them: cubins, their kernels and the code of those."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "fsam_ext/_C_cuda.abi3.so"
SOURCES = ROOT / "csrc/cuda"


def find_tool(name: str) -> str | None:
    """The path of one of CUDA's binary tools: from CUDA_HOME, PATH or the packages of PyPI."""
    places = [Path(home) / "bin" for home in [os.environ.get("CUDA_HOME")] if home]
    places += [Path(part) for part in os.environ.get("PATH", "").split(os.pathsep)]
    places += [Path("/usr/local/cuda/bin")]
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        places += sorted(Path(location).glob("*/bin"), reverse=True)
    return shutil.which(name, path=os.pathsep.join(map(str, places)))


def missing_tools() -> str | None:
    """What has to be installed before a library can be read, or None."""
    if all(find_tool(name) for name in ("cuobjdump", "nvdisasm")):
        return None
    return "cuobjdump and nvdisasm are needed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"


def run(*command: object, cwd: Path | None = None) -> str:
    """What a command prints."""
    return subprocess.run(list(map(str, command)), text=True, capture_output=True, check=True, cwd=cwd).stdout


def extract(library: Path, folder: Path, names: str = "") -> list[Path]:
    """Writes the library's cubins, of sources and architectures whose names hold `names`, into a folder."""
    run(find_tool("cuobjdump"), "-xelf", names or "all", library.resolve(), cwd=folder)
    return sorted(folder.glob("*.cubin"))


def architecture(cubin: Path) -> str:
    """90 for a cubin of sm_90."""
    return re.search(r"sm_(\d+)", cubin.name)[1]


def main_loop_lines(folder: Path = SOURCES) -> dict[str, set[int]]:
    """For each file the lines through which main loops over whole groups reach memory."""
    found = {}
    for path in sorted(folder.glob("*.*h")):
        lines = {number for number, text in enumerate(path.read_text().splitlines(), 1) if "Whole{}" in text}
        if lines:
            found[path.name] = lines
    assert sum(map(len, found.values())) in (2, 4), "csrc/cuda: expected one load and one finish of a main loop"
    return found


def one_by_one_lines(folder: Path = SOURCES) -> dict[str, set[int]]:
    """The lines through which masters adopt weights of others, which are rare: in a main loop, but no part of it."""
    text = (folder / "masters.cuh").read_text().splitlines()
    return {"masters.cuh": {number for number, line in enumerate(text, 1) if "[i]" in line}}


_SOURCE = re.compile(r'([\w.]+)", line (\d+)')


def is_main_loop(line: str, lines: dict[str, set[int]]) -> bool:
    """Whether a line of nvdisasm's -gi tells that what follows was inlined into a main loop."""
    return any(int(number) in lines.get(file, ()) for file, number in _SOURCE.findall(line))


def demangled(names: list[str]) -> dict[str, str]:
    """Each kernel's name with its template arguments, short: ``restore_kernel<float, false, Table<64>>``."""
    shown = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True).stdout
    short = re.compile(r"^(?:void )?fsam::cuda::|fsam::cuda::(?=Table)")
    return {
        name: short.sub("", text).rpartition("(")[0] if "(" in text else text
        for name, text in zip(names, (line.replace(" >", ">") for line in shown.splitlines()), strict=True)
    }


@dataclass(frozen=True)
class Entry:
    """A kernel of a cubin."""

    name: str  # mangled
    shown: str  # with its template arguments
    symbol: int
    parameter_base: int  # in the bank of constants
    parameter_bytes: int
    own_constants: bytes  # what the compiler put into bank 2


_PARAMETER_BANK = 0x0A  # EIATTR_PARAM_CBANK in .nv.info: the base in the lower half of its second word, then the size
_IN_WORDS = 4  # EIFMT_SVAL: what follows the header is as long as that says


def _parameter_space(info: bytes) -> tuple[int, int]:
    at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        if attribute == _PARAMETER_BANK:
            return struct.unpack_from("<HH", info, at + 8)
        at += 4 + (size if form == _IN_WORDS else 0)
    raise ValueError("a kernel without parameters")


def entries(cubin: Path) -> list[Entry]:
    """The kernels of a cubin, from the ELF file itself."""
    data = cubin.read_bytes()
    offset, size, count, names_at = struct.unpack_from("<Q10xHHH", data, 40)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, offset + size * i) for i in range(count)]

    def text(table: int, at: int) -> str:
        start = headers[table][4] + at
        return data[start : data.index(b"\0", start)].decode()

    sections = {text(names_at, header[0]): (data[header[4] : header[4] + header[5]], header) for header in headers}
    symbols, header = sections[".symtab"]
    found = []
    for index in range(len(symbols) // 24):
        name_at, info, _, section = struct.unpack_from("<IBBH", symbols, 24 * index)
        name = text(header[6], name_at)
        if info == 0x12 and f".text.{name}" in sections:  # a global function
            space = _parameter_space(sections[f".nv.info.{name}"][0])
            found.append((name, index, *space, sections.get(f".nv.constant2.{name}", (b"",))[0]))
    shown = demangled([name for name, *_ in found])
    return [Entry(name, shown[name], *rest) for name, *rest in found]


def disassemble(cubin: Path, wanted: list[Entry]) -> dict[str, list[str]]:
    """The lines of code of some kernels by name, for program.parse."""
    symbols = ",".join(str(entry.symbol) for entry in wanted)
    sections, current = {}, None
    for line in run(find_tool("nvdisasm"), "-c", "-gi", "-hex", "-fun", symbols, cubin).splitlines():
        if line.startswith(".text."):
            current = sections.setdefault(line.rstrip(":").removeprefix(".text."), [])
        elif line.lstrip().startswith(".section"):
            current = None
        elif current is not None:
            current.append(line)
    return sections
