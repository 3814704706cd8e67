"""From texts to tokens: byte-pair encoding learnt on text 1, and what of a text is held out."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from data import Unavailable, cache_folder
from torch import Tensor

Merges = list[tuple[int, int]]  # token 256 + i is the pair merges[i]

# Pairs are merged within words only; a word begins with the space before it.
WORD = re.compile(rb" ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\s]+|\s+(?!\S)|\s+")
HELD_OUT = 16  # one piece in so many
END = -1  # of a word, among tokens


class Words(NamedTuple):
    """A text as its different words, in tokens, and which of them comes where."""

    tokens: np.ndarray  # int64: all different words, each followed by END
    word: np.ndarray  # int64: the word, by number, at each place of the text

    @classmethod
    def of(cls, text: bytes) -> Words:
        numbers: dict[bytes, int] = {}
        word = np.array([numbers.setdefault(found, len(numbers)) for found in WORD.findall(text)], np.int64)
        lengths = np.array([len(found) for found in numbers], np.int64)
        tokens = np.full(lengths.sum() + len(lengths), END, np.int64)
        is_byte = np.ones(len(tokens), bool)
        is_byte[np.cumsum(lengths + 1) - 1] = False
        tokens[is_byte] = np.frombuffer(b"".join(numbers), np.uint8)
        return cls(tokens, word)

    def merged(self, pair: tuple[int, int], token: int) -> Words:
        """With ``token`` in the place of each ``pair``, from left to right."""
        hits = np.flatnonzero((self.tokens[:-1] == pair[0]) & (self.tokens[1:] == pair[1]))
        if pair[0] == pair[1]:  # hits overlap: of a run of them, every other one
            order = np.arange(len(hits))
            begins = np.maximum.accumulate(np.where(np.diff(hits, prepend=-2) > 1, order, 0))
            hits = hits[(order - begins) % 2 == 0]
        tokens = self.tokens.copy()
        tokens[hits] = token
        return Words(np.delete(tokens, hits + 1), self.word)

    def text(self) -> np.ndarray:
        """The text in tokens, int16."""
        ends = np.flatnonzero(self.tokens == END)
        begins = np.concatenate([[0], ends[:-1] + 1])
        lengths = (ends - begins)[self.word]
        shift = begins[self.word] - (np.cumsum(lengths) - lengths)
        return self.tokens[np.repeat(shift, lengths) + np.arange(lengths.sum())].astype(np.int16)


def learn(words: Words, vocabulary: int) -> Merges:
    """The merges that make ``vocabulary`` tokens of bytes: again and again the most frequent pair within words.

    Raises ``Unavailable`` where no pair is left before that.
    """
    count = np.bincount(words.word)
    merges: Merges = []
    while (known := 256 + len(merges)) < vocabulary:
        left, right = words.tokens[:-1], words.tokens[1:]
        word = np.cumsum(left == END) - (left == END)
        inside = (left != END) & (right != END)
        pairs = np.bincount((left * known + right)[inside], count[word[inside]], minlength=known**2)
        best = int(pairs.argmax())
        if pairs[best] < 2:
            raise Unavailable(f"it is too short for {vocabulary} tokens: pairs that recur give {known}")
        merges.append(divmod(best, known))
        words = words.merged(merges[-1], known)
    return merges


def encode(words: Words, merges: Merges) -> np.ndarray:
    """The text of ``words`` in tokens, int16."""
    for number, pair in enumerate(merges):
        words = words.merged(pair, 256 + number)
    return words.text()


def tokenized(
    texts: tuple[bytes, bytes], vocabulary: int, say: Callable[[str], None] = print
) -> tuple[np.ndarray, np.ndarray]:
    """Both texts in the tokens that text 1 gives; kept in the cache for the next run."""
    names = "".join(hashlib.sha256(text).hexdigest() for text in texts)
    key = hashlib.sha256(f"{names} {vocabulary} {WORD.pattern!r}".encode()).hexdigest()[:16]
    kept = cache_folder() / f"tokens-{key}.npz"
    try:
        with np.load(kept) as file:
            return file["text1"], file["text2"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    say(f"learning {vocabulary} byte pairs (seconds, once)")
    first = Words.of(texts[0])
    merges = learn(first, vocabulary)
    tokens = encode(first, merges), encode(Words.of(texts[1]), merges)
    _keep(kept, tokens, say)
    return tokens


def _keep(path: Path, tokens: tuple[np.ndarray, np.ndarray], say: Callable[[str], None]) -> None:
    part = path.with_name(f"{path.stem}.{os.getpid()}.part.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(part, text1=tokens[0], text2=tokens[1])
        part.replace(path)
    except OSError as error:
        say(f"could not keep a copy in {path.parent}: {error}")


class Text(NamedTuple):
    """A text in tokens: what is trained on, int64 [n], and windows that never are, int64 [count, context + 1]."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, tokens: np.ndarray, context: int, count: int) -> Text:
        """Every HELD_OUT-th piece of eight windows is held out; of its windows ``count``, evenly spaced.

        Raises ``Unavailable`` where there are fewer.
        """
        window = context + 1
        pieces = len(tokens) // (8 * window)
        cut = torch.from_numpy(tokens[: pieces * 8 * window].astype(np.int64)).view(pieces, 8 * window)
        held = torch.arange(pieces) % HELD_OUT == HELD_OUT - 1
        windows = cut[held].view(-1, window)
        if len(windows) < count:
            needed = -(-count // 8) * HELD_OUT * 8 * window
            raise Unavailable(
                f"it is too short: {len(tokens)} tokens, and to hold out {count} windows of {context} it takes {needed}"
            )
        chosen = torch.linspace(0, len(windows) - 1, count).round().long()
        return cls(cut[~held].flatten(), windows[chosen])
