"""Is a set of shards what its manifest says? Sizes, check sums, structure, and every image decoded."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dfkd_dist.data.errors import DatasetError
from dfkd_dist.data.shards.encode import decode_native
from dfkd_dist.data.shards.files import is_remote, local_copy, sha256_of
from dfkd_dist.data.shards.index import Indexed, index_tar, label_of, read_images
from dfkd_dist.data.shards.manifest import NO_LABEL, Manifest, read_manifest, shard_location
from dfkd_dist.data.shards.tar import Sample
from dfkd_dist.data.shards.workers import spread

CAUSES = {
    "missing": "the shard is not there or cannot be read",
    "size": "the shard has another size than the manifest says",
    "sha256": "the shard's bytes changed",
    "tar": "the shard is no readable tar any more",
    "manifest": "manifest and tar contradict each other",
    "cut": "the image lies beyond the end of the shard",
    "changed": "the image's bytes changed",
    "undecodable": "the image cannot be decoded",
}
"""What can be wrong, and how to say it."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a shard, or with one of its images."""

    shard: str
    cause: str
    detail: str
    key: str | None = None


@dataclass
class Judged:
    """A shard after it was looked at: what is wrong, and which images can still be used."""

    findings: list[Finding] = field(default_factory=list)
    good: list[Sample] = field(default_factory=list)
    """Filled only where a clean copy is made."""


@dataclass(frozen=True)
class Report:
    """What was found in a set."""

    shards: int
    samples: int
    findings: list[Finding]
    unlisted: list[str]
    """Tars beside the manifest that it does not mention: no fault, but worth a look."""

    def counts(self) -> dict[str, int]:
        """Findings by cause, in the order of `CAUSES`."""
        found = {cause: sum(finding.cause == cause for finding in self.findings) for cause in CAUSES}
        return {cause: count for cause, count in found.items() if count}

    def table(self, examples: int = 5) -> str:
        """For a person: the causes, with the first examples of each."""
        lines = []
        for cause, count in self.counts().items():
            lines.append(f"{cause:12s} {count:8,d}  {CAUSES[cause]}")
            some = [finding for finding in self.findings if finding.cause == cause][:examples]
            lines += [f"{'':23s}{_place(finding)}: {finding.detail}" for finding in some]
            if count > examples:
                lines.append(f"{'':23s}and {count - examples:,} more")
        if self.unlisted:
            lines.append(f"note: tars that the manifest does not list: {', '.join(self.unlisted[:examples])}")
        summary = f"{len(self.findings):,} findings" if self.findings else "nothing wrong"
        return "\n".join([*lines, f"{self.shards:,} shards, {self.samples:,} images: {summary}"])


def _place(finding: Finding) -> str:
    return finding.shard if finding.key is None else f"{finding.shard}: {finding.key}"


def verify(where: str | Path, *, workers: int = 1, decode: bool = True, progress: bool = False) -> Report:
    """Check every shard's size and sha256, its structure against the manifest, and decode each image.

    Raises DatasetError for a manifest that cannot be used itself.
    """
    manifest = read_manifest(where)

    def look(item: tuple[int, dict[str, Any]]) -> tuple[int, list[Finding]]:
        number, entry = item
        return number, judge(manifest, entry, decode=decode, keep=False).findings

    found: dict[int, list[Finding]] = {}
    with tqdm(total=len(manifest), unit="img", disable=None if progress else True) as bar:
        for number, findings in spread(look, enumerate(manifest.entries()), min(workers, len(manifest.shards))):
            found[number] = findings
            bar.update(manifest.shards[number].count)
    ordered = [finding for number in sorted(found) for finding in found[number]]
    return Report(len(manifest.shards), len(manifest), ordered, _unlisted(manifest))


def judge(manifest: Manifest, entry: dict[str, Any], *, decode: bool, keep: bool) -> Judged:
    """Look at one shard, given its line of the manifest; `keep` collects the good images, too."""
    name = str(entry["name"])
    judged = Judged()
    try:
        with local_copy(shard_location(manifest.path, name)) as path:
            _look(path, entry, manifest.classes, judged, decode=decode, keep=keep)
    except (DatasetError, OSError) as error:
        judged.findings.append(Finding(name, "missing", str(error)))
    return judged


