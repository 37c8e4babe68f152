"""Patch discriminators: each score depends on exactly the L x L pixels that the formula says, and on no others."""

from __future__ import annotations

import pytest
import torch

from dfkd_dist.models.discriminator import (
    LAYERS,
    Field,
    Layer,
    PatchDiscriminator,
    map_side,
    patch_origin,
    receptive_field,
    whole_image,
)
from dfkd_dist.parallel.batchnorm import GroupBatchNorm, reading_only, synchronise
from dfkd_dist.parallel.group import ALONE


def _make(field: Field, size: int, *, width: int = 4, stride: int = 1, channels: int = 3) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(channels, field, width, stride, size).double()


@pytest.mark.parametrize("field", LAYERS)
def test_the_layer_sets_have_the_field_they_are_named_after(field: int) -> None:
    assert receptive_field(LAYERS[field]) == field


def test_the_formula_by_hand() -> None:
    assert receptive_field([]) == 1
    # DCGAN-like: 1 + 3 + 2 * 3 + 4 * 2 and, for PatchGAN's 70, three halvings and two of stride 1.
    assert receptive_field([Layer(4, 2), Layer(4, 2), Layer(3)]) == 18
    assert receptive_field([Layer(4, 2)] * 3 + [Layer(4)] * 2) == 70


@pytest.mark.parametrize(("field", "size"), [(f, size) for f in LAYERS for size in (32, 28, 33) if f <= size])
def test_a_score_sees_its_patch_and_nothing_else(field: int, size: int) -> None:
    """The gradient of one score by the image is not zero exactly in L x L pixels (cut where they leave the image)."""
    network, layers = _make(field, size).eval(), LAYERS[field]
    side = map_side(layers, size)
    whole, covered = 0, torch.zeros(size, size, dtype=torch.bool)
    images = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    scores = network(images)
    assert scores.shape == (1, 1, side, side)
    places = range(side) if side <= 8 else [0, 1, side // 2, side - 1]
    for i in places:
        for j in places:
            (gradient,) = torch.autograd.grad(scores[0, 0, i, j], images, retain_graph=True)
            seen = (gradient[0] != 0).any(dim=0)
            expected = torch.zeros(size, size, dtype=torch.bool)
            spans = [(patch_origin(layers, p), patch_origin(layers, p) + field) for p in (i, j)]
            (top, bottom), (left, right) = [(max(low, 0), min(high, size)) for low, high in spans]
            expected[top:bottom, left:right] = True
            assert torch.equal(seen, expected), (i, j)
            covered |= seen
            whole += int(seen.sum() == field * field)
    assert whole > 0, "no patch lies in the image as a whole"
    if side <= 8 and (field, size) != (32, 33):
        assert covered.all(), "some pixels are judged by no score"


@pytest.mark.parametrize("size", [4, 5, 8, 16, 27, 28, 32, 64])
def test_the_whole_image_is_one_patch(size: int) -> None:
    network = _make("image", size).eval()
    assert receptive_field(whole_image(size)) >= size
    images = torch.rand(1, 3, size, size, dtype=torch.float64, requires_grad=True)
    score = network(images)
    assert score.shape == (1, 1, 1, 1)
    (gradient,) = torch.autograd.grad(score.sum(), images)
    assert bool((gradient != 0).any(dim=1).all())


def test_field_32_at_32_px_is_the_whole_image_too() -> None:
    assert map_side(LAYERS[32], 32) == 1 and patch_origin(LAYERS[32], 0) == 0


def test_the_released_shape() -> None:
    """Scores 8 x 8 at 32 px, 4 px apart, each of 10 px (seen in the released code)."""
    network = _make(10, 32, width=128)
    assert [c.weight.shape[:2] for c in network.convs] == [(128, 3), (256, 128)]  # type: ignore[union-attr]
    assert network(torch.rand(2, 3, 32, 32, dtype=torch.float64)).shape == (2, 1, 8, 8)
    assert patch_origin(LAYERS[10], 3) - patch_origin(LAYERS[10], 2) == 4


@pytest.mark.parametrize(("stride", "kept"), [(1, 8), (2, 4), (3, 3), (8, 1)])
def test_a_stride_keeps_every_so_many_scores(stride: int, kept: int) -> None:
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    every, some = _make(8, 32).eval()(images), _make(8, 32, stride=stride).eval()
    assert torch.equal(some(images), every[:, :, ::stride, ::stride])
    assert some.side == kept == some(images).shape[-1]


def test_a_stride_of_two_halves_the_overlap() -> None:
    """Field 8 has a score every 4 px: with s = 2 the patches only touch."""
    network = _make(8, 32, stride=2).eval()
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    scores = network(images)
    seen = [torch.autograd.grad(scores[0, 0, 1, j], images, retain_graph=True)[0][0].abs().sum(0) > 0 for j in (1, 2)]
    assert not (seen[0] & seen[1]).any()
    assert int(seen[0].sum()) == int(seen[1].sum()) == 64


def test_images_smaller_than_a_patch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"field is 18 px, but images have only 16; allowed: 1, 2, 4, 8, 10, or image"):
        _make(18, 16)
    with pytest.raises(ValueError, match=r"field is 7; allowed: 1, 2, 4, 8, 10, 18, 22, 32, or image"):
        _make(7, 32)


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_beyond_the_map_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=rf"stride is {stride}, but field 8 gives 8 x 8 scores; allowed: 1 to 8"):
        _make(8, 32, stride=stride)


def test_no_parameter_is_without_effect() -> None:
    """A bias before batch norm would have a gradient of rounding errors alone."""
    network = _make(22, 32, width=8)
    network(torch.rand(6, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name


def test_grey_images_and_no_images() -> None:
    assert _make(8, 16, channels=1)(torch.rand(2, 1, 16, 16, dtype=torch.float64)).shape == (2, 1, 4, 4)
    assert _make(1, 16, channels=1)(torch.rand(0, 1, 16, 16, dtype=torch.float64)).shape == (0, 1, 16, 16)


def test_a_reader_moves_nothing_in_it() -> None:
    network = _make(10, 16)
    assert isinstance(synchronise(network, ALONE), PatchDiscriminator)
    assert any(isinstance(m, GroupBatchNorm) for m in network.modules())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.rand(5, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    with reading_only(network, "batch"):
        scores = network(images)
    scores.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
