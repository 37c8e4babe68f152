"""Frechet distances against closed forms and scipy's matrix square root."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from dfkd_dist.data.datasets import to_image_space
from dfkd_dist.engine.look.collection import Seen, SetCollection
from dfkd_dist.engine.look.fid import fid, fid_by_class
from dfkd_dist.engine.look.networks import FeatureNetwork
from dfkd_dist.engine.look.patches import patch_fid, random_patches
from tests.image_data import pictures
from tests.looks import CPU, Given, by_first_pixel, of_rows, pixels

pytest.importorskip("torchmetrics")
AB = ["a", "b", "c", "d"]


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_scipy(real_ND: Tensor, pool_ND: Tensor) -> float:
    """Heusel et al. 2017, Eq. 6, from numpy's moments."""
    means = [x.mean(dim=0) for x in (real_ND, pool_ND)]
    covariances = [torch.cov(x.T).reshape(x.shape[1], x.shape[1]).numpy() for x in (real_ND, pool_ND)]
    root = sqrtm(covariances[0] @ covariances[1])
    return float((means[0] - means[1]).square().sum()) + float(
        (covariances[0] + covariances[1] - 2 * root.real).trace()
    )


def exactly(rows_ND: Tensor, mean_D: Tensor, root_DD: Tensor) -> Tensor:
    """Rows moved so that their sample mean is `mean_D` and their unbiased covariance `root root^T`."""
    centred = rows_ND - rows_ND.mean(dim=0)
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(centred.T))).T
    return white @ root_DD.T + mean_D


def test_shifted_gaussians_have_the_closed_form() -> None:
    # Diagonal covariances commute: the distance is |m_1 - m_2|^2 + sum (s_1 - s_2)^2.
    first, second = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.1, 0.5]).double()
    shift = torch.tensor([0.3, -1.0, 2.0]).double()
    real = exactly(rows(200, 3), torch.zeros(3).double(), first.diag())
    pool = exactly(rows(150, 3, 1), shift, second.diag())
    found = fid(of_rows(real), of_rows(pool), pixels(), batch=64)
    expected = float(shift.square().sum() + (first - second).square().sum())
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert (found.real, found.pool, found.width, found.full_rank) == (200, 150, 3, True)


def test_correlated_features_against_scipy() -> None:
    real, pool = rows(90, 7) @ rows(7, 7, 2), rows(120, 7, 3) @ rows(7, 7, 4) + 0.7
    found = fid(of_rows(real), of_rows(pool), pixels(), batch=17)
    assert found.value == pytest.approx(by_scipy(real, pool), rel=1e-8)


def test_batches_do_not_matter_and_moments_are_doubles() -> None:
    # Features of 1e4 with a spread of 1: sums of squares in fp32 would keep no digit of the covariance.
    real, pool = rows(64, 5) + 1e4, rows(64, 5, 1) * 2 + 1e4
    values = [fid(of_rows(real), of_rows(pool), pixels(), batch=b).value for b in (1, 13, 64)]
    assert values == pytest.approx([by_scipy(real, pool)] * 3, rel=1e-6)


def test_a_set_is_at_no_distance_from_itself() -> None:
    images = Given(pictures(300, 1, 4, 4))
    found = fid(images, images, pixels())
    assert found.value == pytest.approx(0.0, abs=1e-8) and found.full_rank
    moved = fid(images, Given(pictures(300, 1, 4, 4, seed=5)), pixels())
    assert moved.value is not None and moved.value > 1e-4


def test_uint8_and_float_images_are_the_same_images() -> None:
    images = pictures(80, 3, 4, 4)
    one, other = Given(images), Given(to_image_space(images, torch.float64))
    assert fid(one, other, pixels()).value == pytest.approx(0.0, abs=1e-9)


