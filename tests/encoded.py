"""Encoded image files of many kinds, good and bad, made with PIL."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def picture(height: int = 12, width: int = 16, seed: int = 0) -> Image.Image:
    """A smooth RGB image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def good_files(height: int = 12, width: int = 16) -> dict[str, bytes]:
    """Files that can be used, by what is special about them."""
    image = picture(height, width)
    deep = np.random.default_rng(0).integers(0, 2**16, (height, width), dtype=np.uint16)
    plain = save(image, "JPEG", quality=95)
    return {
        "jpg": plain,
        "grey jpg": save(image.convert("L"), "JPEG"),
        "progressive jpg": save(image, "JPEG", progressive=True),
        "jpg with comments": save(image, "JPEG", comment=b"\xff\xc0" * 500),
        "jpg with exif": save(image, "JPEG", exif=b"Exif\0\0" + bytes(3000)),
        "jpg with fill bytes": plain[:2] + b"\xff" * 5 + plain[2:],
        "jpg with many segments": plain[:2] + b"\xff\xfe\x00\x03x" * 100 + plain[2:],
        "png": save(image, "PNG"),
        "palette png": save(image.convert("P"), "PNG"),
        "png with alpha": save(image.convert("RGBA"), "PNG"),
        "grey png": save(image.convert("L"), "PNG"),
        "black and white png": save(image.convert("1"), "PNG"),
        "16-bit png": save(Image.fromarray(deep), "PNG"),
        "webp": save(image, "WEBP", quality=90),
        "lossless webp": save(image, "WEBP", lossless=True),
        "webp with alpha": save(image.convert("RGBA"), "WEBP", lossless=True),
        "webp with exif": save(image, "WEBP", lossless=True, exif=b"Exif\0\0" + bytes(100)),
    }


def bad_files() -> dict[str, tuple[str, bytes]]:
    """Cause and bytes of files that cannot be used."""
    image, other = picture(), picture(seed=1)
    plain, png, webp = save(image, "JPEG"), save(image, "PNG"), save(image, "WEBP", lossless=True)
    frames: dict[str, Any] = {"save_all": True, "append_images": [other]}
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "empty words": ("not_an_image", b"no image at all, but some words"),
        "one byte": ("not_an_image", b"\xff"),
        "zeros": ("not_an_image", bytes(4000)),
        "bmp": ("not_an_image", save(image, "BMP")),
        "gif": ("gif", save(image.convert("P"), "GIF")),
        "animated gif": ("gif", save(image.convert("P"), "GIF", save_all=True, append_images=[other.convert("P")])),
        "animated webp": ("animated", save(image, "WEBP", **frames)),
        "animated png": ("animated", save(image, "PNG", **frames)),
        "cmyk jpg": ("cmyk", save(image.convert("CMYK"), "JPEG")),
        "huge jpg": ("too_many_pixels", claiming_jpg(60_000, 60_000)),
        "huge png": ("too_many_pixels", claiming_png(2**20, 2**20)),
        "half a jpg": ("corrupt", plain[: len(plain) // 2]),
        "only a jpg's header": ("corrupt", plain[:20]),
        "a jpg's first bytes": ("corrupt", plain[:3]),
        "half a png": ("corrupt", png[: len(png) // 2]),
        "a png's first bytes": ("corrupt", png[:10]),
        "damaged png": ("corrupt", bytes(flipped)),
        "png without area": ("corrupt", claiming_png(0, 7)),
        "half a webp": ("corrupt", webp[: len(webp) // 2]),
        "a webp's first bytes": ("corrupt", webp[:14]),
    }


def claiming_jpg(height: int, width: int) -> bytes:
    """A small jpg whose header claims any size."""
    data = save(picture(), "JPEG")
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def claiming_png(height: int, width: int) -> bytes:
    """A small png whose header claims any size, with a right check sum."""
    data = save(picture(), "PNG")
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
