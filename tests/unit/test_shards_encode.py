"""What is kept byte for byte, what is encoded anew; and webp, which torchvision reads but does not write."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_image, encode_jpeg, encode_png

from dfkd_dist.data.decode import decode_one, image_format, image_shape
from dfkd_dist.data.pixels import convert_images, to_square
from dfkd_dist.data.shards.encode import Encoding, decode_native, encode
from tests.image_data import pictures


def file_of(kind: str, *, height: int = 12, width: int = 20, mode: str = "RGB") -> bytes:
    """An image file of one kind, written by another library than the one that reads it."""
    channels = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = torch.cat([pictures(1, 1, height, width, seed=c)[0] for c in range(channels)]).permute(1, 2, 0)
    file = io.BytesIO()
    Image.frombytes(mode, (width, height), pixels.contiguous().numpy().tobytes()).save(
        file, {"jpg": "jpeg"}.get(kind, kind), lossless=mode == "RGB"
    )
    return file.getvalue()


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(data), dtype=np.uint8)


@pytest.mark.parametrize(("kind", "mode"), [("jpg", "RGB"), ("png", "RGB"), ("webp", "RGB"), ("webp", "RGBA")])
def test_formats_and_shapes_are_read_from_headers(kind: str, mode: str) -> None:
    for height, width in ((12, 20), (1, 7), (300, 2)):
        data = file_of(kind, height=height, width=width, mode=mode)
        assert image_format(data) == kind and image_shape(array(data)) == (height, width)
        assert encode(data, Encoding()) == (kind, data)


def test_lossy_webp_headers() -> None:
    file = io.BytesIO()
    Image.fromarray(pictures(1, 3, 33, 47)[0].permute(1, 2, 0).numpy()).save(file, "webp", quality=50)
    assert file.getvalue()[12:16] == b"VP8 " and image_shape(array(file.getvalue())) == (33, 47)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_webp_decodes_to_a_square_in_both_colours(mode: str) -> None:
    data = file_of("webp", mode=mode)
    with Image.open(io.BytesIO(data)) as image:
        pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)[None]
    for channels in (1, 3):
        expected = convert_images(pixels, size=8, channels=channels)[0]
        found = decode_one(array(data), size=8, channels=channels)
        assert (found.int() - expected.int()).abs().max() <= (0 if mode == "RGB" else 4)


def test_pixels_become_png_and_stay_what_they_are() -> None:
    for channels in (1, 3):
        image = pictures(1, channels, 9, 14)[0]
        suffix, data = encode(image, Encoding())
        assert suffix == "png" and torch.equal(decode_native(data), image)
        suffix, data = encode(image, Encoding(size=4))
        assert suffix == "png" and torch.equal(decode_native(data), to_square(image[None], 4)[0])


@pytest.mark.parametrize(
    ("mode", "kind", "channels"),
    [("L", "jpg", 1), ("CMYK", "jpg", 3), ("LA", "png", 1), ("RGBA", "png", 3), ("L", "png", 1), ("RGBA", "webp", 3)],
)
def test_resized_files_are_jpg_and_grey_stays_grey(mode: str, kind: str, channels: int) -> None:
    data = file_of(kind, mode=mode)
    assert encode(data, Encoding()) == (kind, data)
    suffix, small = encode(data, Encoding(size=8))
    assert suffix == "jpg" and decode_native(small).shape == (channels, 8, 8)
    assert encode(data, Encoding(size=8))[1] == small
    assert len(encode(data, Encoding(size=8, quality=20))[1]) < len(small)


def test_a_resized_jpg_looks_like_its_original() -> None:
    image = pictures(1, 3, 40, 60)[0]
    data = encode_jpeg(image, quality=95).numpy().tobytes()
    exact = to_square(image[None], 16)[0]
    for how, tolerance in ((Encoding(size=16, format="png"), 6), (Encoding(size=16), 12)):
        assert (decode_native(encode(data, how)[1]).int() - exact.int()).abs().max() <= tolerance


def test_what_already_fits_keeps_its_bytes() -> None:
    image = pictures(1, 3, 16, 16)[0]
    jpg, png = encode_jpeg(image).numpy().tobytes(), encode_png(image).numpy().tobytes()
    for data, kind in ((jpg, "jpg"), (png, "png")):
        assert encode(data, Encoding(size=16)) == (kind, data)
        assert encode(data, Encoding(size=16, format=kind)) == (kind, data)  # type: ignore[arg-type]
    assert torch.equal(decode_native(encode(jpg, Encoding(format="png"))[1]), decode_native(jpg))
    assert encode(png, Encoding(format="jpg"))[0] == "jpg"


def test_what_is_no_image_is_refused() -> None:
    png = file_of("png")
    huge = png[:16] + (2**20).to_bytes(4, "big") * 2 + png[24:]
    empty = png[:16] + bytes(8) + png[24:]
    for data, said in [
        (b"", "neither a jpg"),
        (b"GIF89a" + bytes(40), "neither a jpg"),
        (png[:20], "without a header"),
        (file_of("webp")[:25], "without a header"),
        (b"RIFF" + bytes(4) + b"WEBPABCD" + bytes(20), "ABCD"),
        (huge, "1048576 x 1048576 pixels"),
        (empty, "0 x 0 pixels"),
    ]:
        with pytest.raises(ValueError, match=said):
            encode(data, Encoding())
    for data in (png[:-30], file_of("webp")[:-10]):
        with pytest.raises((ValueError, RuntimeError)):
            decode_native(data)
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(file, "png")
    for act in (decode_native, lambda data: encode(data, Encoding())):
        with pytest.raises(ValueError, match="16 bits a channel, allowed are 8"):
            act(file.getvalue())


def test_options_out_of_range_are_refused() -> None:
    for keys in ({"size": 0}, {"quality": 101}, {"format": "gif"}):
        with pytest.raises(ValueError, match=f"{next(iter(keys))}: found .*allowed"):
            Encoding(**keys)  # type: ignore[arg-type]


def test_cut_jpgs_are_noticed_where_the_decoder_notices_them() -> None:
    data = file_of("jpg", height=64, width=64)
    decode_image(torch.from_numpy(array(data)))
    with pytest.raises((ValueError, RuntimeError)):
        decode_native(data[: len(data) // 2])
