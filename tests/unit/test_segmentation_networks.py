"""Networks that classify pixels: shapes, where their signals are, folding, class orders, and the DCGAN generator."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dfkd_dist.engine.export import export_onnx
from dfkd_dist.engine.flops import card_cost
from dfkd_dist.models.cards import Card, load_network, save_network
from dfkd_dist.models.dcgan import TransposedGenerator, make_generator
from dfkd_dist.models.generator import Generator
from dfkd_dist.models.network import ImageNetwork, Preprocess
from dfkd_dist.models.registry import build_network, has_library_weights, network_names, segmenter_names
from dfkd_dist.models.signals import BN, FEATURES, LOGITS, MAP
from dfkd_dist.models.teacher import Teacher
from tests.segmentation import stir

SMALL = ["smallseg", "tinyseg"]
DEEP = ["deeplabv3_mobilenetv2", "deeplabv3_resnet50"]


def image_network(arch: str, size: int = 16, canonical: int | None = None) -> ImageNetwork:
    network = build_network(arch, num_classes=5)
    return ImageNetwork(network, Preprocess(size, 3, [0.5] * 3, [0.25] * 3, canonical), arch)


def test_the_names() -> None:
    assert segmenter_names() == sorted(SMALL + DEEP)
    assert not set(segmenter_names()) & set(network_names())
    assert [has_library_weights(a) for a in ("tinyseg", "tiny", "deeplabv3_resnet50", "timm/x")] == [False] * 2 + [
        True
    ] * 2
    with pytest.raises(ValueError, match="deeplabv3_resnet50"):
        build_network("deeplabv3_resnet5", num_classes=3)
    with pytest.raises(ValueError, match="pretrained: true.*'tinyseg' has no library weights"):
        build_network("tinyseg", num_classes=3, pretrained=True)
    with pytest.raises(ValueError, match="takes 3 channels"):
        build_network("deeplabv3_resnet50", num_classes=3, in_channels=1)


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize(("height", "width"), [(4, 4), (16, 16), (17, 17), (12, 21), (48, 48)])
def test_small_networks_answer_for_every_pixel(arch: str, height: int, width: int) -> None:
    for channels in (1, 3):
        network = build_network(arch, num_classes=7, in_channels=channels)
        logits = network(torch.rand(2, channels, height, width))
        assert logits.shape == (2, 7, height, width) and logits.isfinite().all()


@pytest.mark.parametrize("arch", SMALL)
def test_gradients_reach_every_parameter_and_the_images(arch: str) -> None:
    torch.manual_seed(0)
    network, images = build_network(arch, num_classes=4), torch.rand(3, 3, 12, 12, requires_grad=True)
    network(images).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert images.grad is not None and (images.grad.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("arch", DEEP)
def test_deeplab_answers_for_every_pixel_and_has_no_dropout(arch: str) -> None:
    network = image_network(arch, size=33)
    logits = network.eval()(torch.rand(2, 3, 33, 33)).logits_NC
    assert logits.shape == (2, 5, 33, 33)
    assert not any(m.p for m in network.modules() if isinstance(m, nn.Dropout))
    assert (network.taps.classifier, network.taps.map, network.dense) == ("classifier.4", "classifier.3", True)
    assert network.shapes(33, 3, frozenset({FEATURES, MAP}))[FEATURES][0] == 256


def test_deeplab_is_torchvisions() -> None:
    from torchvision.models.segmentation import deeplabv3_resnet50

    torch.manual_seed(0)
    theirs = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=4, aux_loss=False).eval()
    ours = build_network("deeplabv3_resnet50", num_classes=4).eval()
    ours.load_state_dict(theirs.state_dict())  # the same names
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images)["out"])


def test_mobilenet_takes_any_channels_and_needs_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_network("deeplabv3_mobilenetv2", num_classes=4, in_channels=1).eval()
    assert network(torch.rand(1, 1, 32, 32)).shape == (1, 4, 32, 32)
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "timm":
            raise ImportError("no timm")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"dfkd-dist\[timm\]"):
        build_network("deeplabv3_mobilenetv2", num_classes=4)


def test_the_costs_of_table_2s_networks() -> None:
    """41 and 5.54 billion there: multiply-adds at 256 px, to which the student's batch norm may have been added."""
    teacher, student = (card_cost(Card(arch, 13, 256, 3, [0.5] * 3, [0.25] * 3)) for arch in reversed(DEEP))
    assert (teacher.parameters, student.parameters) == (39_636_813, 5_111_821)
    assert teacher.flops / 2e9 == pytest.approx(41, rel=0.01) and student.flops / 2e9 == pytest.approx(5.54, rel=0.07)


# ------------------------------------------------------------------------------------------------- signals


