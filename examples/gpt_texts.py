"""The two texts of the language models: Debian packages, unpacked by Python alone, or the user's own files.

No root, no apt, nothing installed. Whatever the road, Debian's text counts only if it has the known sha256.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import lzma
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data import CONNECT_SECONDS, Unavailable, cache_folder


class Package(NamedTuple):
    """A Debian package and the text that is read out of it."""

    name: str
    text: str  # what it is, for messages
    megabytes: int
    urls: tuple[str, ...]  # one version; snapshot.debian.org keeps it when mirrors have gone on to the next
    root: str  # a file, or a folder, in the package
    suffix: str  # of the files in a folder
    decode: Callable[[bytes], bytes]  # a file's text
    sha256: str  # of the text


def uncompressed(content: bytes) -> bytes:
    """The text of bible.data: windows, each compressed by itself as compress(1) does.

    A header of 88 bytes; big-endian 32-bit numbers: the count of windows, then where each begins.
    """
    count = int.from_bytes(content[88:92], "big")
    begins = [int.from_bytes(content[92 + 4 * i : 96 + 4 * i], "big") for i in range(count)]
    if not content.startswith(b"EC02Compressed") or begins != sorted(begins) or (count and begins[-1] > len(content)):
        raise Unavailable("bible.data is not of the format EC02")
    ends = [*begins[1:], len(content)]
    return b"".join(lzw(content[begin:end]) for begin, end in zip(begins, ends, strict=True))


def lzw(data: bytes) -> bytes:
    """What compress(1) packed into ``data``, without its three bytes of header.

    Codes are 9 to 16 bits, lowest first. They come in groups of eight, and where their width changes the rest of a
    group is padding.
    """
    clear, first, widest = 256, 9, 16
    table = [bytes([byte]) for byte in range(256)] + [b""]
    width, position, section = first, 0, 0
    previous = b""
    out = []

    def next_group() -> int:
        return section - (section - position) // (8 * width) * 8 * width

    while True:
        if len(table) >= 1 << width and width < widest:
            position = section = next_group()
            width += 1
        if position + width > 8 * len(data):
            return b"".join(out)
        byte = position >> 3
        code = int.from_bytes(data[byte : byte + 4], "little") >> (position & 7) & ((1 << width) - 1)
        position += width
        if code == clear:
            position = section = next_group()
            width, previous = first, b""
            del table[clear + 1 :]
            continue
        if code > len(table) or (code == len(table) and not previous):
            raise Unavailable(f"not what compress(1) writes: code {code} where {len(table)} are known")
        entry = table[code] if code < len(table) else previous + previous[:1]
        if previous and len(table) < 1 << widest:
            table.append(previous + entry[:1])
        out.append(entry)
        previous = entry


PYTHON_DOCS = Package(
    "python3.11-doc",
    "the sources of Python's documentation",
    13,
    (
        "http://deb.debian.org/debian/pool/main/p/python3.11/python3.11-doc_3.11.2-6+deb12u8_all.deb",
        "https://snapshot.debian.org/file/d4a9ab01ca393dc30872e1ea65f14be24cfcfe73",
    ),
    "usr/share/doc/python3.11/html/_sources",
    ".rst.txt",
    bytes,
    "deb6b62f263c58c756f3d3948e89713228497fbdecc2f1f49335ccb03a21530b",
)
KING_JAMES = Package(
    "bible-kjv-text",
    "the King James Bible",
    2,
    (
        "http://deb.debian.org/debian/pool/main/b/bible-kjv/bible-kjv-text_4.38_all.deb",
        "https://snapshot.debian.org/file/1666fa8517505735afa6b63c149d7879c42fb1a2",
    ),
    "usr/lib/bible.data",
    "",
    uncompressed,
    "e53aaf0af1e58f259e35d0d9f7ca1bbe154fd77bb95471279b37b34d3c397a98",
)


def load(package: Package, own: Path | None = None, say: Callable[[str], None] = print) -> bytes:
    """The user's ``own`` file, or the text of ``package`` from the first source that has it.

    Raises ``Unavailable``, with a line for each source that was tried.
    """
    if own is not None:
        try:
            return own.read_bytes()
        except OSError as error:
            raise Unavailable(f"the text {own} cannot be read: {error.strerror}") from None
    kept = cache_folder() / f"{package.name}.txt"
    reasons = []
    for source, read in _sources(package, kept, say):
        try:
            text = read()
        except FileNotFoundError:
            continue
        except (Unavailable, OSError) as reason:
            reasons.append(f"{source}: {reason}")
            continue
        found = hashlib.sha256(text).hexdigest()
        if found == package.sha256:
            if source != str(kept):
                _keep(text, kept, say)
            return text
        reasons.append(f"{source}: refused, the text's sha256 is {found}, expected {package.sha256}")
    tried = "\n  ".join(reasons)
    raise Unavailable(f"{package.text} (Debian's {package.name}) cannot be had here:\n  {tried}")


def _sources(package: Package, kept: Path, say: Callable[[str], None]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Where to look, nearest first: (name, what reads the text). Lazy: the next one only after the one before."""
    yield str(kept), kept.read_bytes
    yield f"Debian's {package.name} (installed)", lambda: _text(package, _installed(package))
    for url in package.urls:
        say(f"fetching {package.text}: {url} ({package.megabytes} MB, once)")
        yield url, lambda url=url: _text(package, unpack(_download(url)))


def _text(package: Package, files: dict[str, bytes]) -> bytes:
    """The files of the package that are its text, in the order of their names."""
    names = [n for n in files if n == package.root or n.startswith(package.root + "/") and n.endswith(package.suffix)]
    return b"".join(package.decode(files[name]) for name in sorted(names))


def _installed(package: Package) -> dict[str, bytes]:
    root = Path("/") / package.root
    if not root.exists():
        raise FileNotFoundError(root)
    paths = root.rglob(f"*{package.suffix}") if root.is_dir() else [root]
    return {str(path.relative_to("/")): path.read_bytes() for path in paths}


def unpack(deb: bytes) -> dict[str, bytes]:
    """The regular files of a Debian package: an ar archive with data.tar.xz in it."""
    if not deb.startswith(b"!<arch>\n"):
        raise Unavailable("not a Debian package")
    position = 8
    while position + 60 <= len(deb):
        name, size = deb[position : position + 16].strip(b" /"), deb[position + 48 : position + 58]
        position += 60
        content = deb[position : position + int(size)]
        if name.startswith(b"data.tar"):
            try:
                with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                    return {
                        member.name.removeprefix("./"): archive.extractfile(member).read()
                        for member in archive
                        if member.isreg()
                    }
            except (tarfile.TarError, EOFError, lzma.LZMAError):
                raise Unavailable("its data.tar is not a whole archive that this Python can read") from None
        position += len(content) + len(content) % 2
    raise Unavailable("a Debian package without data.tar")


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        raise Unavailable(str(getattr(error, "reason", error))) from None


def _keep(text: bytes, path: Path, say: Callable[[str], None]) -> None:
    """Writes the text into the cache, whole or not at all; failing costs only the cache."""
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(text)
        part.replace(path)
    except OSError as error:
        say(f"could not keep a copy in {path.parent}: {error}")
