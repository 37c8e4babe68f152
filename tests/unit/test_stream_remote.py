"""Shards behind a real HTTP server that fails, stalls and truncates; behind fsspec; and behind commands."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from dfkd_dist.config import CacheSpec, ReaderSpec
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.manifest import Manifest, read_manifest
from dfkd_dist.data.stream import remote
from dfkd_dist.data.stream.batch import Outcome
from dfkd_dist.data.stream.locating import Locator
from dfkd_dist.data.stream.opening import open_reader
from dfkd_dist.data.stream.reading import ImageReader
from dfkd_dist.data.stream.stream import Stream
from tests.faulty_http import STALL_S, Server, serve
from tests.shards import write_shards

pytest.importorskip("aiohttp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), 43)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    with serve(folder) as running:
        yield running


def cached(folder: Path, limit_gb: float = 1.0) -> dict[str, Any]:
    return {"cache": CacheSpec(folder=str(folder), limit_gb=limit_gb)}


def make(manifest: Manifest, **keys: Any) -> ImageReader:
    spec = ReaderSpec(shards=manifest.path, **{"retries": 3, "timeout_s": 5.0, **keys})
    return open_reader(manifest, spec, 8, 3)


def read(manifest: Manifest, reader: ImageReader) -> Outcome:
    return reader.read(Locator(manifest).request(np.arange(43), np.arange(43)).pieces_3N)


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    manifest = read_manifest(folder)
    return read(manifest, make(manifest)).images_NCHW


# ---------------------------------------------------------------------------------------------------- ranges


def test_shards_are_read_by_ranges(server: Server, expected: torch.Tensor) -> None:
    manifest = read_manifest(server.url)
    before = server.sent
    outcome = read(manifest, make(manifest))
    assert not outcome.failures and torch.equal(outcome.images_NCHW, expected)
    assert sum(count for path, count in server.asked.items() if path.endswith(".tar")) == 5
    assert outcome.bytes_read == server.sent - before > 0


@pytest.mark.parametrize("fault", ["500", "503", "429", "stall", "cut", "short"])
def test_what_goes_wrong_for_a_while_is_tried_again(server: Server, expected: torch.Tensor, fault: str) -> None:
    manifest = read_manifest(server.url)
    server.fault = lambda path, before: fault if before < (1 if fault == "stall" else 2) else None
    reader = make(manifest, timeout_s=0.4 if fault == "stall" else 5.0)
    outcome = read(manifest, reader)
    assert not outcome.failures and torch.equal(outcome.images_NCHW, expected)


@pytest.mark.parametrize(("fault", "cause", "said"), [
    ("500", "unreachable", "500"),
    ("stall", "unreachable", "no answer in time"),
    ("cut", "unreachable", "Payload"),
    ("403", "missing", "403"),
    ("404", "missing", "FileNotFound"),
    ("short", "truncated", "the shard ends at byte"),
])  # fmt: skip
def test_what_stays_wrong_costs_its_shard(
    server: Server, expected: torch.Tensor, fault: str, cause: str, said: str
) -> None:
    manifest = read_manifest(server.url)
    server.fault = lambda path, before: fault if "000001" in path else None
    reader = make(manifest, retries=1, timeout_s=0.3 if fault == "stall" else 5.0)
    outcome = read(manifest, reader)
    lost = [failure.position for failure in outcome.failures]
    assert lost == list(range(7, 19)) if fault != "short" else set(lost) < set(range(7, 19))
    assert {failure.cause for failure in outcome.failures} == {cause}
    assert all(said in failure.detail for failure in outcome.failures)
    kept = [i for i in range(43) if i not in lost]
    assert torch.equal(outcome.images_NCHW[kept], expected[kept]) and not outcome.images_NCHW[lost].any()
    # A shard that has failed is left alone for a while.
    before = server.asked["/000001.tar"]
    assert read(manifest, reader).failures == outcome.failures
    assert server.asked["/000001.tar"] - before <= (2 if fault == "short" else 0)


def test_large_pieces_are_cut_and_holes_are_seen(
    server: Server, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE", 3000)
    manifest = read_manifest(server.url)
    assert torch.equal(read(manifest, make(manifest)).images_NCHW, expected)
    assert server.asked["/000001.tar"] > 5
    reader = make(manifest, retries=0)
    store: Any = reader._stores[0]
    real = remote.RemoteFile.piece

    def one_is_short(file: remote.RemoteFile, offset: int, size: int) -> tuple[bytes, int]:
        data, came = real(file, offset, size)
        if "000001" in file._path and 3000 < offset <= 6000:
            raise remote.ShortRead(data[:100], "short")
        return data, came

    monkeypatch.setattr(remote.RemoteFile, "piece", one_is_short)
    monkeypatch.setattr(store, "_ends", NeverFull())
    outcome = read(manifest, reader)
    lost = [failure.position for failure in outcome.failures]
    assert lost and {failure.cause for failure in outcome.failures} == {"truncated"}
    kept = [i for i in range(43) if i not in lost]
    assert lost == list(range(lost[0], 19)) and torch.equal(outcome.images_NCHW[kept], expected[kept])


class NeverFull(dict[int, int]):
    """Forgets where a shard was found to end."""

    def __setitem__(self, key: int, value: int) -> None:
        pass


def test_a_server_without_ranges_works_at_a_price(server: Server, expected: torch.Tensor) -> None:
    manifest = read_manifest(server.url)
    server.fault = lambda path, before: "whole"
    outcome = read(manifest, make(manifest))
    assert torch.equal(outcome.images_NCHW, expected)
    assert outcome.bytes_read == sum(shard.bytes for shard in manifest.shards)


def test_a_server_that_is_not_there(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(folder)
    monkeypatch.setattr(Manifest, "location", lambda self, shard: f"http://127.0.0.1:9/{shard}.tar")
    outcome = read(manifest, make(manifest, retries=1))
    assert {failure.cause for failure in outcome.failures} == {"unreachable"} and len(outcome.failures) == 43
    assert "2 tries" in outcome.failures[0].detail


def test_waits_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def fail() -> None:
        raise OSError("no")

    with pytest.raises(remote.Unusable, match="8 tries"):
        remote.persistently(fail, 7, "it")
    assert waits == [0.5, 1, 2, 4, 8, 16, 30]


def test_a_stream_over_http_is_the_local_one(server: Server, folder: Path) -> None:
    """Window shuffle over ranges, also through worker-less prefetching order."""
    local, far = read_manifest(folder), read_manifest(server.url)
    keys: dict[str, Any] = {"batch": 5, "size": 8, "channels": 3, "seed": 0, "rank": 1, "world_size": 2}
    one = Stream(local, ReaderSpec(shards=local.path, workers=0), **keys)
    other = Stream(far, ReaderSpec(shards=far.path, workers=0), **keys)
    for g in range(one.batches):
        a, b = one.get(0, g), other.get(0, g)
        assert torch.equal(a.images_NCHW, b.images_NCHW) and torch.equal(a.ids_N, b.ids_N)


def test_any_protocol_of_fsspec(folder: Path, expected: torch.Tensor) -> None:
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe_file(f"/set/{file.name}", file.read_bytes())
    manifest = read_manifest("memory://set")
    outcome = read(manifest, make(manifest))
    assert not outcome.failures and torch.equal(outcome.images_NCHW, expected)
    memory.rm("/set/000003.tar")
    assert {failure.cause for failure in read(manifest, make(manifest)).failures} == {"missing"}


@pytest.mark.parametrize(("protocol", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_missing_package_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, protocol: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    manifest = read_manifest(folder)
    monkeypatch.setattr(Manifest, "location", lambda self, shard: f"{protocol}://bucket/{shard}.tar")
    with pytest.raises(ImportError, match=rf"pip install 'dfkd-dist\[{extra}\]'"):
        make(manifest)


def test_an_unknown_protocol_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(folder)
    monkeypatch.setattr(Manifest, "location", lambda self, shard: f"gopher://host/{shard}.tar")
    with pytest.raises(DatasetError, match="gopher://host/4.tar: cannot be opened"):
        make(manifest)


# ------------------------------------------------------------------------------------------------------ copies


def test_shards_are_copied_once(server: Server, expected: torch.Tensor, tmp_path: Path) -> None:
    manifest = read_manifest(server.url)
    first = read(manifest, make(manifest, **cached(tmp_path)))
    assert torch.equal(first.images_NCHW, expected)
    assert first.bytes_read == sum(shard.bytes for shard in manifest.shards)
    again = read(manifest, make(manifest, **cached(tmp_path)))
    assert torch.equal(again.images_NCHW, expected) and again.bytes_read == 0
    assert sum(count for path, count in server.asked.items() if path.endswith(".tar")) == 5


@pytest.mark.parametrize("fault", ["500", "stall", "cut", "short", "whole"])
def test_copying_survives_faults(
    server: Server, expected: torch.Tensor, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PIECE", 3000)
    manifest = read_manifest(server.url)
    server.fault = lambda path, before: fault if before % 5 == 0 or fault == "whole" else None
    reader = make(manifest, timeout_s=0.3 if fault == "stall" else 5.0, **cached(tmp_path))
    if fault == "stall":
        server.fault = lambda path, before: fault if before == 0 and "2" in path else None
    outcome = read(manifest, reader)
    assert not outcome.failures and torch.equal(outcome.images_NCHW, expected)


def test_a_shard_that_was_changed_is_not_used(server: Server, folder: Path, tmp_path: Path) -> None:
    manifest = read_manifest(server.url)
    data = (folder / "000001.tar").read_bytes()
    changed = bytearray(data)
    changed[int(manifest.offsets_N[8]) + 3] ^= 1
    (folder / "000001.tar").write_bytes(changed)
    try:
        outcome = read(manifest, make(manifest, **cached(tmp_path)))
    finally:
        (folder / "000001.tar").write_bytes(data)
    assert [(f.position, f.cause) for f in outcome.failures] == [(i, "checksum") for i in range(7, 19)]
    assert server.asked["/000001.tar"] == 2
    assert not list(tmp_path.glob("*.part"))


# ------------------------------------------------------------------------------------------------------- pipes


def piped(folder: Path, tmp_path: Path, command: str) -> Manifest:
    """The same set, whose shards come from a command with {shard} in it."""
    text = (folder / "manifest.json").read_text()
    for k in range(5):
        text = text.replace(f'"{k:06d}.tar"', f'"pipe:{command.format(shard=folder / f"{k:06d}.tar")}"')
    (tmp_path / "manifest.json").write_text(text)
    return read_manifest(tmp_path)


def test_commands_are_read_through_once(folder: Path, expected: torch.Tensor, tmp_path: Path) -> None:
    manifest = piped(folder, tmp_path, "cat {shard}")
    spec = ReaderSpec(shards=manifest.path, workers=0, **cached(tmp_path / "copies"))
    s = Stream(manifest, spec, batch=5, size=8, channels=3, seed=0, rank=0, world_size=1)
    for epoch in range(2):
        for g in range(s.batches):
            raw = s.get(epoch, g)
            assert torch.equal(raw.images_NCHW, expected[raw.ids_N])
    assert s.traffic.read == sum(shard.bytes for shard in manifest.shards)
    assert s.traffic.amplification == s.traffic.read / s.traffic.used


@pytest.mark.parametrize(("command", "cause", "said"), [
    ("cat {shard}; exit 3", "unreachable", "exit code 3"),
    ("head -c 1000 {shard}", "checksum", "1000 bytes"),
    ("cat {shard} {shard}", "checksum", "more than the"),
    ("sleep 30; echo {shard}", "unreachable", "silent for 0.3 s"),
])  # fmt: skip
def test_commands_that_fail(folder: Path, tmp_path: Path, command: str, cause: str, said: str) -> None:
    manifest = piped(folder, tmp_path, command)
    started = time.monotonic()
    outcome = read(manifest, make(manifest, retries=0, timeout_s=0.3, **cached(tmp_path / "copies")))
    assert time.monotonic() - started < 20
    assert len(outcome.failures) == 43 and {failure.cause for failure in outcome.failures} == {cause}
    assert said in outcome.failures[0].detail


def test_a_command_that_fails_once_is_run_again(
    folder: Path, expected: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    flag = tmp_path / "flag"
    manifest = piped(folder, tmp_path, f"test -e {flag} || {{{{ touch {flag}; exit 1; }}}}; cat {{shard}}")
    outcome = read(manifest, make(manifest, **cached(tmp_path / "copies")))
    assert not outcome.failures and torch.equal(outcome.images_NCHW, expected)


def test_commands_need_a_cache(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="reader.cache is null"):
        make(piped(folder, tmp_path, "cat {shard}"))


def test_commands_from_afar_are_not_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    piped(folder, tmp_path / "set", f"touch {tmp_path}/ran; cat {{shard}}")
    with serve(tmp_path / "set") as server:
        manifest = read_manifest(server.url)
        with pytest.raises(DatasetError, match="commands are run only from a manifest on this machine"):
            make(manifest, **cached(tmp_path / "copies"))
    assert not (tmp_path / "ran").exists()


def test_a_shard_must_fit_into_the_cache(server: Server, tmp_path: Path) -> None:
    manifest = read_manifest(server.url)
    with pytest.raises(DatasetError, match="reader.cache.limit_gb is 1e-06, but http.*000000.tar has"):
        make(manifest, **cached(tmp_path, limit_gb=1e-6))


def test_the_server_really_stalls(server: Server) -> None:
    """The faults above are real ones."""
    server.fault = lambda path, before: "stall"
    started = time.monotonic()
    with pytest.raises(Exception):  # noqa: B017  (whatever the protocol says)
        remote.RemoteFile(f"{server.url}/000000.tar", 60.0).get(0, 10)
    assert time.monotonic() - started >= 0.9 * STALL_S
