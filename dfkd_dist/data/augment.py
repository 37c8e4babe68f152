"""Per-sample augmentation of batches in image space, on the device that holds them.

Every function is a pure function of the images and of one number per sample, so that sample 17 is augmented
alike whatever else is in its batch and on however many ranks the batch is spread. Geometry comes first, then
colour, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from dfkd_dist.config import AugmentSpec
from dfkd_dist.data.mask_set import IGNORE
from dfkd_dist.models.network import to_luma

ATTEMPTS = 10
"""A resized crop that does not fit in the image is drawn again, so often; then it is the whole image."""
RATIOS = (3 / 4, 4 / 3)
"""Of a resized crop's width to its height."""
RESIZED_CROP = 2 * ATTEMPTS + 2
"""Uniforms of a resized crop: area and ratio of each attempt, and its place."""


def num_uniforms(spec: AugmentSpec) -> int:
    """How many uniforms `augment` takes for each sample.

    One for each active operation, but two for the crop and `RESIZED_CROP` for the resized one.
    """
    single = (spec.rotation, spec.flip, spec.brightness, spec.contrast, spec.saturation, spec.hue)
    crops = (2 if spec.crop_padding else 0) + (RESIZED_CROP if spec.resized_crop else 0)
    return sum(1 for value in single if value) + crops


def augment(images_NCHW: Tensor, uniforms_NP: Tensor, spec: AugmentSpec) -> Tensor:
    """Augment float images `[N, C, H, W]` with uniforms `[N, num_uniforms(spec)]` in [0, 1); differentiable.

    In order, each if active: rotation, resized crop, crop, flip, brightness, contrast, saturation, hue. Images with one
    channel skip saturation and hue (their uniforms are drawn all the same, so the columns mean the same for
    grey and RGB). Colour is not clamped. A spec that is all zero returns the images themselves. Raises
    ValueError for a wrong shape, integer images, or colour on something that is neither grey nor RGB.
    """
    _check(images_NCHW, uniforms_NP, spec)
    columns = iter(uniforms_NP.unbind(1))
    if spec.rotation:
        images_NCHW = rotate(images_NCHW, _spread(next(columns), spec.rotation))
    if spec.resized_crop:
        images_NCHW = resized_crop(images_NCHW, _crops(columns, spec.resized_crop, images_NCHW))
    if spec.crop_padding:
        padding = spec.crop_padding
        down_N, right_N = _offset(next(columns), padding), _offset(next(columns), padding)
        images_NCHW = shift_crop(images_NCHW, down_N, right_N)
    if spec.flip:
        images_NCHW = flip(images_NCHW, next(columns) < 0.5)
    if spec.brightness:
        images_NCHW = adjust_brightness(images_NCHW, 1 + _spread(next(columns), spec.brightness))
    if spec.contrast:
        images_NCHW = adjust_contrast(images_NCHW, 1 + _spread(next(columns), spec.contrast))
    if images_NCHW.shape[1] == 1:
        return images_NCHW
    if spec.saturation:
        images_NCHW = adjust_saturation(images_NCHW, 1 + _spread(next(columns), spec.saturation))
    if spec.hue:
        images_NCHW = adjust_hue(images_NCHW, _spread(next(columns), spec.hue))
    return images_NCHW


def augment_labels(labels_NHW: Tensor, uniforms_NP: Tensor, spec: AugmentSpec) -> Tensor:
    """Maps of labels `[N, H, W]` moved as `augment` moves their images with the same uniforms; colour leaves them.

    A turned pixel has the label that is nearest to where it comes from; from outside comes `IGNORE`, since the zeros
    there belong to no class.
    """
    # Moved as images whose zeros mean "from outside".
    moved_N1HW = (labels_NHW + 1).unsqueeze(1)
    columns = iter(uniforms_NP.unbind(1))
    if spec.rotation:
        moved_N1HW = rotate(moved_N1HW.float(), _spread(next(columns), spec.rotation), mode="nearest").to(labels_NHW)
    if spec.resized_crop:
        crops_N4 = _crops(columns, spec.resized_crop, moved_N1HW)
        moved_N1HW = resized_crop(moved_N1HW.float(), crops_N4, mode="nearest").to(labels_NHW)
    if spec.crop_padding:
        padding = spec.crop_padding
        moved_N1HW = shift_crop(moved_N1HW, _offset(next(columns), padding), _offset(next(columns), padding))
    if spec.flip:
        moved_N1HW = flip(moved_N1HW, next(columns) < 0.5)
    return torch.where(moved_N1HW == 0, IGNORE, moved_N1HW - 1).squeeze(1)


def windows(images_NCHW: Tensor, uniforms_N2: Tensor, size: int) -> Tensor:
    """A square of `size` pixels of each image, its place drawn by uniforms in [0, 1): `[N, C, size, size]`; exact."""
    for dim, uniforms_N in ((2, uniforms_N2[:, 0]), (3, uniforms_N2[:, 1])):
        places = images_NCHW.shape[dim] - size + 1
        start_N = (uniforms_N * places).floor().long().clamp(max=places - 1)
        shape = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
        index = (start_N[:, None] + torch.arange(size, device=images_NCHW.device)).view(shape)
        sides = list(images_NCHW.shape)
        sides[dim] = size
        images_NCHW = images_NCHW.gather(dim, index.expand(sides))
    return images_NCHW


