"""Splits between parties (DFMF section 4.1) and held-out parts."""

import pytest
import torch

from dfkd_dist.data.splits import frequent_classes, party_indices, stratified_split


def labels_of(counts: list[int]) -> torch.Tensor:
    """Shuffled labels with the given count of each class."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]


def table(labels: torch.Tensor, dealt: list[torch.Tensor], classes: int) -> list[list[int]]:
    """Images of each class (columns) that each party (rows) has."""
    return [torch.bincount(labels[indices], minlength=classes).tolist() for indices in dealt]


@pytest.mark.parametrize(
    "mode, ratio", [("bl", 1.0), ("ibl", 1.0), ("ibl", 3.0), ("ibl", 20.0), ("ibl", 2.7)]
)
@pytest.mark.parametrize("parties", [1, 2, 3, 4])
@pytest.mark.parametrize("counts", [[100] * 10, [7, 13, 1, 29, 50], [1] * 12])
def test_nothing_overlaps_and_nothing_is_missing(mode, ratio, parties, counts):
    labels = labels_of(counts)
    dealt = party_indices(labels, parties=parties, mode=mode, ratio=ratio, seed=0)
    assert len(dealt) == parties
    assert all(bool((part[1:] > part[:-1]).all()) for part in dealt)
    assert torch.equal(torch.cat(dealt).sort().values, torch.arange(len(labels)))


@pytest.mark.parametrize(
    "parties, ratio, frequent, rare",
    [(2, 3.0, 750, 250), (4, 3.0, 500, 1000 / 6), (4, 10.0, 769.23, 76.923), (4, 20.0, 869.565, 43.478)],
)
def test_imbalanced_shares_are_those_of_the_paper(parties, ratio, frequent, rare):
    labels = labels_of([1000] * 8)
    rows = table(labels, party_indices(labels, parties=parties, mode="ibl", ratio=ratio, seed=1), 8)
    for party, block in enumerate(frequent_classes(8, parties)):
        for label in range(8):
            expected = frequent if label in block else rare
            assert abs(rows[party][label] - expected) <= 1


def test_two_parties_of_cifar_at_ratio_three_are_exact():
    labels = labels_of([40] * 10)
    rows = table(labels, party_indices(labels, parties=2, mode="ibl", ratio=3.0, seed=0), 10)
    assert rows == [[30] * 5 + [10] * 5, [10] * 5 + [30] * 5]


@pytest.mark.parametrize("parties", [2, 3, 4, 7])
def test_leftovers_favour_no_party(parties):
    labels = labels_of([11] * 20)
    sizes = [len(part) for part in party_indices(labels, parties=parties, mode="bl", seed=0)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("count", [9, 10, 11])
def test_leftovers_of_imbalanced_splits_favour_no_party(count):
    labels = labels_of([count] * 24)
    for parties, ratio in [(2, 3.0), (3, 3.0), (4, 10.0)]:
        dealt = party_indices(labels, parties=parties, mode="ibl", ratio=ratio, seed=0)
        sizes = [len(part) for part in dealt]
        assert max(sizes) - min(sizes) <= 2, (parties, ratio, sizes)


def test_balanced_split_is_even_within_each_class():
    labels = labels_of([10, 11, 12, 13])
    rows = table(labels, party_indices(labels, parties=3, mode="bl", seed=0), 4)
    for column in zip(*rows, strict=True):
        assert max(column) - min(column) <= 1


@pytest.mark.parametrize(
    "classes, parties, expected",
    [
        (10, 2, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
        (10, 4, [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]),
        (3, 3, [[0], [1], [2]]),
        (5, 1, [[0, 1, 2, 3, 4]]),
    ],
)
def test_frequent_classes_are_contiguous_and_even(classes, parties, expected):
    assert frequent_classes(classes, parties) == expected


def test_seed_decides_and_global_random_state_does_not():
    labels = labels_of([20] * 5)
    torch.manual_seed(0)
    first = party_indices(labels, parties=2, mode="bl", seed=5)
    torch.manual_seed(1)
    again = party_indices(labels, parties=2, mode="bl", seed=5)
    other = party_indices(labels, parties=2, mode="bl", seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_the_shuffle_never_changes():
    """A pinned answer: another NumPy or torch must not move images between parties."""
    labels = torch.tensor([0, 1] * 6)
    dealt = party_indices(labels, parties=2, mode="bl", seed=0)
    assert [part.tolist() for part in dealt] == [[2, 3, 4, 6, 9, 11], [0, 1, 5, 7, 8, 10]]


def test_classes_without_images_keep_their_place():
    labels = labels_of([8, 8])
    rows = table(labels, party_indices(labels, parties=2, mode="ibl", ratio=3.0, seed=0, num_classes=4), 4)
    assert rows == [[6, 6, 0, 0], [2, 2, 0, 0]]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"mode": "ibl", "ratio": 0.5}, "ratio.*at least 1.*0.5"),
        ({"mode": "ibl", "ratio": float("nan")}, "ratio.*nan"),
        ({"mode": "bl", "ratio": 3.0}, "ratio.*bl"),
        ({"parties": 0}, "parties.*0"),
        ({"parties": 5, "mode": "ibl"}, "parties.*1 .. 4.*5"),
        ({"parties": 41}, "parties.*40 images.*41"),
        ({"mode": "iid"}, "mode.*bl or ibl.*iid"),
        ({"seed": -1}, "seed.*-1"),
        ({"num_classes": 3}, "labels_N.*0 .. 2.*3"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        party_indices(labels_of([10] * 4), **{"parties": 2, "mode": "bl", "seed": 0, **arguments})


@pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(2, 2).long(), torch.tensor([0, -1])])
def test_what_is_no_label_is_refused(labels):
    with pytest.raises(ValueError, match="labels"):
        party_indices(labels, parties=2, mode="bl", seed=0)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4, 0.5])
def test_stratified_split_holds_out_the_fraction_of_every_class(fraction):
    labels = labels_of([10, 20, 50])
    kept, held = stratified_split(labels, fraction, seed=0)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(80))
    counts = torch.bincount(labels[held], minlength=3).tolist()
    assert counts == [round(10 * fraction), round(20 * fraction), round(50 * fraction)]


def test_stratified_split_of_a_class_ignores_the_other_classes():
    labels = torch.tensor([0] * 10 + [1] * 10)
    _, both = stratified_split(labels, 0.3, seed=0)
    _, alone = stratified_split(labels[10:], 0.3, seed=0)
    assert (alone + 10).tolist() == [i for i in both.tolist() if i >= 10]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_stratified_split_refuses_other_fractions(fraction):
    with pytest.raises(ValueError, match="fraction"):
        stratified_split(torch.tensor([0, 1]), fraction, seed=0)
