"""Data of the demo: find, fetch and verify Fashion-MNIST, or fall back on scikit-learn's digits.

Nothing is installed and no root is needed: Debian's package is unpacked through private apt
directories. Whatever the road, a file counts only if its decompressed bytes have the known sha256.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import subprocess
import tempfile
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SHA256 = {  # of the decompressed IDX files
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = "usr/share/datasets/fashion-mnist"
# The second is the address that the authors publish; it answers on http only, which the sha256
# makes as good as https.
URLS = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
)
CONNECT_SECONDS = 5  # an offline machine must reach the fallback in seconds
APT_SECONDS = 180  # for the whole of an apt run that does get through
# A name server that never answers is the slow way to be offline: glibc would wait 10 s for each name.
os.environ.setdefault("RES_OPTIONS", "timeout:3 attempts:1")
CLASSES = 10


class Unavailable(Exception):
    """No verified copy is to be had; the message says why, a line for each source tried."""


class Split(NamedTuple):
    """Images as float32 [n, pixels], standardised; labels as int64 [n]."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


class Dataset(NamedTuple):
    name: str
    train: Split
    test: Split


def cache_folder() -> Path:
    """``$FSAM_DATA``, or ``fsam_ext`` in the user's cache folder."""
    if folder := os.environ.get("FSAM_DATA"):
        return Path(folder).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "fsam_ext"


def load(name: str = "auto", say: Callable[[str], None] = print) -> Dataset:
    """The data set ``fashion-mnist``, ``digits``, or with ``auto`` the first of the two to be had.

    Raises ``Unavailable`` for ``fashion-mnist`` where no source gives a verified copy.
    """
    if name == "digits":
        return _digits()
    try:
        files = fashion_mnist_files(cache_folder(), say)
    except Unavailable as reason:
        if name != "auto":
            raise
        say(
            f"NOTE: Fashion-MNIST cannot be had here:\n  {reason}\n"
            "This run uses scikit-learn's digits (8x8 images) instead: "
            "its figures are NOT those of Fashion-MNIST."
        )
        return _digits()
    arrays = {file: read_idx(content) for file, content in files.items()}
    return _dataset(
        "fashion-mnist",
        (arrays["train-images-idx3-ubyte"] / np.float32(255), arrays["train-labels-idx1-ubyte"]),
        (arrays["t10k-images-idx3-ubyte"] / np.float32(255), arrays["t10k-labels-idx1-ubyte"]),
    )


def fashion_mnist_files(cache: Path, say: Callable[[str], None] = print) -> dict[str, bytes]:
    """The four verified IDX files, decompressed, from the first source that has them.

    They are kept in ``cache`` for the next run. Raises ``Unavailable``.
    """
    reasons = []
    for source, read in _sources(cache, say):
        try:
            files = {file: _verified(read(file), file, source) for file in SHA256}
        except Unavailable as reason:
            reasons.append(str(reason))
            continue
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                reasons.append(f"{source}: {error}")
            continue
        for reason in reasons:
            say(reason)
        say(f"Fashion-MNIST from {source}, sha256 verified")
        if source != str(cache):
            _keep(files, cache, say)
        return files
    raise Unavailable("\n  ".join(reasons) or "no source has it")


def _sources(cache: Path, say: Callable[[str], None]) -> Iterator[tuple[str, Callable[[str], bytes]]]:
    """Where to look, nearest first: (name, file -> decompressed bytes). Lazy: the next is asked for
    only when the one before has failed."""
    yield str(cache), lambda file: (cache / file).read_bytes()
    installed = Path("/") / DEBIAN_FOLDER
    yield f"Debian's {DEBIAN_PACKAGE} (installed)", lambda file: _gunzip(installed / f"{file}.gz")
    with tempfile.TemporaryDirectory(prefix="fsam_apt_") as folder:
        unpacked: list[Path] = []

        def from_package(file: str) -> bytes:
            if not unpacked:
                say(f"fetching Debian's {DEBIAN_PACKAGE} (about 40 MB, once) ...")
                unpacked.append(_unpack_debian_package(Path(folder)))
            return _gunzip(unpacked[0] / f"{file}.gz")

        yield f"Debian's {DEBIAN_PACKAGE} (downloaded)", from_package
    for url in URLS:
        yield url, lambda file, url=url: _download(f"{url}/{file}.gz")


def _verified(content: bytes, file: str, source: str) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[file]:
        raise Unavailable(f"{file} from {source} refused: its sha256 is {found}, expected {SHA256[file]}")
    return content


