"""Tars that somebody else wrote: found, indexed where they lie, dealt anew; on this machine, by http, from a pipe."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import webdataset

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.build import BuildOptions, build
from dfkd_dist.data.shards.index import index_tar
from dfkd_dist.data.shards.index_in_place import index_in_place
from dfkd_dist.data.shards.info import info
from dfkd_dist.data.shards.inputs import Input
from dfkd_dist.data.shards.manifest import read_manifest
from dfkd_dist.data.shards.sources import SourceOptions, open_input
from dfkd_dist.data.shards.verify import verify
from tests.shards import encoded, small_pictures, write_shards
from tests.unit.test_shards_inputs import stored

PICTURES = [encoded(image, ("jpg", "png")[i % 2]) for i, image in enumerate(small_pictures(12, seed=3))]


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w", kind: int = tarfile.GNU_FORMAT) -> Path:
    """An ordinary tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=kind) as tar:  # type: ignore[call-overload]
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def foreign(folder: Path, names: tuple[str, ...] = ("ant", "bee")) -> Path:
    """Two tars with text, upper case suffixes, a folder, metadata and a very long name among the images."""
    members = []
    for i, data in enumerate(PICTURES):
        key = f"some.where/{'long/' * 50 if i == 5 else ''}img{i}"
        members += [(f"{key}.json", b"{}"), (f"{key}.{('JPEG', 'png')[i % 2]}", data)]
        members += [(f"{key}.cls", names[i % 2].encode())] if i != 3 else []
    members.insert(0, ("__meta__", b"x"))
    members.insert(4, ("text/only.txt", b"no image"))
    write_tar(folder / "a-0.tar", members[:20])
    write_tar(folder / "a-1.tar", members[20:], kind=tarfile.PAX_FORMAT)
    return folder


def test_foreign_tars_are_indexed_where_they_lie(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "in")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = index_in_place(str(folder), folder, ["bee", "ant"], workers=2)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert [shard.name for shard in manifest.shards] == ["a-0.tar", "a-1.tar"]
    samples = stored(manifest)
    assert [data for _, data, _ in samples] == PICTURES
    assert [label for _, _, label in samples] == [-1 if i == 3 else 1 - i % 2 for i in range(12)]
    assert manifest.classes == ("bee", "ant") and samples[0][0] == "some.where/img0"
    found = [s for s in webdataset.WebDataset([str(folder / n) for n in sorted(before)], shardshuffle=False)]
    assert [s["__key__"] for s in found if "jpeg" in s or "png" in s] == [key for key, _, _ in samples]
    assert not verify(folder).findings
    with pytest.raises(DatasetError, match="options.classes was"):
        index_in_place(str(folder), folder, ["ant", "bee"])
    again = index_in_place(str(folder), folder, ["ant", "bee"], overwrite=True)
    assert again.labels_N[0] == 0 and {name: (folder / name).read_bytes() for name in before} == before


def test_tars_elsewhere_are_named_by_their_place(tmp_path: Path) -> None:
    foreign(tmp_path / "in", ("1", "4"))
    manifest = index_in_place(str(tmp_path / "in" / "a-{0..1}.tar"), tmp_path / "out")
    assert [shard.name for shard in manifest.shards] == [str(tmp_path / "in" / f"a-{i}.tar") for i in (0, 1)]
    assert manifest.classes == tuple("01234") and not verify(tmp_path / "out").findings
    below = index_in_place(str(tmp_path / "in" / "a-1*.tar"), tmp_path)
    assert [shard.name for shard in below.shards] == ["in/a-1.tar"] and len(stored(below)) == len(below)
    with pytest.raises(DatasetError, match="its tars were indexed, not built"):
        build(open_input(str(tmp_path / "in"), "tar"), tmp_path / "out", BuildOptions(), overwrite=True)


def test_foreign_tars_are_dealt_anew(tmp_path: Path) -> None:
    source = open_input(str(foreign(tmp_path / "in")))
    assert source.kind == "tar" and source.classes == ["ant", "bee"]
    samples = stored(build(source, tmp_path / "out", BuildOptions(maxcount=5, shuffle=0), workers=2))
    assert sorted(data for _, data, _ in samples) == sorted(PICTURES)
    assert sorted(label for _, _, label in samples) == [-1] + [0] * 6 + [1] * 5
    names = SourceOptions(classes=["bee"])
    with pytest.raises(DatasetError, match=r"label 'ant'; allowed: 0 \.\. 0, or a name: bee"):
        open_input(str(tmp_path / "in"), None, names)


def test_a_tar_without_images_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shards(tmp_path, 6, per_shard=3)
    (tmp_path / "manifest.json").unlink()
    write_tar(tmp_path / "0.tar", [("a.txt", b"x")])
    assert [shard.name for shard in index_in_place(str(tmp_path), tmp_path).shards] == ["000000.tar", "000001.tar"]
    assert "0.tar: holds no images" in caplog.text
    with pytest.raises(DatasetError, match="not one image"):
        index_in_place(str(tmp_path / "0.tar"), tmp_path / "out")
    with pytest.raises(DatasetError, match="found no .tar files"):
        (tmp_path / "empty").mkdir()
        index_in_place(str(tmp_path / "empty"), tmp_path / "out2")


