"""Which store reads which shard of a set, and what of a recipe or a manifest cannot work."""

from __future__ import annotations

import numpy as np

from dfkd_dist.config import ReaderSpec
from dfkd_dist.data.compiled.about import read_compiled
from dfkd_dist.data.compiled.extra import need_ffcv
from dfkd_dist.data.compiled.read import CompiledReader
from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.files import is_remote
from dfkd_dist.data.shards.manifest import Manifest
from dfkd_dist.data.stream.cache import DiskCache
from dfkd_dist.data.stream.copies import PIPE, CopyStore
from dfkd_dist.data.stream.decoding import Decoder
from dfkd_dist.data.stream.reading import ImageReader
from dfkd_dist.data.stream.remote import RemoteFile, RemoteStore
from dfkd_dist.data.stream.stores import LocalStore, Place, Store


def open_reader(manifest: Manifest, spec: ReaderSpec, size: int, channels: int) -> ImageReader | CompiledReader:
    """The reader of a set of shards, or of a compiled file.

    Args:
        manifest: the set, as `stream.sets.open_set` gives it.
        spec: how it is read.
        size: side of the images in pixels.
        channels: 1 or 3.

    Raises:
        DatasetError: the manifest asks for bytes outside its shards; `pipe:` without a cache or in a manifest from
            afar; a shard larger than the cache; a compiled file of images of another size.
        ImportError: a protocol's package or FFCV is missing; says how to get it.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels: found {channels}, allowed are 1 and 3")
    if spec.kind == "ffcv":
        return _open_compiled(manifest, size, channels)
    _check_places(manifest)
    places = [Place(manifest.location(k), shard.bytes, shard.sha256) for k, shard in enumerate(manifest.shards)]
    kinds = [_kind(place.location, spec) for place in places]
    if "remote" in kinds or "copy" in kinds:
        _check_remote(manifest, spec, places, kinds)
    names = list(dict.fromkeys(kinds))
    stores = [_store(kind, places, spec) for kind in names]
    store_of_S = np.array([names.index(kind) for kind in kinds], dtype=np.int64)
    return ImageReader(stores, store_of_S, Decoder(size, channels, spec.pixel_limit))


def _open_compiled(manifest: Manifest, size: int, channels: int) -> CompiledReader:
    need_ffcv("reader.kind: ffcv")
    compiled = read_compiled(manifest.path)
    if compiled.manifest.digest != manifest.digest:
        raise DatasetError(f"{manifest.path}: was compiled anew since it was opened")
    compiled.check(size, channels)
    return CompiledReader(compiled)


def _kind(location: str, spec: ReaderSpec) -> str:
    if not is_remote(location) or location.startswith("file://"):
        return "local"
    return "copy" if location.startswith(PIPE) or spec.cache is not None else "remote"


def _store(kind: str, places: list[Place], spec: ReaderSpec) -> Store:
    if kind == "local":
        return LocalStore(places)
    if kind == "remote":
        return RemoteStore(places, spec.retries, spec.timeout_s)
    assert spec.cache is not None
    cache = DiskCache(spec.cache.folder, int(spec.cache.limit_gb * 1e9))
    return CopyStore(places, cache, spec.retries, spec.timeout_s)


def _check_places(manifest: Manifest) -> None:
    """Sizes are at least 1 and offsets at least 0: `read_manifest` has checked that."""
    counts_S = [shard.count for shard in manifest.shards]
    lengths_N = np.repeat([shard.bytes for shard in manifest.shards], counts_S)
    # Subtracted and not added: numbers near 2^63 must not wrap around.
    outside = np.flatnonzero(manifest.sizes_N > lengths_N - manifest.offsets_N)
    if len(outside):
        sample = int(outside[0])
        shard = manifest.shards[int(manifest.where(np.array([sample]))[0][0])]
        found = f"{manifest.sizes_N[sample]} bytes at {manifest.offsets_N[sample]}"
        raise DatasetError(
            f"{manifest.path}: sample {sample} is said to have {found}, but its shard {shard.name} has {shard.bytes}"
        )


def _check_remote(manifest: Manifest, spec: ReaderSpec, places: list[Place], kinds: list[str]) -> None:
    for place, kind in zip(places, kinds, strict=True):
        is_pipe = place.location.startswith(PIPE)
        if is_pipe and spec.cache is None:
            raise DatasetError(
                f"{manifest.path}: names {place.location!r}, and reader.cache is null; commands are read through as "
                "wholes, so they need a folder for copies"
            )
        # A command is code: it is run only if it comes from a file that somebody has put on this machine.
        if is_pipe and is_remote(manifest.path):
            raise DatasetError(
                f"{manifest.path}: names the command {place.location!r}; commands are run only from a manifest on "
                "this machine, so look at it and copy it here"
            )
        if kind == "copy" and spec.cache is not None and place.bytes > spec.cache.limit_gb * 1e9:
            found = f"{place.location} has {place.bytes / 1e9:.3g} GB"
            raise DatasetError(f"reader.cache.limit_gb is {spec.cache.limit_gb:g}, but {found}")
    for location in {place.location.partition("://")[0]: place.location for place in places}.values():
        if is_remote(location) and not location.startswith(PIPE):
            RemoteFile(location, spec.timeout_s)
