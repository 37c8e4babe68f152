"""KDCI: the dictionary against scikit-learn, the compensation against Eqs. 4 and 5 in plain loops."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from dfkd_dist.compensation import dictionary
from dfkd_dist.compensation.dictionary import Features, cluster, cluster_pieces
from dfkd_dist.compensation.kdci import KDCI
from dfkd_dist.config import KDCISpec, Recipe, RecipeError, parse
from dfkd_dist.engine.run import run
from dfkd_dist.models.signals import Batch, Signals
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.parallel.randomness import Randomness
from tests import recipes

CLASSES = 5


def features(count: int, width: int = CLASSES, seed: int = 0) -> Features:
    """Three clouds of unequal size."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(3, width)) * 6
    return centres[random.choice(3, size=count, p=[0.6, 0.3, 0.1])] + random.normal(size=(count, width))


def kdci(**options: object) -> KDCI:
    torch.manual_seed(0)
    spec = KDCISpec(kind="kdci", **{"size": 4, "hidden": 7} | options)
    return KDCI(spec, CLASSES, CLASSES, [0.25, 0.75], ALONE, Randomness(3)).double()


def answers(count: int) -> list[Signals]:
    return [Signals(torch.from_numpy(features(count, seed=k))) for k in range(2)]


def updated(one: KDCI, round: int = 0, count: int = 40) -> KDCI:
    one.update(round, Batch(torch.zeros(count, 1, 1, 1), count, slots_N=torch.arange(count)), answers(count))
    return one


# ------------------------------------------------------------------------------------------------- dictionary


def test_the_dictionary_is_scikit_learns_clusters_with_means_in_the_features_own_space() -> None:
    points = features(60)
    found = cluster(points, size=4, pca=3, seed=11)
    reduced = PCA(3, svd_solver="full").fit_transform(points)
    labels = KMeans(4, init="k-means++", n_init=1, random_state=11).fit_predict(reduced)
    for i in range(4):
        np.testing.assert_allclose(found.prototypes_Nd[i], points[labels == i].mean(axis=0), rtol=0, atol=1e-12)
        assert found.counts_N[i] == (labels == i).sum()


@pytest.mark.parametrize(
    ("width", "samples", "limit", "kept"), [(10, 256, 64, 10), (1000, 256, 64, 64), (1000, 9, 64, 8)]
)
def test_principal_components(width: int, samples: int, limit: int, kept: int) -> None:
    assert dictionary.components(width, samples, limit) == kept


def test_more_prototypes_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="compensation.size is 41, but there are only 40 samples"):
        cluster(features(40), 41, 64, 0)


def test_coinciding_samples_leave_prototypes_empty() -> None:
    found = cluster(np.ones((10, 3)), size=2, pca=64, seed=0)
    assert found.counts_N.sum() == 10 and np.isfinite(found.prototypes_Nd).all()


def test_a_large_set_is_clustered_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictionary, "IN_MEMORY", 100)
    monkeypatch.setattr(dictionary, "PIECE", 64)
    points = features(1000)

    def pieces() -> Iterator[Features]:
        return (points[i : i + 37] for i in range(0, 1000, 37))

    found = cluster_pieces(pieces, 1000, size=3, pca=64, seed=0)
    assert found.counts_N.sum() == 1000
    # Three well separated clouds: the same clusters as by the exact way, whatever their order.
    exact = cluster(points, 3, 64, 0)
    assert sorted(found.counts_N) == sorted(exact.counts_N)
    order, reference = np.argsort(found.counts_N), np.argsort(exact.counts_N)
    np.testing.assert_allclose(found.prototypes_Nd[order], exact.prototypes_Nd[reference], atol=1e-9)


