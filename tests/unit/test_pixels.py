"""Pixel conversions, and encoded bytes that are measured before they are decoded."""

import struct

import numpy as np
import pytest
import torch
from torchvision.io import encode_jpeg, encode_png

from dfkd_dist.data.datasets import to_image_space, to_uint8
from dfkd_dist.data.decode import PIXEL_LIMIT, decode_one, image_shape
from dfkd_dist.data.pixels import convert_images
from tests.image_data import pictures


def test_uint8_survives_the_trip_through_image_space():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for dtype in (torch.float32, torch.float64):
        images = to_image_space(levels, dtype)
        assert images.dtype == dtype and images.min() == 0 and images.max() == 1
        assert torch.equal(to_uint8(images), levels)


def test_to_uint8_clamps_and_rounds():
    values = torch.tensor([-3.0, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 7.0, float("inf")])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255, 255]
    assert to_uint8(torch.tensor([0.5, 2.0], dtype=torch.bfloat16)).tolist() == [128, 255]


def test_conversions_refuse_other_dtypes():
    with pytest.raises(ValueError, match="uint8.*float32"):
        to_image_space(torch.zeros(1))
    with pytest.raises(ValueError, match="floating point.*uint8"):
        to_uint8(torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\[N, 1 or 3, H, W\].*\(2, 4, 8, 8\)"):
        convert_images(torch.zeros(2, 4, 8, 8, dtype=torch.uint8), size=8, channels=1)


def test_grey_is_the_luma_and_rgb_repeats_grey():
    colours = torch.tensor(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9], [255, 255, 255]], dtype=torch.uint8
    )
    images = colours.view(5, 3, 1, 1).expand(5, 3, 8, 8)
    grey = convert_images(images, size=8, channels=1)
    assert grey.shape == (5, 1, 8, 8) and grey[:, 0, 0, 0].tolist() == [76, 150, 29, 9, 255]
    again = convert_images(grey, size=4, channels=3)
    assert again.shape == (5, 3, 4, 4)
    assert torch.equal(again, grey[:, :, :4, :4].expand(-1, 3, -1, -1))


def test_resizing_crops_the_middle_of_the_longer_side():
    ramp = torch.arange(8, dtype=torch.uint8).view(1, 1, 1, 8).expand(1, 1, 4, 8)
    assert convert_images(ramp, size=4, channels=1)[0, 0, 0].tolist() == [2, 3, 4, 5]
    assert convert_images(ramp.transpose(2, 3), size=4, channels=1)[0, 0, :, 0].tolist() == [2, 3, 4, 5]


def test_resizing_is_antialiased():
    noise = torch.randint(
        0, 256, (1, 1, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    small = convert_images(noise, size=8, channels=1).float()
    # Means of 64 pixels or so scatter by 74 / 8; samples of 4 would scatter by 74 / 2.
    assert small.std() < 15 and abs(small.mean() - 127.5) < 5


def test_many_images_convert_like_single_ones(monkeypatch):
    monkeypatch.setattr("dfkd_dist.data.pixels.CHUNK", 3)
    images = pictures(8, height=11, width=9)
    whole = convert_images(images, size=6, channels=1)
    single = torch.cat([convert_images(image[None], size=6, channels=1) for image in images])
    assert torch.equal(whole, single)


@pytest.mark.parametrize("height, width", [(3, 5), (40, 17)])
def test_headers_tell_the_shape(height, width):
    image = pictures(1, height=height, width=width)[0]
    for encoded in (encode_jpeg(image), encode_png(image)):
        assert image_shape(encoded.numpy()) == (height, width)


def test_headers_are_found_behind_other_segments():
    encoded = encode_jpeg(pictures(1)[0]).numpy().tobytes()
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 6) + b"\xff\xc0abcd"
    data = encoded[:2] + comment + b"\xff\xff" + encoded[2:]
    assert image_shape(np.frombuffer(data, np.uint8)) == (8, 8)


@pytest.mark.parametrize("format_", ["png", "jpg"])
def test_a_header_that_claims_too_many_pixels_is_not_decoded(format_):
    image = pictures(1)[0]
    encoded = (encode_png(image) if format_ == "png" else encode_jpeg(image)).numpy().copy()
    huge = struct.pack(">II", 2**14, 2**15) if format_ == "png" else struct.pack(">HH", 2**15, 2**14)
    original = struct.pack(">II", 8, 8) if format_ == "png" else struct.pack(">HH", 8, 8)
    data = encoded.tobytes().replace(original, huge, 1)
    assert data != encoded.tobytes()
    with pytest.raises(ValueError, match=f"32768 x 16384 pixels, allowed 1 to {PIXEL_LIMIT}"):
        decode_one(np.frombuffer(data, np.uint8).copy(), size=8, channels=3)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"GIF89a" + bytes(20), b"\xff\xd8" + bytes(40), b"\xff\xd8\xff\xe0"]
)
def test_other_bytes_are_refused(data):
    with pytest.raises(ValueError, match="neither a jpg nor|without a frame"):
        image_shape(np.frombuffer(data, np.uint8))
