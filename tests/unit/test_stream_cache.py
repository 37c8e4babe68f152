"""The disk cache: one fetch for all, never more than the limit, nothing goes while it is read, nothing half is used."""

import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.stream.batch import Passing, Unusable
from dfkd_dist.data.stream.cache import DiskCache, Write

SIZE = 1000


def contents(k: int) -> bytes:
    return bytes([k]) * SIZE


def name(k: int) -> str:
    return hashlib.sha256(contents(k)).hexdigest()


def bringing(k: int, log: Path | None = None, delay_s: float = 0.0) -> Callable[[Write], None]:
    def fetch(write: Write) -> None:
        if log is not None:
            with log.open("a") as file:
                file.write(f"{k}\n")
        time.sleep(delay_s)
        write(contents(k)[:400])
        write(contents(k)[400:])

    return fetch


def never(write: Write) -> None:
    raise AssertionError("fetched, although it should be there")


def use(cache: DiskCache, k: int, fetch: Callable[[Write], None] | None = None) -> bytes:
    with cache.open(name(k), SIZE, fetch or bringing(k)) as file:
        return os.pread(file, 2 * SIZE, 0)


def kept(folder: Path) -> set[int]:
    return {path.read_bytes()[0] for path in folder.glob("*.tar")}


def test_what_is_there_is_not_fetched(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path / "a" / "b"), 10 * SIZE)
    assert use(cache, 1) == contents(1)
    assert use(cache, 1, never) == contents(1)
    assert use(DiskCache(str(tmp_path / "a" / "b"), 10 * SIZE), 1, never) == contents(1)


def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 3 * SIZE)
    for k in (1, 2, 3, 1, 4):
        use(cache, k)
        time.sleep(0.01)
    assert kept(tmp_path) == {1, 3, 4}
    use(cache, 5)
    assert kept(tmp_path) == {1, 4, 5}


def test_what_is_read_stays(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 2 * SIZE)
    with cache.open(name(1), SIZE, bringing(1)) as file:
        use(cache, 2)
        use(cache, 3)
        assert kept(tmp_path) == {1, 3}
        assert os.pread(file, SIZE, 0) == contents(1)
    use(cache, 4)
    assert kept(tmp_path) == {3, 4}


def test_who_finds_no_room_waits_for_it(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 1 * SIZE)
    seen: list[bytes] = []
    waiting = threading.Thread(target=lambda: seen.append(use(cache, 2)))
    with cache.open(name(1), SIZE, bringing(1)):
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and kept(tmp_path) == {1}
    waiting.join(10)
    assert seen == [contents(2)] and kept(tmp_path) == {2}


def test_the_limit_counts_what_is_being_fetched(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 2 * SIZE)
    use(cache, 1)
    use(cache, 2)

    def look(write: Write) -> None:
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * SIZE
        bringing(3)(write)

    use(cache, 3, look)
    assert kept(tmp_path) == {2, 3}


def _use_all(folder: str, log: str, seed: int) -> None:
    cache = DiskCache(folder, 3 * SIZE)
    for step in range(40):
        k = (seed * 7 + step * (seed + 1)) % 6
        assert use(cache, k, bringing(k, Path(log), 0.001)) == contents(k)
        assert sum(map(_size, Path(folder).glob("*.tar"))) <= 3 * SIZE


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # gone since it was listed
        return 0


def test_processes_share_a_folder_and_fetch_a_shard_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")

    def fetch_one() -> None:
        use(DiskCache(str(tmp_path / "one"), 3 * SIZE), 1, bringing(1, log, 0.2))

    several = [context.Process(target=fetch_one) for _ in range(4)]
    for process in several:
        process.start()
    for process in several:
        process.join(30)
    assert [process.exitcode for process in several] == [0] * 4
    assert log.read_text() == "1\n"


def test_processes_fight_for_a_small_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    several = [
        context.Process(target=_use_all, args=(str(tmp_path / "c"), str(tmp_path / "log"), seed)) for seed in range(4)
    ]
    for process in several:
        process.start()
    for process in several:
        process.join(60)
    assert [process.exitcode for process in several] == [0] * 4
    assert not list((tmp_path / "c").glob("*.part"))


def test_what_a_dead_process_left_is_no_shard_and_goes(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 3 * SIZE)

    def die() -> None:
        use(cache, 1, lambda write: (write(b"half"), os._exit(9))[0])

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join(30)
    assert len(list(tmp_path.glob("*.part"))) == 1 and not kept(tmp_path)
    for k in (2, 3, 4):
        use(cache, k)
    assert kept(tmp_path) == {2, 3, 4} and not list(tmp_path.glob("*.part"))
    assert use(cache, 1) == contents(1)


@pytest.mark.parametrize(
    ("data", "said"), [(b"", "0 bytes"), (contents(2), "sha256"), (contents(1)[1:], "999 bytes"), (bytes(1001), "more")]
)
def test_other_contents_are_refused(tmp_path: Path, data: bytes, said: str) -> None:
    cache = DiskCache(str(tmp_path), 3 * SIZE)
    with pytest.raises(Passing, match=said) as caught:
        use(cache, 1, lambda write: write(data))
    assert caught.value.cause == "checksum"
    assert not kept(tmp_path) and not list(tmp_path.glob("*.part"))
    assert use(cache, 1) == contents(1)


def test_a_fetch_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 3 * SIZE)

    def fail(write: Write) -> None:
        write(b"some")
        raise Unusable("unreachable", "gone")

    with pytest.raises(Unusable, match="gone"):
        use(cache, 1, fail)
    assert not list(tmp_path.glob("*.part"))


def test_a_file_of_another_length_is_fetched_anew(tmp_path: Path) -> None:
    """After a power cut a renamed file may be empty."""
    cache = DiskCache(str(tmp_path), 3 * SIZE)
    use(cache, 1)
    os.truncate(tmp_path / f"{name(1)}.tar", 0)
    assert use(cache, 1) == contents(1)


def test_a_folder_that_cannot_be_made_or_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="reader.cache.folder: .*file/x cannot be made"):
        DiskCache(str(tmp_path / "file" / "x"), SIZE)
    cache = DiskCache(str(tmp_path / "gone"), SIZE)
    (tmp_path / "gone").rmdir()
    with pytest.raises(DatasetError, match="reader.cache.folder: .*gone cannot be used"):
        use(cache, 1)