def rotate(images_NCHW: Tensor, degrees_N: Tensor, mode: str = "bilinear") -> Tensor:
    """Turn each image about its centre, counter-clockwise as displayed; zeros from outside."""
    height, width = images_NCHW.shape[-2:]
    # Half precision cannot hold pixel coordinates: sampled in float32, returned in the input's dtype.
    wide = images_NCHW if images_NCHW.dtype == torch.float64 else images_NCHW.float()
    angle_N11 = (degrees_N.to(wide.dtype) * (math.pi / 180)).view(-1, 1, 1)
    cos, sin = angle_N11.cos(), angle_N11.sin()
    xs_1W = _pixel_centres(width, wide).view(1, 1, -1)
    ys_H1 = _pixel_centres(height, wide).view(1, -1, 1)
    # Coordinates run from -1 to 1 on both axes; the ratio keeps a rectangle's pixels square while it turns.
    grid_x = cos * xs_1W - sin * ys_H1 * (height / width)
    grid_y = sin * xs_1W * (width / height) + cos * ys_H1
    grid_NHW2 = torch.stack([grid_x, grid_y], dim=-1)
    turned = F.grid_sample(wide, grid_NHW2, mode=mode, padding_mode="zeros", align_corners=False)
    return turned.to(images_NCHW.dtype)


def resized_crop(images_NCHW: Tensor, crops_N4: Tensor, mode: str = "bilinear") -> Tensor:
    """A rectangle of each image brought to the image's size: what lies outside of it has no influence.

    Args:
        images_NCHW: floating point.
        crops_N4: top, left, height and width in pixels, int64.
        mode: `bilinear` or `nearest`.
    """
    height, width = images_NCHW.shape[-2:]
    wide = images_NCHW if images_NCHW.dtype == torch.float64 else images_NCHW.float()
    top_N1, left_N1, tall_N1, broad_N1 = crops_N4.to(wide.dtype).split(1, dim=1)
    ys_NH = _inside(_pixel_centres(height, wide), top_N1, tall_N1, height)
    xs_NW = _inside(_pixel_centres(width, wide), left_N1, broad_N1, width)
    shape = (len(images_NCHW), height, width)
    grid_NHW2 = torch.stack([xs_NW[:, None, :].expand(shape), ys_NH[:, :, None].expand(shape)], dim=-1)
    cropped = F.grid_sample(wide, grid_NHW2, mode=mode, padding_mode="border", align_corners=False)
    return cropped.to(images_NCHW.dtype)


def shift_crop(images_NCHW: Tensor, down_N: Tensor, right_N: Tensor) -> Tensor:
    """Output pixel (y, x) is input pixel (y + down, x + right), zero outside: a crop after padding; exact."""
    return _shift(_shift(images_NCHW, down_N, dim=2), right_N, dim=3)


def flip(images_NCHW: Tensor, mask_N: Tensor) -> Tensor:
    """Mirror the images where the mask is true, left to right; exact."""
    return torch.where(mask_N.view(-1, 1, 1, 1), images_NCHW.flip(3), images_NCHW)


def adjust_brightness(images_NCHW: Tensor, factor_N: Tensor) -> Tensor:
    """factor x image."""
    return images_NCHW * _per_sample(factor_N, images_NCHW)


def adjust_contrast(images_NCHW: Tensor, factor_N: Tensor) -> Tensor:
    """mean + factor x (image - mean), where mean is the image's own mean grey level."""
    mean_N111 = _grey(images_NCHW).mean(dim=(1, 2, 3), keepdim=True)
    return mean_N111 + _per_sample(factor_N, images_NCHW) * (images_NCHW - mean_N111)


def adjust_saturation(images_NCHW: Tensor, factor_N: Tensor) -> Tensor:
    """grey + factor x (image - grey), where grey is each pixel's luma; RGB only."""
    grey_N1HW = _grey(images_NCHW)
    return grey_N1HW + _per_sample(factor_N, images_NCHW) * (images_NCHW - grey_N1HW)


