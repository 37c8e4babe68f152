"""Encoded files of every kind to pixels, or to the right cause; nothing is decoded before it has been looked at."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dfkd_dist.data.decode import decode_one, image_shape
from dfkd_dist.data.stream.batch import CAUSES, Failure, Unusable
from dfkd_dist.data.stream.decoding import Decoder
from dfkd_dist.data.stream.headers import PADDING, checked_shape, plain_jpg_shapes
from tests.encoded import bad_files, claiming_jpg, good_files, picture, save

GOOD, BAD = good_files(), bad_files()


def laid_out(files: Sequence[bytes], between: bytes = b"") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Files one after another in a buffer: the buffer, where they begin and where they end."""
    starts, stops, data = [], [], b""
    for file in files:
        starts.append(len(data))
        data += file
        stops.append(len(data))
        data += between
    return (
        np.frombuffer(bytearray(data + bytes(PADDING)), dtype=np.uint8),
        np.array(starts, dtype=np.int64),
        np.array(stops, dtype=np.int64),
    )


def decode(
    files: Sequence[bytes], size: int = 12, channels: int = 3, limit: int = 2**26
) -> tuple[Tensor, list[Failure]]:
    decoder = Decoder(size, channels, limit)
    data, starts, stops = laid_out(files)
    images, failures = decoder.blanks(len(files)), list[Failure]()
    decoder.decode(data, starts, stops, np.arange(len(files)), images, failures)
    return decoder.join(images, None), failures


# ------------------------------------------------------------------------------------------------------- headers


def test_headers_of_plain_jpgs_are_read_together() -> None:
    files = [*GOOD.values(), *(data for _, data in BAD.values())]
    data, starts, stops = laid_out(files)
    heights, widths = plain_jpg_shapes(data, starts, stops)
    for name, height, width, file in zip([*GOOD, *BAD], heights, widths, files, strict=True):
        if height:
            assert (height, width) == image_shape(np.frombuffer(file, dtype=np.uint8)), name
    by_name = dict(zip(GOOD, heights, strict=False))
    assert all(by_name[name] for name in ("jpg", "grey jpg", "progressive jpg", "jpg with comments", "jpg with exif"))
    assert not by_name["jpg with fill bytes"] and not by_name["jpg with many segments"]


def test_a_header_is_never_taken_from_the_next_file() -> None:
    whole = GOOD["jpg"]
    frame = whole.index(b"\xff\xc0")
    for cut in range(1, frame + 10):
        data, starts, stops = laid_out([whole[:cut], whole])
        heights, _ = plain_jpg_shapes(data, starts, stops)
        assert heights[0] == 0, cut
        # Cut at a marker, the next file's first marker seems to follow; it is not read as this file's.
        assert heights[1] == 12


@pytest.mark.parametrize("name", GOOD)
def test_the_closer_look_agrees(name: str) -> None:
    encoded = np.frombuffer(GOOD[name], dtype=np.uint8)
    kind, height, width = checked_shape(encoded)
    assert (height, width) == (12, 16)
    assert kind in name


@given(st.sampled_from([*GOOD.values(), *(data for _, data in BAD.values())]), st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_headers_raise_nothing_unexpected(file: bytes, data: st.DataObject) -> None:
    damaged = bytearray(file[: data.draw(st.integers(1, len(file)))])
    for _ in range(data.draw(st.integers(0, 5))):
        damaged[data.draw(st.integers(0, min(len(damaged), 64) - 1))] = data.draw(st.integers(0, 255))
    encoded = np.frombuffer(bytes(damaged), dtype=np.uint8)
    buffer, starts, stops = laid_out([bytes(damaged)])
    (height,), (width,) = plain_jpg_shapes(buffer, starts, stops)
    try:
        _, *closer = checked_shape(encoded)
    except Unusable as error:
        assert error.cause in CAUSES
        assert height * width == 0
    else:
        assert height * width == 0 or [height, width] == closer


# ------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize(("size", "channels"), [(12, 3), (12, 1), (7, 3), (20, 1), (20, 3)])
def test_pixels_are_those_of_the_other_decoder(size: int, channels: int) -> None:
    """`data.decode` reads image sets one by one; only 16-bit files are refused there."""
    names = [name for name in GOOD if name != "16-bit png"]
    images, failures = decode([GOOD[name] for name in names], size, channels)
    assert not failures
    assert images.shape == (len(names), channels, size, size) and images.dtype == torch.uint8
    for name, image in zip(names, images, strict=True):
        expected = decode_one(np.frombuffer(bytearray(GOOD[name]), dtype=np.uint8), size=size, channels=channels)
        assert torch.equal(image, expected), name


def test_16_bits_are_rounded_to_8() -> None:
    deep = np.random.default_rng(0).integers(0, 2**16, (12, 16), dtype=np.uint16)
    images, failures = decode([GOOD["16-bit png"]], 12, 1)
    assert not failures
    assert np.array_equal(images[0, 0].numpy(), np.round(deep[:, 2:14] / 257).astype(np.uint8))


def test_images_of_many_sizes_fall_into_their_places() -> None:
    shapes = [(12, 12), (12, 30), (30, 12), (12, 12), (12, 30), (40, 40), (300, 280), (13, 12)]
    files = [save(picture(*shape, seed=i), "JPEG", quality=95) for i, shape in enumerate(shapes)]
    images, failures = decode(files)
    assert not failures
    for image, file in zip(images, files, strict=True):
        assert torch.equal(image, decode_one(np.frombuffer(bytearray(file), dtype=np.uint8), size=12, channels=3))


def test_memory_is_channels_last() -> None:
    images, _ = decode([GOOD["jpg"]] * 3)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert not images.is_inference()


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_masked_with_their_cause(name: str) -> None:
    cause, data = BAD[name]
    images, failures = decode([GOOD["jpg"], data, GOOD["png"]])
    assert [(f.position, f.cause) for f in failures] == [(1, cause)], failures
    assert failures[0].detail
    assert not images[1].any() and images[0].any() and images[2].any()


def test_the_pixel_limit_is_checked_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(picture(20, 30), "JPEG")
    assert not decode([file], limit=600)[1]
    assert [f.cause for f in decode([file, claiming_jpg(65_000, 65_000)], limit=599)[1]] == ["too_many_pixels"] * 2
    assert "65000 x 65000" in decode([claiming_jpg(65_000, 65_000)])[1][0].detail


def test_the_decoder_s_own_words_are_kept() -> None:
    (failure,) = decode([BAD["half a jpg"][1]])[1]
    assert "truncated" in failure.detail and ".cpp" not in failure.detail


def test_nothing_is_nothing() -> None:
    images, failures = decode([])
    assert images.shape == (0, 3, 12, 12) and not failures
