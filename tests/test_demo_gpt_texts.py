"""What language models read: packages unpacked and verified, byte pairs, and what is held out.

No test here touches the network, and none reads the folder where a user keeps texts.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("tqdm", reason="the demo's extras are not installed: pip install .[demo]")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("FSAM_DATA", str(tmp_path / "cache"))


# ---- texts ------------------------------------------------------------------------------------


def compressed(data: bytes, widest: int = 16, clear_at: int | None = None) -> bytes:
    """What compress(1) writes after its header; the table is cleared once it has ``clear_at`` entries."""
    table = {bytes([byte]): byte for byte in range(256)}
    size, width, bits, section = 257, 9, "", 0

    def pad() -> str:
        missing = -(len(bits) - section) % (8 * width)
        return bits + "0" * missing

    def put(code: int) -> str:
        return bits + format(code, f"0{width}b")[::-1]

    phrase = b""
    for byte in data:
        longer = phrase + bytes([byte])
        if longer in table:
            phrase = longer
            continue
        bits = put(table[phrase])
        if size < 1 << widest:
            table[longer] = size
            size += 1
        # A decoder knows an entry one code later, and it is the decoder's count that widens codes.
        if size - 1 >= 1 << width and width < widest:
            bits = pad()
            section, width = len(bits), width + 1
        if clear_at is not None and size >= clear_at:
            bits = put(256)
            bits = pad()
            section, width, size = len(bits), 9, 257
            table = {entry: code for entry, code in table.items() if code < 256}
            clear_at = None
        phrase = longer[-1:]
    bits = put(table[phrase]) if phrase else bits
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))


@pytest.mark.parametrize("clear_at", [None, 300, 1000])
@pytest.mark.parametrize("letters", [1, 4, 256])
def test_what_compress_packed_is_unpacked(letters, clear_at):
    import gpt_texts

    data = bytes(random.Random(letters).choices(range(letters), k=6000))
    packed = compressed(data, clear_at=clear_at)
    assert gpt_texts.lzw(packed) == data
    if shutil.which("gzip"):  # judges the test's own packing
        judged = subprocess.run(["gzip", "-dc"], input=b"\x1f\x9d\x90" + packed, capture_output=True)
        assert judged.stdout == data, judged.stderr


def bible(windows: list[bytes]) -> bytes:
    packed = [compressed(window) for window in windows]
    begins = [92 + 4 * len(packed) + sum(map(len, packed[:i])) for i in range(len(packed))]
    numbers = b"".join(number.to_bytes(4, "big") for number in [len(packed), *begins])
    return b"EC02Compressed Data File".ljust(88, b"\0") + numbers + b"".join(packed)


def deb(files: dict[str, bytes], compression: str = "xz") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": packed.getvalue()}
    out = b"!<arch>\n"
    for name, content in members.items():
        out += b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (name.encode(), 0, 0, 0, b"100644", len(content))
        out += content + b"\n" * (len(content) % 2)
    return out


FILES = {"docs/b.rst.txt": b"second", "docs/a.rst.txt": b"first ", "docs/a.html": b"no", "docs.rst.txt": b"no"}


def package(urls: list[Path], text: bytes = b"first second", **changes):
    import gpt_texts

    sha256 = hashlib.sha256(text).hexdigest()
    known = gpt_texts.Package("docs", "a text", 1, tuple(u.as_uri() for u in urls), "docs", ".rst.txt", bytes, sha256)
    return known._replace(**changes)


def test_the_next_source_is_asked_and_its_text_is_kept(tmp_path):
    import gpt_texts

    missing, other, right = (tmp_path / name for name in ("missing.deb", "other.deb", "right.deb"))
    other.write_bytes(deb({**FILES, "docs/a.rst.txt": b"changed"}))
    right.write_bytes(deb(FILES))
    said: list[str] = []
    assert gpt_texts.load(package([missing, other, right]), say=said.append) == b"first second"
    assert len(said) == 3 and all("fetching a text" in line for line in said)
    assert gpt_texts.load(package([]), say=said.append) == b"first second" and len(said) == 3


def test_a_text_that_is_nowhere_has_a_reason_for_each_source(tmp_path):
    import gpt_texts

    files = {"page.html": b"<html>", "cut.deb": deb(FILES)[:-150], "other.deb": deb({"docs/a.rst.txt": b"changed"})}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(gpt_texts.Unavailable) as refused:
        gpt_texts.load(package([tmp_path / name for name in files]), say=lambda _: None)
    lines = str(refused.value).splitlines()
    assert "Debian's docs" in lines[0] and len(lines) == 4
    for line, name, reason in zip(
        lines[1:], files, ("not a Debian package", "not a whole archive", "sha256"), strict=True
    ):
        assert name in line and reason in line


def test_bible_data_is_read_window_by_window(tmp_path):
    import gpt_texts

    windows = [b"In the beginning God created " * 40, b"the heaven and the earth." * 9]
    path = tmp_path / "kjv.deb"
    path.write_bytes(deb({"usr/lib/bible.data": bible(windows)}, "gz"))
    known = package([path], b"".join(windows), root="usr/lib/bible.data", suffix="", decode=gpt_texts.uncompressed)
    assert gpt_texts.load(known, say=lambda _: None) == b"".join(windows)
    with pytest.raises(gpt_texts.Unavailable, match="EC02"):
        gpt_texts.uncompressed(gzip.compress(b"another format"))


# ---- tokens -----------------------------------------------------------------------------------


def plain_pairs(text: bytes, vocabulary: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Byte pairs without arrays: (merges, tokens)."""
    from gpt_tokens import WORD

    words = [list(word) for word in WORD.findall(text)]
    merges = []
    while 256 + len(merges) < vocabulary:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in words:
            for i in range(len(word)):
                if tuple(word[i : i + 2]) == pair:
                    word[i : i + 2] = [256 + len(merges)]
        merges.append(pair)
    return merges, [token for word in words for token in word]


def test_byte_pairs_are_those_of_the_plain_algorithm():
    import gpt_tokens

    text = (ROOT / "docs" / "bases.md").read_bytes()[:3000] + b"aaaaa aaaa  ----- \xff\x00\xff\x00" * 9
    words = gpt_tokens.Words.of(text)
    merges, tokens = plain_pairs(text, 300)
    assert gpt_tokens.learn(words, 300) == merges
    assert gpt_tokens.encode(words, merges).tolist() == tokens
    assert len(tokens) < len(text)


def test_tokens_of_another_text_spell_it():
    import gpt_tokens

    merges = gpt_tokens.learn(gpt_tokens.Words.of(b"the theme of the thesis " * 20), 262)
    spelling = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        spelling.append(spelling[left] + spelling[right])
    for text in (b"", b"x", b"the other\n\n  thing\t\x80", bytes(range(256))):
        tokens = gpt_tokens.encode(gpt_tokens.Words.of(text), merges)
        assert b"".join(spelling[token] for token in tokens) == text


def test_what_is_held_out_is_not_trained_on():
    import gpt_tokens

    context, count = 4, 20
    tokens = np.arange(8000, dtype=np.int16)  # each is its own place
    text = gpt_tokens.Text.of(tokens, context, count)
    assert text.held_out.shape == (count, context + 1)
    assert text.held_out.diff(dim=1).eq(1).all()
    held = set(text.held_out.flatten().tolist())
    assert len(held) == count * (context + 1) and held.isdisjoint(text.train.tolist())
    assert len(text.train) == 8000 - 12 * 40  # of 200 pieces of eight windows, 12 are held out
