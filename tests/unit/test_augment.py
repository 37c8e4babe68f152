"""Augmentation: against naive formulas, and independence of the rest of the batch."""

import colorsys

import pytest
import torch
from torch.nn.functional import interpolate

from dfkd_dist.config import AugmentSpec
from dfkd_dist.data.augment import (
    RESIZED_CROP,
    _crops,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    augment,
    augment_labels,
    flip,
    num_uniforms,
    rotate,
    shift_crop,
)

FULL = AugmentSpec(
    rotation=25.0, crop_padding=3, flip=True, brightness=0.4, contrast=0.3, saturation=0.5, hue=0.1
)


def batch(
    count: int = 6, channels: int = 3, height: int = 9, width: int = 9, seed: int = 0, dtype=torch.float64
) -> torch.Tensor:
    """Random images in image space."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, height, width, generator=generator, dtype=dtype)


def uniforms(count: int, spec: AugmentSpec, seed: int = 1) -> torch.Tensor:
    """Random numbers for `augment`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, num_uniforms(spec), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "spec, expected",
    [
        (AugmentSpec(), 0),
        (AugmentSpec(rotation=1.0), 1),
        (AugmentSpec(crop_padding=4, flip=True), 3),
        (AugmentSpec(hue=0.1, contrast=0.2), 2),
        (FULL, 8),
    ],
)
def test_number_of_uniforms(spec, expected):
    assert num_uniforms(spec) == expected


def test_nothing_to_do_is_the_identity():
    images = batch()
    assert augment(images, torch.empty(6, 0), AugmentSpec()) is images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_does_not_depend_on_its_batch(channels, dtype):
    images, draws = batch(channels=channels, dtype=dtype), uniforms(6, FULL)
    whole = augment(images, draws, FULL)
    single = torch.cat([augment(images[i : i + 1], draws[i : i + 1], FULL) for i in range(6)])
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(whole, single, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        augment(images[order], draws[order], FULL), whole[order], rtol=0, atol=tolerance
    )
    assert whole.dtype == dtype and not torch.allclose(whole, images)


def test_crop_equals_indexing_of_the_padded_image():
    spec, images = AugmentSpec(crop_padding=2), batch(height=7, width=5)
    places = torch.tensor([[0, 4], [4, 0], [2, 2], [1, 3], [3, 1], [0, 0]])
    result = augment(images, (places + 0.5) / 5, spec)
    for i, (top, left) in enumerate(places.tolist()):
        padded = torch.nn.functional.pad(images[i], (2, 2, 2, 2))
        assert torch.equal(result[i], padded[:, top : top + 7, left : left + 5])


def test_crop_further_than_the_image_is_black():
    result = shift_crop(batch(2), torch.tensor([20, -20]), torch.tensor([0, 0]))
    assert torch.equal(result, torch.zeros_like(result))


def test_every_place_of_a_crop_is_as_likely_and_none_lies_outside():
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    draws = torch.cat([torch.arange(900) / 900, below_one.view(1)])
    spec = AugmentSpec(crop_padding=4)
    ramp = torch.arange(1.0, 20.0).view(1, 1, 1, -1).expand(901, 1, 1, -1)
    # Row draws of one half leave the only row in place.
    result = augment(ramp, torch.stack([torch.full((901,), 0.5), draws], dim=1), spec)
    shifts = result[:, 0, 0, 9] - 10
    assert torch.bincount((shifts[:900] + 4).long()).tolist() == [100] * 9
    assert shifts[900] == 4


def test_flip_mirrors_half_of_the_draws():
    images = batch(4)
    result = augment(images, torch.tensor([[0.0], [0.49], [0.5], [0.99]]), AugmentSpec(flip=True))
    assert torch.equal(result[:2], images[:2].flip(3)) and torch.equal(result[2:], images[2:])
    assert torch.equal(flip(images, torch.tensor([True] * 4)), images.flip(-1))


@pytest.mark.parametrize("turns, draw", [(0, 0.5), (1, 0.75), (-1, 0.25), (2, 0.0)])
@pytest.mark.parametrize("size", [8, 9])
def test_quarter_rotations_equal_rot90(turns, draw, size):
    images = batch(2, height=size, width=size)
    result = augment(images, torch.full((2, 1), draw, dtype=torch.float64), AugmentSpec(rotation=180.0))
    torch.testing.assert_close(result, torch.rot90(images, turns, (2, 3)), rtol=0, atol=1e-12)