def _keep(files: dict[str, bytes], cache: Path, say: Callable[[str], None]) -> None:
    """Writes the files into the cache, each whole or not at all; failing costs only the cache."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            part = cache / f"{file}.{os.getpid()}.part"
            part.write_bytes(content)
            part.replace(cache / file)
    except OSError as error:
        say(f"could not keep a copy in {cache}: {error}")


def _gunzip(path: Path) -> bytes:
    return _decompress(path.read_bytes(), path)


def _decompress(content: bytes, source: object) -> bytes:
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Unavailable(f"{source} is not a whole gzip file: {error}") from None


def _download(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        host = urllib.parse.urlsplit(url).netloc
        raise Unavailable(f"{host}: {getattr(error, 'reason', error)}") from None
    return _decompress(content, url)


def _unpack_debian_package(folder: Path) -> Path:
    """Downloads and unpacks the package under ``folder``; returns the folder of its ``.gz`` files.

    NOTE [private apt]: apt reads the system's own configuration (sources, proxies, keys) but writes
    its lists and caches under ``folder``. The update hooks of the system are dropped: run by root
    they would touch the system (Docker images empty apt's cache in one).
    """
    for tool in ("apt-get", "apt-config", "dpkg"):
        if shutil.which(tool) is None:
            raise Unavailable(f"no {tool}, so no Debian package")
    for part in ("lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    system = _run(["apt-config", "dump"], folder)
    kept = [line for line in system.splitlines() if "-Invoke" not in line]
    private = (
        'Dir::Etc::parts "/dev/null"',
        'Dir::Etc::main "/dev/null"',
        f'Dir::State::lists "{folder}/lists"',
        f'Dir::Cache "{folder}/cache"',
        f'Acquire::http::Timeout "{CONNECT_SECONDS}"',
        f'Acquire::https::Timeout "{CONNECT_SECONDS}"',
        'Acquire::Retries "0"',
        'Acquire::Languages "none"',
        # For root: stay root, since the unprivileged download user cannot enter our folder.
        'APT::Sandbox::User "root"',
    )
    config = folder / "apt.conf"
    config.write_text("\n".join(kept + [f"{line};" for line in private]) + "\n")
    apt = {"APT_CONFIG": str(config)}
    # A source of no interest here may fail to update: what counts is whether the package comes.
    _run(["apt-get", "update"], folder, apt, check=False)
    _run(["apt-get", "download", DEBIAN_PACKAGE], folder, apt)
    packages = list(folder.glob(f"{DEBIAN_PACKAGE}_*.deb"))
    if not packages:
        raise Unavailable(f"apt-get download {DEBIAN_PACKAGE} left no package")
    _run(["dpkg", "-x", str(packages[0]), "package"], folder)
    return folder / "package" / DEBIAN_FOLDER


def _run(command: list[str], folder: Path, env: dict[str, str] | None = None, check: bool = True) -> str:
    """Output of a command run in ``folder``; ``Unavailable`` if it fails or takes too long."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=APT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{' '.join(command)}: took over {APT_SECONDS} s") from None
    if check and done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"{' '.join(command)}: {last}")
    return done.stdout


def read_idx(content: bytes) -> np.ndarray:
    """The array in an IDX file of unsigned bytes: 0, 0, 8, rank, big-endian int32 shape, data."""
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"not an IDX file of unsigned bytes: it starts with {content[:4]!r}")
    rank = content[3]
    shape = np.frombuffer(content, ">i4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Unavailable("the digits need scikit-learn: pip install scikit-learn") from None
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))  # the file is ordered by writer
    images, labels = images[order].astype(np.float32) / 16, labels[order]
    return _dataset("digits", (images[:1297], labels[:1297]), (images[1297:], labels[1297:]))


def _dataset(name: str, train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> Dataset:
    mean, std = train[0].mean(dtype=np.float64), train[0].std(dtype=np.float64)

    def split(images: np.ndarray, labels: np.ndarray) -> Split:
        flat = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32))
        return Split((flat - mean) / std, torch.from_numpy(labels.astype(np.int64)))

    return Dataset(name, split(*train), split(*test))


def noisy_subset(train: Split, size: int, noise: float, seed: int) -> Split:
    """``size`` random training examples, a fraction ``noise`` of them with a wrong label.

    Symmetric label noise: exactly ``round(noise * size)`` examples (``size`` capped at what there
    is), chosen uniformly, get one of the other classes, each as likely. The same seed gives the
    same subset and labels.
    """
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(train.labels), generator=random)[:size]
    labels = train.labels[chosen].clone()
    flipped = torch.randperm(len(labels), generator=random)[: round(noise * len(labels))]
    shift = torch.randint(1, CLASSES, (len(flipped),), generator=random)
    labels[flipped] = (labels[flipped] + shift) % CLASSES
    return Split(train.images[chosen], labels)


def held_out(train: Split, size: int, seed: int) -> Split:
    """``size`` training examples that :func:`noisy_subset` of this size and seed leaves out, with their true labels.

    Raises ``Unavailable`` where there are not so many.
    """
    if len(train.labels) < 2 * size:
        raise Unavailable(f"{size} examples to train on leave too few of {len(train.labels)} to hold {size} out")
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    chosen = order[size : 2 * size]
    return Split(train.images[chosen], train.labels[chosen])
