"""A student in front of its teacher's classifier: what is copied and frozen, counted, exported and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dfkd_dist
from dfkd_dist.config import ImageSpec
from dfkd_dist.engine.export import export_onnx
from dfkd_dist.models.cards import Card, read_card, save_network
from dfkd_dist.models.network import ImageNetwork, parameter_count
from dfkd_dist.models.shared_classifier import ProjectedClassifier, classifier, projected_width, share_classifier
from dfkd_dist.models.signals import FEATURES, LOGITS
from dfkd_dist.models.teacher import Teacher
from dfkd_dist.parallel.group import ALONE
from dfkd_dist.parallel.player import Player, constant
from tests.recipes import stir
from tests.unit.test_export import run_onnx

CLASSES, BOTH = 5, frozenset({LOGITS, FEATURES})


def card(arch: str, **changes: Any) -> Card:
    return Card(
        **({"arch": arch, "num_classes": CLASSES, "size": 12, "channels": 1, "mean": [0.4], "std": [0.3]} | changes)
    )


def network(of: Card, seed: int = 0) -> ImageNetwork:
    torch.manual_seed(seed)
    return ImageNetwork(stir(of.build(), seed), of.preprocess(), of.arch).double()


def teacher(arch: str = "tiny", order: list[int] | None = None, **changes: Any) -> Teacher:
    of = card(arch, **changes)
    torch.manual_seed(7)
    return Teacher(stir(of.build(), 7), of.preprocess(), "t0", class_order=order).double()  # type: ignore[return-value]


def images(seed: int, count: int, size: int = 12) -> Tensor:
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(of: ImageNetwork, x: Tensor) -> Tensor:
    return of(x, BOTH).tensor(FEATURES)


@pytest.mark.parametrize(("student", "width"), [("resnet8", 96), ("tiny", None)])
def test_a_student_ends_in_the_teachers_classifier(student: str, width: int | None) -> None:
    other = teacher("tiny")
    fitted = projected_width(classifier(network(card(student))), classifier(other))
    assert fitted == width
    own = network(card(student, features=fitted), seed=3)
    share_classifier(own, other)
    x = images(1, 4)
    expected = F.linear(features(own, x), classifier(other).weight, classifier(other).bias)
    assert torch.allclose(own(x).logits_NC, expected, rtol=1e-12)
    assert features(own, x).shape == features(other, x).shape


def test_gradients_reach_the_features_and_leave_the_classifier() -> None:
    own = network(card("resnet8", features=96))
    share_classifier(own, teacher("tiny"))
    layer = classifier(own)
    before = [layer.weight.clone(), layer.bias.clone()]
    player = Player("student", own, lambda ps: torch.optim.SGD(ps, 0.5, weight_decay=0.1), constant, 1, ALONE)
    player.backward(own(images(1, 4)).logits_NC.square().sum())
    player.step()
    assert [layer.weight.equal(before[0]), layer.bias.equal(before[1]), layer.weight.grad] == [True, True, None]
    for name, parameter in own.network.named_parameters():
        assert name.startswith("fc.linear") or parameter.grad.abs().max() > 0, name


def test_a_projector_is_counted_and_belongs_to_the_card() -> None:
    plain, projected = network(card("lenet5_half")), network(card("lenet5_half", features=84))
    assert isinstance(projected.network.get_submodule("fc2"), ProjectedClassifier)
    extra = (42 * 84 + 84) + (84 * CLASSES + CLASSES) - (42 * CLASSES + CLASSES)
    assert parameter_count(projected) - parameter_count(plain) == extra


def test_classes_are_copied_in_the_runs_order() -> None:
    order, x = [2, 0, 1, 4, 3], images(1, 3)
    other, own = teacher("tiny", order), network(card("tiny"))
    share_classifier(own, other)
    with torch.no_grad():
        spoken = other(x).logits_NC
        for source, target in zip(other.network.parameters(), own.network.parameters(), strict=True):
            if target.requires_grad:
                target.copy_(source)
        own.network.load_state_dict(
            {k: v for k, v in other.network.state_dict().items() if not k.startswith("fc.")}, strict=False
        )
    assert torch.allclose(own.eval()(x).logits_NC, spoken, rtol=1e-12)


def test_an_exported_student_is_built_again(tmp_path: Path) -> None:
    of = card("lenet5_half", features=84)
    own = network(of)
    share_classifier(own, teacher("lenet5"))
    path, x = tmp_path / "student.safetensors", images(1, 3).float()
    save_network(path, own.network.float().state_dict(), of)
    own.float().eval()
    assert Card(**read_card(path)) == of
    assert torch.allclose(dfkd_dist.load_student(path)(x).logits_NC, own(x).logits_NC, atol=1e-6)
    pytest.importorskip("onnxscript")
    told = run_onnx(export_onnx(path, tmp_path / "student.onnx", ImageSpec(size=12, channels=1)), x)
    assert torch.allclose(torch.from_numpy(told), own(x).logits_NC, atol=1e-4)


def test_a_bias_that_only_one_of_them_has() -> None:
    bare, full = nn.Linear(4, 3, bias=False), nn.Linear(4, 3)
    assert projected_width(full, bare) is None and projected_width(bare, full) == 4  # an identity stands before it
    other, own = teacher("tiny"), network(card("tiny"))
    other.network.fc.register_parameter("bias", None)
    share_classifier(own, other)
    assert not classifier(own).bias.any()
    with pytest.raises(ValueError, match="of tiny has a bias, that of t0 has none"):
        share_classifier(other, own)


class _Scaled(nn.Module):
    """Something follows the last linear layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def test_what_is_no_classifier_is_not_shared() -> None:
    of = card("tiny")
    scaled = ImageNetwork(_Scaled(of.build()), of.preprocess(), "scaled")
    with pytest.raises(
        ValueError, match=r"network scaled: the output of its last linear layer \(inner.fc\) is not its"
    ):
        classifier(scaled)
    without = ImageNetwork(nn.Sequential(nn.Conv2d(1, 5, 12), nn.Flatten()), of.preprocess(), "conv")
    with pytest.raises(ValueError, match="network conv has no linear classifier"):
        classifier(without)
    with pytest.raises(
        ValueError, match="the classifier of t0 takes 96 features to 5 classes, that of resnet8 64 to 5"
    ):
        share_classifier(network(card("resnet8")), teacher("tiny"))