def _look(
    path: Path, entry: dict[str, Any], classes: Sequence[str] | None, judged: Judged, *, decode: bool, keep: bool
) -> None:
    name = str(entry["name"])
    whole = list(_whole_shard(path, entry))
    judged.findings += whole
    listed = _as_listed(entry)
    try:
        inside = index_tar(path, name)
        judged.findings += _contradictions(name, listed, inside, classes)
    except DatasetError as error:
        judged.findings.append(Finding(name, "tar", str(error)))
        inside = listed
    # Images that the manifest does not know are as trustworthy as the shard.
    known = {} if entry.get("crc32s") is None else dict(zip(entry["offsets"], entry["crc32s"], strict=True))
    strangers = not known or not whole
    for sample, data in zip(inside, read_images(path, inside), strict=True):
        fault = _fault(sample, data, known.get(sample.offset), strangers=strangers, decode=decode)
        if fault is not None:
            judged.findings.append(Finding(name, *fault, key=sample.key))
        elif keep:
            label = _label(sample, classes)
            judged.good.append(Sample(sample.key, sample.suffix, data, NO_LABEL if label is None else label))


def _whole_shard(path: Path, entry: dict[str, Any]) -> Iterator[Finding]:
    size = path.stat().st_size
    if size != entry["bytes"]:
        yield Finding(entry["name"], "size", f"{size:,} bytes, expected {entry['bytes']:,}")
    elif (found := sha256_of(path)) != entry["sha256"]:
        yield Finding(entry["name"], "sha256", f"{found[:16]} ..., expected {entry['sha256'][:16]} ...")


def _as_listed(entry: dict[str, Any]) -> list[Indexed]:
    count = entry["count"]
    suffixes = entry.get("members") or [None] * count
    labels = entry.get("labels") or [NO_LABEL] * count
    columns = zip(entry["keys"], suffixes, entry["offsets"], entry["sizes"], labels, strict=True)
    return [Indexed(key, suffix, offset, size, str(label)) for key, suffix, offset, size, label in columns]


def _contradictions(
    name: str, listed: list[Indexed], inside: list[Indexed], classes: Sequence[str] | None
) -> Iterator[Finding]:
    """One finding for each column that differs, with its first difference."""
    if len(listed) != len(inside):
        yield Finding(name, "manifest", f"lists {len(listed)} images, the tar holds {len(inside)}")
        return
    columns: dict[str, Callable[[Indexed], object]] = {
        "key": lambda sample: sample.key,
        "offset": lambda sample: sample.offset,
        "size": lambda sample: sample.size,
        "label": lambda sample: _label(sample, classes),
    }
    if all(sample.suffix is not None for sample in listed):
        columns["member"] = lambda sample: sample.suffix
    for column, value in columns.items():
        pairs = [(value(said), value(found)) for said, found in zip(listed, inside, strict=True)]
        different = [i for i, (said, found) in enumerate(pairs) if said != found]
        if different:
            said, found = pairs[different[0]]
            detail = f"{column} of {len(different)} images; of the first it says {said!r}, the tar {found!r}"
            yield Finding(name, "manifest", detail, key=inside[different[0]].key)


def _label(sample: Indexed, classes: Sequence[str] | None) -> int | None:
    """The number that the sample's label stands for, or None if it stands for none."""
    try:
        return label_of(sample.label, classes, sample.key)
    except DatasetError:
        return None


def _fault(sample: Indexed, data: bytes, crc: int | None, *, strangers: bool, decode: bool) -> tuple[str, str] | None:
    """(cause, detail) of what is wrong with one image."""
    if len(data) < sample.size:
        return "cut", f"{len(data):,} of {sample.size:,} bytes are there"
    if crc is None and not strangers:
        return "changed", f"the manifest knows no image at byte {sample.offset:,}"
    if crc is not None and crc != zlib.crc32(data):
        return "changed", f"its check sum is {zlib.crc32(data)}, expected {crc}"
    if decode:
        try:
            decode_native(data)
        except (ValueError, RuntimeError) as error:
            return "undecodable", str(error).splitlines()[0]
    return None


def _unlisted(manifest: Manifest) -> list[str]:
    """Of a set on this machine: tars that lie beside the manifest without being mentioned."""
    if is_remote(manifest.path):
        return []
    listed = {Path(manifest.location(shard)).resolve() for shard in range(len(manifest.shards))}
    beside = Path(manifest.path).parent.glob("*.tar")
    return sorted(path.name for path in beside if path.resolve() not in listed)
