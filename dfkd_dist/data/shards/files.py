"""Files of a set, wherever they lie: local paths, what fsspec reaches (https, s3, ...), and `pipe:` commands."""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import webdataset

from dfkd_dist.data.errors import DatasetError

CHUNK = 2**20
_PIPE = "pipe:"


def is_remote(location: str) -> bool:
    """Whether the file is not simply one of this machine's."""
    return "://" in location or location.startswith(_PIPE)


def is_location(name: str) -> bool:
    """Whether a shard's name says where it lies by itself, and not relative to its manifest."""
    return is_remote(name) or name.startswith("/")


@contextmanager
def open_binary(location: str) -> Iterator[BinaryIO]:
    """Open a file for reading from its beginning; DatasetError names it where that or a read fails.

    Remote files come into memory as a whole: this is for manifests, lists and single images. `pipe:COMMAND` runs the
    command in a shell and reads its output: use manifests and lists that you trust. Raises ImportError naming the
    extra for a protocol whose package is missing.
    """
    with _named(location), _open(location) as file:
        yield file


def _open(location: str) -> BinaryIO:
    if location.startswith(_PIPE):
        return cast(BinaryIO, webdataset.gopen(location))
    if not is_remote(location):
        return open(location, "rb")
    filesystem, path = _filesystem(location)
    return io.BytesIO(filesystem.cat_file(path))


@contextmanager
def _named(location: str) -> Iterator[None]:
    """Failures as a DatasetError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(f"{location}: no such file") from error
    except _read_errors() as error:
        raise DatasetError(f"{location}: cannot be read: {type(error).__name__}: {error}") from error


def _read_errors() -> tuple[type[Exception], ...]:
    """What a failed read may raise; aiohttp's errors are no OSErrors."""
    try:
        import aiohttp
    except ImportError:
        return (OSError,)
    return (OSError, aiohttp.ClientError)


@contextmanager
def named_extra(location: str) -> Iterator[None]:
    """Say which extra to install where fsspec lacks a package for a protocol; DatasetError for an unknown one."""
    try:
        yield
    except ImportError as error:
        extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(location.partition("://")[0], "remote")
        raise ImportError(f"{location} needs: pip install 'dfkd-dist[{extra}]' ({error})") from error
    except ValueError as error:
        raise DatasetError(f"{location}: cannot be opened: {error}") from error


def _filesystem(location: str) -> tuple[Any, str]:
    """The file system that a URL is on, and the path there."""
    with named_extra(location):
        options = _http_options() if location.startswith(("http:", "https:")) else {}
        found: tuple[Any, str] = fsspec.core.url_to_fs(location, **options)
        return found


def _http_options() -> dict[str, Any]:
    """A shard may take any time as long as it comes at all; by default all of it must come within five minutes."""
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}


def read_range(location: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` of a file that can be read anywhere; fewer where it ends. Raises DatasetError."""
    if location.startswith(_PIPE):
        raise DatasetError(f"{location}: a command's output cannot be read by offset")
    with _named(location):
        if not is_remote(location):
            with open(location, "rb") as file:
                file.seek(offset)
                return file.read(size)
        filesystem, path = _filesystem(location)
        data = bytes(filesystem.cat_file(path, start=offset, end=offset + size))
        # Some servers know no ranges and send the whole file.
        return data if len(data) <= size else data[offset : offset + size]


@contextmanager
def local_copy(location: str) -> Iterator[Path]:
    """The file as one of this machine: itself, or a temporary copy. Raises DatasetError."""
    if not is_remote(location):
        if not Path(location).is_file():
            raise DatasetError(f"{location}: no such file")
        yield Path(location)
        return
    with tempfile.TemporaryDirectory(prefix="dfkd-shards-") as folder:
        target = Path(folder) / "copy"
        with _named(location):
            _fetch(location, target)
        yield target


def _fetch(location: str, target: Path) -> None:
    if location.startswith(_PIPE):
        with _open(location) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, CHUNK)
    else:
        filesystem, path = _filesystem(location)
        filesystem.get_file(path, str(target))


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expand(where: str) -> list[str]:
    """Tar files that a folder, a glob pattern, a pattern with braces or a single location stands for, in order.

    Raises DatasetError where there are none.
    """
    if not is_remote(where) and Path(where).is_dir():
        found = sorted(str(path) for path in Path(where).glob("*.tar"))
    elif where.startswith(_PIPE) or Path(where).is_file():
        found = [where]
    else:
        found = []
        for location in webdataset.shardlists.expand_urls(where):
            local_pattern = not is_remote(location) and has_magic(location)
            found += sorted(glob(location)) if local_pattern else [location]
    if not found:
        raise DatasetError(f"{where}: found no .tar files")
    return found
