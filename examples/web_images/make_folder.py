"""A folder of images as somebody might collect them from the web: some are like the teacher's, most are not.

A stand-in for the images that you have. No download: the photographs are the two that come with scikit-learn, and the
digits are its training digits (those that the teacher has seen; yours will be other pictures of the same things), drawn
over pieces of photographs, turned to negatives or blurred. Nothing says what is in an image.

    runs/web-images/images/00000.jpg ... and runs/web-images/images/broken.jpg, which is no image
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.io import write_jpeg

from dfkd_dist.config import DatasetSpec
from dfkd_dist.data.datasets import load_image_set, to_image_space

FOLDER = Path("runs/web-images/images")
SIZE, DIGITS, PHOTOS = 32, 2500, 2500


def main() -> None:
    """Write the folder."""
    random = torch.Generator().manual_seed(0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    photos = [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]
    digits = training_digits()
    for i in range(DIGITS + PHOTOS):
        image_CHW = crop(photos, random)
        if i % 2 == 0:
            image_CHW = over(image_CHW, digits[int(torch.randint(len(digits), (1,), generator=random))], random)
        write_jpeg((image_CHW * 255).round().byte(), str(FOLDER / f"{i:05d}.jpg"), quality=90)
    (FOLDER / "broken.jpg").write_bytes(b"the download was cut")
    print(f"{DIGITS + PHOTOS:,} images and a broken one in {FOLDER}")


def training_digits() -> Tensor:
    """`[N, 1, 32, 32]` in [0, 1]: none of those that the student is tested on."""
    spec = DatasetSpec(kind="digits", size=SIZE, channels=1, val_fraction=0.0)
    images = load_image_set(spec, "train")
    return to_image_space(images.images(torch.arange(len(images))))


def crop(photos: list[Tensor], random: torch.Generator) -> Tensor:
    """A square piece of a photograph `[3, 32, 32]`."""
    photo = photos[int(torch.randint(len(photos), (1,), generator=random))]
    side = int(torch.randint(SIZE, 200, (1,), generator=random))
    top = int(torch.randint(photo.shape[1] - side, (1,), generator=random))
    left = int(torch.randint(photo.shape[2] - side, (1,), generator=random))
    piece = photo[None, :, top : top + side, left : left + side]
    return F.interpolate(piece, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)[0]


def over(image_CHW: Tensor, digit_1HW: Tensor, random: torch.Generator) -> Tensor:
    """A digit over a piece of a photograph: as it is, as its negative, faint, or blurred."""
    how, strength = torch.rand(2, generator=random).tolist()
    background = image_CHW * (0.6 * strength)
    if how < 0.25:
        return (image_CHW - digit_1HW).abs()
    if how < 0.5:
        digit_1HW = F.avg_pool2d(digit_1HW[None], 5, stride=1, padding=2)[0]
    return background * (1 - digit_1HW) + digit_1HW


if __name__ == "__main__":
    main()