def adjust_hue(images_NCHW: Tensor, turns_N: Tensor) -> Tensor:
    """Turn the hue of RGB images by a fraction of a full turn in HSV.

    Each pixel keeps its largest and smallest channel. Written with the chroma instead of the saturation
    (chroma / largest), which is the same on [0, 1] and stays defined outside it.
    """
    red, green, blue = images_NCHW.unbind(1)
    high, low = images_NCHW.amax(dim=1), images_NCHW.amin(dim=1)
    chroma = high - low
    # A grey pixel has no hue: divisor 1 keeps value and gradient finite, and chroma 0 removes it below.
    divisor = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    from_green = torch.where(green == high, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    sixths = torch.where(red == high, (green - blue) / divisor, from_green)
    turned = sixths + 6 * turns_N.to(images_NCHW.dtype).view(-1, 1, 1)
    levels_N3HW = torch.stack([_hexagon(turned + offset) for offset in (0, 4, 2)], dim=1)
    return low.unsqueeze(1) + chroma.unsqueeze(1) * levels_N3HW


def _hexagon(sixths: Tensor) -> Tensor:
    """A channel's level on the colour hexagon: 1 up to a sixth from its own hue, 0 from two sixths on."""
    return ((torch.remainder(sixths, 6) - 3).abs() - 1).clamp(0, 1)


def _grey(images_NCHW: Tensor) -> Tensor:
    """Luma `[N, 1, H, W]`; grey images are their own."""
    if images_NCHW.shape[1] == 1:
        return images_NCHW
    return to_luma(images_NCHW)


def _shift(images_NCHW: Tensor, by_N: Tensor, dim: int) -> Tensor:
    length = images_NCHW.shape[dim]
    source = torch.arange(length, device=images_NCHW.device) + by_N.view(-1, 1)
    shape = (len(by_N), 1, length, 1) if dim == 2 else (len(by_N), 1, 1, length)
    inside = ((source >= 0) & (source < length)).view(shape)
    index = source.clamp(0, length - 1).view(shape).expand_as(images_NCHW)
    return torch.where(inside, images_NCHW.gather(dim, index), 0)


def _inside(places: Tensor, start_N1: Tensor, length_N1: Tensor, side: int) -> Tensor:
    """Places in [-1, 1] of a rectangle's side to places of the image's, kept between the rectangle's pixel centres."""
    pixels_NS = start_N1 + (places + 1) / 2 * length_N1 - 0.5
    kept_NS = torch.minimum(torch.maximum(pixels_NS, start_N1), start_N1 + length_N1 - 1)
    return (2 * kept_NS + 1) / side - 1


def _crops(columns: Iterator[Tensor], smallest: float, images_NCHW: Tensor) -> Tensor:
    """Top, left, height and width of each image's crop, int64 `[N, 4]`: the first attempt that fits (as torchvision's).

    Area uniform from `smallest` to all of the image's, ratio uniform in its logarithm, whole pixels.
    """
    height, width = images_NCHW.shape[-2:]
    drawn = [next(columns).double() for _ in range(RESIZED_CROP)]
    low, high = (math.log(ratio) for ratio in RATIOS)
    tall_N = torch.full_like(drawn[0], height)
    broad_N = torch.full_like(drawn[0], width)
    for u_N, v_N in reversed(list(zip(drawn[0:-2:2], drawn[1:-2:2], strict=True))):
        area_N = (smallest + (1 - smallest) * u_N) * (height * width)
        ratio_N = (low + (high - low) * v_N).exp()
        h_N, w_N = (area_N / ratio_N).sqrt().round(), (area_N * ratio_N).sqrt().round()
        fits_N = (h_N >= 1) & (h_N <= height) & (w_N >= 1) & (w_N <= width)
        tall_N, broad_N = torch.where(fits_N, h_N, tall_N), torch.where(fits_N, w_N, broad_N)
    top_N = (drawn[-2] * (height - tall_N + 1)).floor().minimum(height - tall_N)
    left_N = (drawn[-1] * (width - broad_N + 1)).floor().minimum(width - broad_N)
    return torch.stack([top_N, left_N, tall_N, broad_N], dim=1).long()


def _pixel_centres(length: int, like: Tensor) -> Tensor:
    return (2 * torch.arange(length, device=like.device, dtype=like.dtype) + 1) / length - 1


def _per_sample(values_N: Tensor, images_NCHW: Tensor) -> Tensor:
    return values_N.to(images_NCHW.dtype).view(-1, 1, 1, 1)


def _spread(uniforms_N: Tensor, largest: float) -> Tensor:
    """Uniforms in [0, 1) to [-largest, largest)."""
    return (2 * uniforms_N - 1) * largest


def _offset(uniforms_N: Tensor, padding: int) -> Tensor:
    """Uniforms in [0, 1) to whole numbers -padding .. padding; clamped, as a product may round up."""
    places = 2 * padding + 1
    return (uniforms_N * places).floor().long().clamp(max=places - 1) - padding


def _check(images_NCHW: Tensor, uniforms_NP: Tensor, spec: AugmentSpec) -> None:
    if images_NCHW.ndim != 4 or not images_NCHW.is_floating_point():
        found = f"{images_NCHW.dtype} {tuple(images_NCHW.shape)}"
        raise ValueError(f"images_NCHW: expected floating point [N, C, H, W], found {found}")
    expected = (len(images_NCHW), num_uniforms(spec))
    if tuple(uniforms_NP.shape) != expected:
        raise ValueError(f"uniforms_NP: expected shape {expected} for this spec, found {tuple(uniforms_NP.shape)}")
    colour = spec.brightness or spec.contrast or spec.saturation or spec.hue
    if colour and images_NCHW.shape[1] not in (1, 3):
        raise ValueError(f"images_NCHW: colour augmentation takes 1 or 3 channels, found {images_NCHW.shape[1]}")