def test_signals_of_pixels() -> None:
    network = image_network("tinyseg").double().eval()
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    said = network(images, frozenset({LOGITS, FEATURES, MAP, BN}))
    assert said.features_ND is not None and said.map_NDHW is not None
    assert torch.equal(said.features_ND, said.map_NDHW)  # the classifier's input is the last map
    low = network.network.get_submodule(str(network.taps.classifier))(said.features_ND)
    again = torch.nn.functional.interpolate(low, size=(16, 16), mode="bilinear", align_corners=False)
    assert torch.allclose(again, said.logits_NC)
    assert len(said.bn) == len(network.taps.batch_norms) == 7
    part = said.part(1, 3)
    assert torch.equal(part.logits_NC, said.logits_NC[1:3]) and part.tensor(FEATURES).shape[0] == 2


@pytest.mark.parametrize(("size", "canonical", "side", "own"), [(8, 16, 16, 8), (24, 16, 16, 24), (24, 16, 32, 48)])
def test_logits_come_back_at_the_images_resolution(size: int, canonical: int, side: int, own: int) -> None:
    network = image_network("tinyseg", size, canonical).eval()
    taken: list[torch.Size] = []
    network.network.register_forward_pre_hook(lambda _, args: taken.append(args[0].shape))
    images = torch.rand(2, 3, side, side, requires_grad=True)
    said = network(images)
    assert said.logits_NC.shape == (2, 5, side, side) and taken == [(2, 3, own, own)]
    said.logits_NC.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_larger_images_are_taken_as_they_are() -> None:
    """A segmenter of 16 px windows is shown whole images of 40 px; a classifier's are brought to its size."""
    network = image_network("tinyseg").eval()
    images = torch.rand(1, 3, 40, 40)
    assert torch.equal(network(images).logits_NC, network.network((images - 0.5) / 0.25))
    assert image_network("tiny").eval()(images).logits_NC.shape == (1, 5)


def test_a_classifier_of_images_is_not_dense() -> None:
    assert not image_network("tiny").dense


def test_a_teacher_of_pixels_answers_alike_when_folded_and_in_the_runs_order() -> None:
    preprocess = Preprocess(16, 3, [0.5] * 3, [0.25] * 3).double()
    network = stir(build_network("smallseg", num_classes=4), seed=1).double()
    teacher = Teacher(network, preprocess, "t", list("abcd"), [2, 0, 3, 1])
    answering = teacher.answering()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    own = network(preprocess(images))
    assert torch.equal(teacher(images).logits_NC, own[:, [2, 0, 3, 1]])
    assert torch.allclose(answering(images).logits_NC, teacher(images).logits_NC, atol=1e-11)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in answering.network.modules())


def test_a_saved_segmenter_is_read_and_exported(tmp_path: Path) -> None:
    card = Card("tinyseg", 4, 16, 3, [0.5] * 3, [0.25] * 3, list("abcd"))
    network = stir(card.build(), seed=2)
    save_network(tmp_path / "s", network.state_dict(), card)
    read = load_network(tmp_path / "s")
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(read(images).logits_NC, network.eval()(card.preprocess()(images)))


@pytest.mark.slow
def test_onnx_of_pixels(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnx.reference")
    from dfkd_dist.config import ImageSpec

    card = Card("tinyseg", 4, 16, 3, [0.5] * 3, [0.25] * 3)
    network = stir(card.build(), seed=2)
    save_network(tmp_path / "s", network.state_dict(), card)
    path = export_onnx(tmp_path / "s", tmp_path / "s.onnx", ImageSpec(size=16, channels=3))
    images = torch.rand(3, 3, 16, 16)
    (found,) = runtime.ReferenceEvaluator(str(path)).run(None, {"images": images.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), load_network(tmp_path / "s")(images).logits_NC, atol=1e-4)


# ----------------------------------------------------------------------------------------------- generator


@pytest.mark.parametrize("head", ["sigmoid", "bn"])
@pytest.mark.parametrize(("size", "blocks", "channels"), [(16, 2, 1), (32, 4, 3), (12, 2, 3)])
def test_the_dcgan_generator(size: int, blocks: int, channels: int, head: str) -> None:
    torch.manual_seed(0)
    generator = make_generator("dcgan", 8, 32, blocks, size, channels, head)
    assert isinstance(generator, TransposedGenerator) and generator.latent == 8
    images = generator(torch.randn(6, 8))
    assert images.shape == (6, channels, size, size)
    if head == "sigmoid":
        assert images.min() >= 0 and images.max() <= 1
    else:
        assert abs(images.mean().item() - 0.5) < 0.01
    images.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())


def test_the_dcgan_generator_is_the_published_one_in_size() -> None:
    with torch.device("meta"):
        generator = TransposedGenerator(256, 512, 4, 128, 3, "sigmoid")
    assert [c.in_channels for c in generator.convs] == [512, 256, 128, 64]  # type: ignore[union-attr]
    assert [c.out_channels for c in generator.convs] == [256, 128, 64, 64]  # type: ignore[union-attr]
    assert generator.linear.out_features == 512 * 8 * 8


def test_a_size_that_does_not_double_up_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        make_generator("dcgan", 8, 16, 3, 20, 3, "sigmoid")
    assert isinstance(make_generator("upsample", 8, 16, 3, 20, 3, "sigmoid"), Generator)