def test_too_few_images_are_measured_and_marked(caplog: pytest.LogCaptureFixture) -> None:
    real, pool = rows(30, 40), rows(25, 40, 1) + 0.5
    with caplog.at_level(logging.WARNING):
        found = fid(of_rows(real, "originals"), of_rows(pool, "made"), pixels())
    # Of rank 24 at most, so compare with the form that needs no square root of a singular product.
    x, y = ((r - r.mean(dim=0)) / (len(r) - 1) ** 0.5 for r in (real, pool))
    nuclear = float(torch.linalg.matrix_norm(x @ y.T, "nuc"))
    mean = float((real.mean(dim=0) - pool.mean(dim=0)).square().sum())
    assert found.value == pytest.approx(mean + float(x.square().sum() + y.square().sum()) - 2 * nuclear, rel=1e-5)
    assert not found.full_rank and "41 images (features + 1)" in caplog.text and "originals (30 images)" in caplog.text
    assert found.as_dict() | {"fid": 0} == {
        "fid": 0,
        "real_images": 30,
        "pool_images": 25,
        "features": 40,
        "full_rank": False,
    }


@pytest.mark.parametrize("counts", [(1, 9), (9, 1), (0, 9)])
def test_one_image_has_no_covariance(counts: tuple[int, int]) -> None:
    real, pool = (of_rows(rows(n, 3)) for n in counts)
    found = fid(real, pool, pixels())
    assert found.value is None and (found.real, found.pool) == counts and not found.full_rank


@pytest.mark.parametrize(
    ("extract", "message"),
    [(lambda x: x * float("nan"), "NaN or infinite"), (lambda x: x.unsqueeze(0), r"expected \[N, D\]")],
)
def test_features_must_be_numbers(extract: object, message: str) -> None:
    network = FeatureNetwork("odd", lambda x: extract(x.flatten(1)), CPU)  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"features of odd.*{message}"):
        fid(of_rows(rows(5, 3)), of_rows(rows(5, 3)), network)


# ------------------------------------------------------------------------------------------ by class


def spread(count: int, seed: int) -> Given:
    """Images whose first pixel names one of four classes; the last class has a single image."""
    images = torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    label_N = torch.arange(count) % 3
    label_N[0] = 3
    images[:, 0, 0, 0] = (label_N + 0.5) / 4
    return Given(images, label_N, AB, f"set {seed}")


@pytest.mark.parametrize("labelled", [True, False])
def test_each_class_by_itself(labelled: bool) -> None:
    real, pool = spread(61, 1), spread(70, 2)
    if not labelled:
        real = Given(real.images_NCHW, name="unlabelled")
    pool = Given(pool.images_NCHW, torch.zeros(70, dtype=torch.int64), ["something else"])
    found = fid_by_class(real, pool, pixels(), by_first_pixel(AB), batch=16)
    assert (found.real_by, found.pool_by) == ("labels" if labelled else "first pixel", "first pixel")
    assert found.overall.value == pytest.approx(fid(real, pool, pixels()).value, rel=1e-5)
    for c in range(4):
        parts = [of_rows(s.images_NCHW[s.images_NCHW[:, 0, 0, 0] == (c + 0.5) / 4].flatten(1)) for s in (real, pool)]
        direct = fid(*parts, pixels())
        one = found.by_class[c]
        assert (one.real, one.pool) == (len(parts[0]), len(parts[1]))
        assert one.value == (None if c == 3 else pytest.approx(direct.value, abs=1e-6))
    known = [one.value for one in found.by_class[:3]]
    assert found.mean == pytest.approx(sum(v for v in known if v is not None) / 3)
    written = found.as_dict()["classes"]
    assert [entry["class"] for entry in written] == AB and written[3]["fid"] is None


def test_labels_follow_the_names_of_the_classes_or_give_way() -> None:
    real, judge = spread(40, 1), by_first_pixel(AB)
    assert real.labels_N is not None
    # The same labels under other numbers, and one image whose label is unknown.
    renamed = Given(real.images_NCHW, 3 - real.labels_N, AB[::-1])
    found = [fid_by_class(one, real, pixels(), judge) for one in (real, renamed)]
    assert [one.value for one in found[0].by_class] == pytest.approx([one.value for one in found[1].by_class])
    unknown = real.labels_N.clone()
    unknown[1] = -1
    fewer = fid_by_class(Given(real.images_NCHW, unknown, AB), real, pixels(), judge)
    assert sum(one.real for one in fewer.by_class) == 39 and fewer.overall.real == 40
    asked = fid_by_class(Given(real.images_NCHW, unknown, AB), real, pixels(), judge, predicted=True)
    assert sum(one.real for one in asked.by_class) == 40 and asked.real_by == asked.pool_by == "first pixel"


# ------------------------------------------------------------------------------------------ patches