def test_rotation_keeps_the_pixels_of_a_rectangle_square():
    images = torch.zeros(1, 1, 5, 9)
    images[0, 0, 2, 2:7] = 1
    result = rotate(images, torch.tensor([90.0]))
    expected = torch.zeros_like(images)
    expected[0, 0, :, 4] = 1
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def naive_rotation(image: torch.Tensor, degrees: float) -> torch.Tensor:
    """Bilinear rotation of `[C, H, W]` about the centre in pixel coordinates, one pixel at a time."""
    import math

    _, height, width = image.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    out = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            dx, dy = x - (width - 1) / 2, y - (height - 1) / 2
            source_x, source_y = cos * dx - sin * dy + (width - 1) / 2, sin * dx + cos * dy + (height - 1) / 2
            for row in (math.floor(source_y), math.floor(source_y) + 1):
                for column in (math.floor(source_x), math.floor(source_x) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        weight = (1 - abs(source_y - row)) * (1 - abs(source_x - column))
                        out[:, y, x] += weight * image[:, row, column]
    return out


@pytest.mark.parametrize("degrees", [-31.0, 7.5, 60.0])
def test_rotation_equals_a_loop_over_pixels(degrees):
    images = batch(1, height=6, width=8)
    result = rotate(images, torch.tensor([degrees], dtype=torch.float64))
    torch.testing.assert_close(result[0], naive_rotation(images[0], degrees), rtol=0, atol=1e-12)


def test_brightness_contrast_and_saturation_equal_their_formulas():
    images, factor = batch(2), torch.tensor([0.6, 1.7], dtype=torch.float64)
    for i, f in enumerate(factor.tolist()):
        red, green, blue = images[i]
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        torch.testing.assert_close(adjust_brightness(images, factor)[i], f * images[i])
        mean = grey.mean()
        torch.testing.assert_close(adjust_contrast(images, factor)[i], mean + f * (images[i] - mean))
        torch.testing.assert_close(adjust_saturation(images, factor)[i], grey + f * (images[i] - grey))


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.0, 0.05, 1 / 3, 0.5])
def test_hue_equals_the_standard_library(turn):
    images = batch(2)
    images[0, :, 0, 0] = 0.5
    images[0, :, 0, 1] = 0
    images[0, :, 0, 2] = torch.tensor([1.0, 0.0, 1.0])
    result = adjust_hue(images, torch.full((2,), turn))
    for y in range(9):
        for x in range(9):
            hue, saturation, value = colorsys.rgb_to_hsv(*images[0, :, y, x].tolist())
            expected = colorsys.hsv_to_rgb((hue + turn) % 1.0, saturation, value)
            assert result[0, :, y, x].tolist() == pytest.approx(expected, abs=1e-6)


def test_hue_is_defined_outside_image_space():
    images = batch(2) * 4 - 2
    third = torch.full((2,), 1 / 3, dtype=torch.float64)
    # A third of a turn moves red to green, green to blue and blue to red.
    torch.testing.assert_close(adjust_hue(images, third), images[:, [2, 0, 1]])
    torch.testing.assert_close(adjust_hue(images - 5, third), adjust_hue(images, third) - 5)


def test_colour_factors_span_their_range_and_the_order_is_fixed():
    images = batch(1)
    spec = AugmentSpec(brightness=0.4, contrast=0.2, saturation=0.3, hue=0.1)
    low = augment(images, torch.zeros(1, 4, dtype=torch.float64), spec)
    expected = adjust_brightness(images, torch.tensor([0.6], dtype=torch.float64))
    expected = adjust_contrast(expected, torch.tensor([0.8], dtype=torch.float64))
    expected = adjust_saturation(expected, torch.tensor([0.7], dtype=torch.float64))
    expected = adjust_hue(expected, torch.tensor([-0.1], dtype=torch.float64))
    torch.testing.assert_close(low, expected)
    middle = augment(images, torch.full((1, 4), 0.5, dtype=torch.float64), spec)
    torch.testing.assert_close(middle, images)