def test_tars_that_cannot_be_used(tmp_path: Path) -> None:
    pairs = [(f"{i}.jpg", data) for i, data in enumerate(PICTURES[::2])]
    whole = write_tar(tmp_path / "whole.tar", pairs).read_bytes()
    header = index_tar(tmp_path / "whole.tar", "")[3].offset - 512
    for name, data, said in [
        ("gz", write_tar(tmp_path / "x.tar.gz", pairs, "w:gz").read_bytes(), "compressed with gzip; allowed are plain"),
        ("cut", whole[: header - 700], "unexpected end of data"),
        ("cut in header", whole[: header + 100], "broken header at byte"),
        ("broken header", whole[:header] + b"Z" * 200 + whole[header + 200 :], f"broken header at byte {header}"),
        ("noise", bytes(range(256)) * 10, "not a readable tar"),
        ("empty", b"", "not a readable tar: empty file"),
        ("two", write_tar(tmp_path / "y", [("a.jpg", b"x"), ("a.png", b"y")]).read_bytes(), "'a' has several images"),
        ("label", write_tar(tmp_path / "z", [("a.jpg", b"x"), ("a.cls", b"-7")]).read_bytes(), "a.cls: label -7"),
    ]:
        (tmp_path / "bad.tar").write_bytes(data)
        with pytest.raises(DatasetError, match=said) as error:
            index_in_place(str(tmp_path / "bad.tar"), tmp_path / name)
        assert "bad.tar" in str(error.value)


class Ranged(SimpleHTTPRequestHandler):
    """A server of files that knows byte ranges (or does not)."""

    ranges = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        if not (wanted and self.ranges):
            return super().do_GET()
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = (int(text) for text in wanted.removeprefix("bytes=").split("-"))
        self.send_response(206)
        piece = data[first : last + 1]
        self.send_header("Content-Range", f"bytes {first}-{first + len(piece) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        self.wfile.write(piece)


@pytest.fixture(params=[True, False], ids=["ranges", "no_ranges"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of tmp_path / "served"."""
    pytest.importorskip("aiohttp")
    (tmp_path / "served").mkdir()
    handler = type("Handler", (Ranged,), {"ranges": request.param})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "served"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_remote_sets_and_tars(tmp_path: Path, served: str) -> None:
    folder = tmp_path / "served"
    write_shards(folder, 12, per_shard=5)
    local, remote = read_manifest(folder), read_manifest(served)
    assert remote.digest == local.digest and remote.location(2) == f"{served}/000002.tar"
    assert not verify(served, workers=2).findings
    assert info(served).sizes == info(folder).sizes
    indexed = index_in_place(f"{served}/{{000000..000002}}.tar", tmp_path / "index")
    assert [shard.name for shard in indexed.shards] == [f"{served}/00000{i}.tar" for i in range(3)]
    assert (indexed.offsets_N == local.offsets_N).all() and [s.sha256 for s in indexed.shards] == [
        s.sha256 for s in local.shards
    ]
    sources: list[Input] = [open_input(f"{served}/manifest.json"), open_input(f"{served}/{{000000..000002}}.tar")]
    for i, source in enumerate(sources):
        assert stored(build(source, tmp_path / f"out{i}", BuildOptions(maxcount=4), workers=2)) == stored(local)
    (folder / "list.csv").write_text("path\na.jpg\n")
    (folder / "a.jpg").write_bytes(PICTURES[0])
    assert open_input(f"{served}/list.csv").read(0) == PICTURES[0]
    (folder / "000001.tar").unlink()
    assert [(f.shard, f.cause) for f in verify(served).findings] == [("000001.tar", "missing")]
    with pytest.raises(DatasetError, match="nowhere/manifest.json: no such file"):
        read_manifest(f"{served}/nowhere")


def test_a_server_that_is_gone(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(DatasetError, match="http://127.0.0.1:9/manifest.json: cannot be read: Client"):
        read_manifest("http://127.0.0.1:9")
    with pytest.raises(DatasetError, match="foo://x/manifest.json: cannot be opened"):
        read_manifest("foo://x")


def test_pipes_are_indexed_and_verified(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "in", 6, per_shard=6)
    command = f"pipe:cat {folder}/000000.tar"
    manifest = index_in_place(command, tmp_path / "out")
    assert manifest.location(0) == command and manifest.shards[0].sha256 == read_manifest(folder).shards[0].sha256
    assert not verify(tmp_path / "out").findings
    with pytest.raises(DatasetError, match="cannot be read by offset"):
        open_input(command).read(0)
    with pytest.raises(DatasetError, match="pipe:false: "):
        index_in_place("pipe:false", tmp_path / "other")