@pytest.mark.parametrize("count", [1, 63, 64, 127, 128, 129, 300])
def test_pieces_are_made_even_and_lose_nothing(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(dictionary, "PIECE", 64)
    rows = np.arange(count)[:, None].astype(float)
    made = list(dictionary._even(iter(np.array_split(rows, max(1, count // 10)))))
    np.testing.assert_array_equal(np.concatenate(made), rows)
    assert all(len(piece) >= min(64, count) for piece in made)


# ----------------------------------------------------------------------------------------------- compensation


def naive(one: KDCI, logits_NC: torch.Tensor) -> torch.Tensor:
    """Eqs. 4 and 5, one sample and one prototype at a time."""
    rows = []
    for s in logits_NC:
        scores = []
        for z in one.prototypes_Nd:
            mixed = [
                torch.tanh((one.query.weight[h] * s).sum() + (one.key.weight[h] * z).sum())
                for h in range(one.spec.hidden)
            ]
            scores.append(sum(one.score.weight[0, h] * mixed[h] for h in range(one.spec.hidden)))
        exponentials = [torch.exp(score) for score in scores]
        total = sum(exponentials)
        correction = sum(
            e / total * z * p for e, z, p in zip(exponentials, one.prototypes_Nd, one.proportions_N, strict=True)
        )
        rows.append(s + correction)
    return torch.stack(rows)


def test_value_and_gradient_are_those_of_the_equations() -> None:
    one = updated(kdci())
    results = []
    for compute in (one, lambda s: naive(one, s)):
        logits_NC = torch.linspace(-2, 3, 3 * CLASSES, dtype=torch.float64).reshape(3, CLASSES).requires_grad_()
        out = compute(logits_NC)
        (out * torch.arange(15.0).reshape(3, 5)).sum().backward()
        results.append([out.detach(), logits_NC.grad, *[p.grad.clone() for p in one.parameters()]])
        one.zero_grad()
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)
    assert (results[0][0] - logits_NC).abs().max() > 1e-3  # it does move the logits


def test_before_the_first_dictionary_nothing_is_added() -> None:
    logits_NC = torch.randn(2, CLASSES, dtype=torch.float64)
    torch.testing.assert_close(kdci()(logits_NC), logits_NC, rtol=0, atol=0)


def test_features_are_the_weighted_mean_logits_and_proportions_sum_to_one() -> None:
    one = updated(kdci())
    said = answers(40)
    mean = 0.25 * said[0].logits_NC + 0.75 * said[1].logits_NC
    weighted = (one.proportions_N[:, None] * one.prototypes_Nd).sum(dim=0)
    torch.testing.assert_close(weighted, mean.mean(dim=0), rtol=0, atol=1e-12)  # cluster means, weighted by their sizes
    assert float(one.proportions_N.sum()) == pytest.approx(1.0)


def test_the_order_of_the_images_does_not_matter() -> None:
    first, second, mixed = kdci(), kdci(), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    updated(first)
    shuffled = [Signals(a.logits_NC[mixed]) for a in answers(40)]
    second.update(0, Batch(torch.zeros(40, 1, 1, 1), 40, slots_N=mixed), shuffled)
    torch.testing.assert_close(first.prototypes_Nd, second.prototypes_Nd, rtol=0, atol=0)


def test_a_dictionary_is_rebuilt_when_due() -> None:
    one = updated(kdci(every=2))
    before = one.prototypes_Nd.clone()
    updated(one, round=1, count=50)
    assert torch.equal(one.prototypes_Nd, before)
    updated(one, round=2, count=50)
    assert not torch.equal(one.prototypes_Nd, before)


def test_detach_keeps_the_attention_from_the_student() -> None:
    one = updated(kdci(detach=True))
    logits_NC = torch.randn(2, CLASSES, dtype=torch.float64, requires_grad=True)
    one(logits_NC).sum().backward()
    torch.testing.assert_close(logits_NC.grad, torch.ones_like(logits_NC), rtol=0, atol=0)


def test_ablations() -> None:
    logits_NC = torch.randn(3, CLASSES, dtype=torch.float64)
    uniform, one = updated(kdci(proportions="uniform")), updated(kdci(proportions="one"))
    torch.testing.assert_close(uniform.proportions_N, torch.full((4,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(one.correction(logits_NC), 4 * uniform.correction(logits_NC))
    random = updated(kdci(attention="random"))
    assert torch.equal(*random.correction(logits_NC)[:2]) and not list(random.parameters())
    other, clusters = updated(kdci(prototypes="random")), updated(kdci())
    assert not torch.allclose(other.prototypes_Nd, clusters.prototypes_Nd)
    assert other.prototypes_Nd.std() == pytest.approx(clusters.prototypes_Nd.std(), rel=1.0)


def test_another_networks_features_are_mapped_to_the_runs_classes() -> None:
    spec = KDCISpec(kind="kdci", size=3, hidden=4)
    look = torch.nn.Linear(2, 9).double()
    one = KDCI(spec, CLASSES, 9, [1.0], ALONE, Randomness(0), look=look).double()
    one.update(0, Batch(torch.randn(12, 2, dtype=torch.float64), 12), [])
    assert one(torch.zeros(2, CLASSES, dtype=torch.float64)).shape == (2, CLASSES)
    assert one.mapping is not None and one.prototypes_Nd.shape == (3, 9)


# ---------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compensation": {"kind": "kdci", "size": 12}}, "compensation.size is 12, but a batch has only 11 images"),
        (
            {
                "objective": {"kind": "kd3"},
                "source": {"kind": "stream", "reader": {"shards": "x"}},
                "rounds": {"warmup": 0, "main": 1},
            },
            "compares none",
        ),
        ({"compensation": {"kind": "kdc"}}, "kdci"),
    ],
)
def test_what_cannot_be_compensated_is_refused_with_the_reason(changes: dict, said: str) -> None:
    tree = recipes.base(recipes.random_teachers(1), compensation={"kind": "kdci"})
    tree["source"]["loss"] = {"bce": 1.0}
    tree |= {key: value for key, value in changes.items()}
    with pytest.raises(RecipeError, match=said):
        parse(Recipe, tree)


def test_a_run_reports_the_plain_and_the_compensated_student(tmp_path: Path) -> None:
    compensation = {"kind": "kdci", "size": 4, "hidden": 5}
    tree = recipes.dfq(recipes.random_teachers(2), compensation=compensation, out=str(tmp_path / "run"))
    dataset = recipes.labelled(tmp_path)["source"]["dataset"] | {"channels": 3, "val_fraction": 0.0}
    tree |= {"evaluation": {"dataset": dataset}, "log": {"grids": False}}
    tree["rounds"] = {"warmup": 1, "main": 2, "student_steps": 2}
    code, summary = run(parse(Recipe, tree))
    assert code == 0 and summary is not None
    assert {"accuracy", "compensated_accuracy"} <= summary["student"].keys()
    exported = load_file(tmp_path / "run" / "student.safetensors")
    assert not any("compensation" in name for name in exported)