def test_patches_lie_where_the_images_numbers_say() -> None:
    images = pictures(6, 3, 8, 8)
    numbers = torch.tensor([5, 0, 900, 3, 4, 1])
    whole = random_patches(Seen(images, None, numbers), 3, 2, seed=1)
    assert whole.shape == (12, 3, 3, 3) and whole.dtype == torch.uint8
    parts = [random_patches(Seen(images[i : i + 1], None, numbers[i : i + 1]), 3, 2, seed=1) for i in range(6)]
    assert torch.equal(whole, torch.cat(parts))
    everywhere = {tuple(images[0, :, t : t + 3, x : x + 3].flatten().tolist()) for t in range(6) for x in range(6)}
    assert tuple(whole[0].flatten().tolist()) in everywhere
    assert not torch.equal(whole, random_patches(Seen(images, None, numbers), 3, 2, seed=2))


def test_patches_cover_the_image_evenly() -> None:
    # Pixel value = position, so a patch of one pixel says where it was taken.
    images = torch.arange(16, dtype=torch.float64).reshape(1, 1, 4, 4).expand(4000, 1, 4, 4)
    found = random_patches(Seen(images, None, torch.arange(4000)), 1, 1, seed=0).flatten().long()
    counts = torch.bincount(found, minlength=16)
    assert int(counts.min()) > 180 and int(counts.max()) < 320  # 250 each, deviation 15
    corners = random_patches(Seen(images, None, torch.arange(4000)), 3, 1, seed=0)[:, 0, 0, 0].long()
    assert set(corners.tolist()) == {0, 1, 4, 5}


def test_patch_fid_against_patches_cut_by_hand() -> None:
    real, pool = Given(pictures(120, 1, 6, 6)), Given(pictures(100, 1, 6, 6, seed=4))
    cut = [
        random_patches(Seen(one.images_NCHW, None, torch.arange(len(one))), 2, 3, seed=7).flatten(1).double() / 255
        for one in (real, pool)
    ]
    found = patch_fid(real, pool, pixels(), 2, batch=32, crops=3, seed=7)
    assert found.value == pytest.approx(by_scipy(*cut), rel=1e-6) and (found.real, found.pool) == (360, 300)
    whole = patch_fid(real, pool, pixels(), 6, batch=50)
    assert whole == fid(real, pool, pixels(), batch=50)
    assert patch_fid(real, real, pixels(), 2).value == pytest.approx(0.0, abs=1e-9)


def test_patches_are_resized_to_the_networks_input() -> None:
    shapes = []

    def extract(images_NCHW: Tensor) -> Tensor:
        shapes.append(tuple(images_NCHW.shape))
        return images_NCHW.flatten(1)

    patch_fid(Given(pictures(9)), Given(pictures(9)), FeatureNetwork("sees", extract, CPU), 4, batch=5)
    assert shapes == [(5, 3, 4, 4), (4, 3, 4, 4)] * 2  # a network of ours then resizes in its own preprocessing


def test_impossible_patches_are_refused() -> None:
    small, large = Given(pictures(5)), Given(pictures(5, 3, 10, 10))
    with pytest.raises(ValueError, match="patch size 9: allowed: 1 to 8"):
        patch_fid(small, small, pixels(), 9)
    with pytest.raises(ValueError, match=r"must have one size, found \[8, 10\]"):
        patch_fid(small, large, pixels(), 4)


def test_a_missing_torchmetrics_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r"pip install 'dfkd-dist\[metrics\]'"):
        fid(of_rows(rows(5, 3)), of_rows(rows(5, 3)), pixels())


def test_a_part_of_a_set_is_a_fixed_random_choice() -> None:
    from tests.voters import image_set

    whole = SetCollection(image_set(50), "set")
    parts = [whole.part(20, seed) for seed in (0, 0, 1)]
    numbers = [torch.cat([seen.numbers_N for seen in part.batches(7)]) for part in parts]
    assert torch.equal(numbers[0], numbers[1]) and not torch.equal(numbers[0], numbers[2])
    assert len(parts[0]) == 20 and numbers[0].tolist() == sorted(set(numbers[0].tolist()))
    assert len(whole.part(99)) == 50 and sum(len(seen.numbers_N) for seen in whole.batches(8)) == 50
    with pytest.raises(ValueError, match="at least 1, found 0"):
        whole.part(0)