def test_grey_images_skip_saturation_and_hue():
    images = batch(channels=1)
    spec = AugmentSpec(brightness=0.4, saturation=0.5, hue=0.2)
    draws = uniforms(6, spec)
    expected = augment(images, draws[:, :1], AugmentSpec(brightness=0.4))
    assert torch.equal(augment(images, draws, spec), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_are_right(channels):
    images = batch(2, channels, 5, 6).requires_grad_()
    draws = uniforms(2, FULL)
    assert torch.autograd.gradcheck(lambda x: augment(x, draws, FULL), images)


def test_gradients_of_grey_pixels_are_finite():
    images = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    augment(images, uniforms(2, FULL).float(), FULL).sum().backward()
    assert images.grad is not None and bool(images.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(dtype):
    images, draws = batch(), uniforms(6, FULL)
    result = augment(images.to(dtype), draws, FULL)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), augment(images, draws, FULL), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "images, width, words",
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), 8, "floating point.*uint8"),
        (torch.zeros(3, 4, 4), 8, "floating point"),
        (torch.zeros(2, 3, 4, 4), 7, r"uniforms_NP.*\(2, 8\).*\(2, 7\)"),
        (torch.zeros(2, 2, 4, 4), 8, "1 or 3 channels, found 2"),
    ],
)
def test_wrong_input_is_named(images, width, words):
    with pytest.raises(ValueError, match=words):
        augment(images, torch.zeros(2, width), FULL)


# ---------------------------------------------------------------------------------------------- resized crops

RESIZED = AugmentSpec(resized_crop=0.25)


def cropped(images, draws, spec=RESIZED):
    """What the crops should be: cut out and interpolated image by image."""
    places = _crops(iter(draws.unbind(1)), spec.resized_crop, images).tolist()
    parts = [images[i : i + 1, :, y : y + h, x : x + w] for i, (y, x, h, w) in enumerate(places)]
    side = images.shape[-2:]
    return torch.cat([interpolate(part, size=side, mode="bilinear", align_corners=False) for part in parts])


def test_a_resized_crop_equals_interpolation_of_what_is_cut_out():
    images = batch(40, height=9, width=12)
    draws = uniforms(40, RESIZED)
    assert num_uniforms(RESIZED) == RESIZED_CROP
    torch.testing.assert_close(augment(images, draws, RESIZED), cropped(images, draws))


def test_a_resized_crop_lies_inside_and_has_the_area_and_ratio_asked_for():
    images, draws = torch.zeros(4000, 1, 32, 32), uniforms(4000, RESIZED)
    top, left, height, width = _crops(iter(draws.unbind(1)), 0.25, images).unbind(1)
    assert min(int(top.min()), int(left.min())) == 0 and int((top + height).max()) == 32
    assert int((left + width).max()) == 32 and int(height.min()) >= 1
    area, ratio = (height * width) / 32**2, width / height
    # Whole pixels round both; a crop that fits nowhere is the whole image.
    assert 0.23 < float(area.min()) and float(area.max()) <= 1.0
    assert float(area.median()) == pytest.approx(0.6, abs=0.05)
    assert 0.7 < float(ratio.min()) < 0.78 and 1.28 < float(ratio.max()) < 1.43
    assert float(ratio.log().mean()) == pytest.approx(0.0, abs=0.01)
    whole = torch.full((2, num_uniforms(RESIZED)), 0.999, dtype=torch.float64)  # every attempt too wide
    assert _crops(iter(whole.unbind(1)), 0.25, images[:2]).tolist() == [[0, 0, 32, 32]] * 2


def test_resized_crops_of_labels_move_with_their_images():
    labels = torch.arange(81).view(1, 9, 9).repeat(5, 1, 1)
    spec = AugmentSpec(resized_crop=0.5, flip=True)
    draws = uniforms(5, spec)
    images = augment(labels.double().unsqueeze(1) / 100, draws, spec).squeeze(1)
    moved = augment_labels(labels, draws, spec)
    assert moved.dtype == torch.int64 and set(moved.unique().tolist()) <= set(range(81))
    assert float((moved / 100 - images).abs().max()) <= 0.06  # half a row and half a column off at most
    assert not torch.equal(moved, labels)


def test_gradients_of_resized_crops_are_right():
    spec = AugmentSpec(resized_crop=0.3, crop_padding=1, flip=True)
    images, draws = batch(2, 3, 5, 6).requires_grad_(), uniforms(2, spec)
    assert torch.autograd.gradcheck(lambda x: augment(x, draws, spec), images)
