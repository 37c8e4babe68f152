"""Taps, folding, sealed teachers, generators and heads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_dist.losses.vid import initial_rho, variance
from dfkd_dist.models.dcgan import make_generator
from dfkd_dist.models.folding import fold_batch_norm
from dfkd_dist.models.generator import Generator
from dfkd_dist.models.heads import VIDHead
from dfkd_dist.models.network import ImageNetwork, Preprocess, parameter_count
from dfkd_dist.models.registry import build_network, network_names
from dfkd_dist.models.signals import BN, FEATURES, LOGITS, MAP, MEANS, NAMED_MEANS
from dfkd_dist.models.spatial import SpatialGenerator
from dfkd_dist.models.taps import find_taps
from dfkd_dist.models.teacher import Teacher, class_order
from tests.recipes import stir

EVERYTHING = frozenset({LOGITS, FEATURES, MAP, BN})
# One of each family is enough where the depth changes nothing.
FAMILIES = ["tiny", "resnet8", "resnet18", "resnet50", "wrn16_2", "vgg8", "vgg11_bn", "mobilenetv2", "shufflenetv1"]
FAMILIES += ["shufflenetv2", "torchvision/resnet18", "torchvision/mobilenet_v2"]
FAMILIES = [name for name in FAMILIES if "/" in name or name in network_names()]
NORMED = [name for name in network_names() if not name.startswith("lenet")]


def _network(arch: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return stir(build_network(arch, num_classes=5), seed).eval()


def _size(arch: str) -> int:
    return 64 if arch.startswith("torchvision") else 32


def _preprocess(size: int = 32, channels: int = 3) -> Preprocess:
    return Preprocess(size, channels, [0.4] * channels, [0.3] * channels)


# ---------------------------------------------------------------------------------------------------- taps


@pytest.mark.parametrize("arch", [a for a in FAMILIES if not a.startswith("lenet")])
def test_taps_hear_what_the_network_computes(arch: str) -> None:
    network = ImageNetwork(_network(arch), _preprocess(_size(arch)), arch).eval()
    images = torch.rand(3, 3, _size(arch), _size(arch))
    signals = network(images, EVERYTHING)
    assert torch.equal(signals.logits_NC, network.network(network.preprocess(images)))
    classifier = network.network.get_submodule(network.taps.classifier or "")
    assert isinstance(classifier, nn.Linear) and signals.features_ND is not None and signals.map_NDHW is not None
    assert torch.equal(classifier(signals.features_ND), signals.logits_NC)
    assert signals.map_NDHW.dim() == 4
    assert tuple(signals.map_NDHW.shape[1:]) == network.shapes(_size(arch), 3, frozenset({MAP}))[MAP]
    norms = {m for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(signals.bn) == len(norms)
    assert [len(s.mean_C) for s in signals.bn] == [
        network.network.get_submodule(n).num_features for n in network.taps.batch_norms
    ]


@pytest.mark.parametrize(
    ("arch", "map_name", "classifier"),
    [
        ("torchvision/resnet18", "layer4", "fc"),
        ("torchvision/mobilenet_v2", "features", "classifier.1"),
        ("resnet8", "layer3", "fc"),
        ("tiny", "bn3", "fc"),
    ],
)
def test_taps_by_name(arch: str, map_name: str, classifier: str) -> None:
    taps = find_taps(_network(arch), torch.zeros(2, 3, 64, 64))
    assert (taps.map, taps.classifier) == (map_name, classifier)


def test_batch_norm_inputs_have_their_biased_moments() -> None:
    network = ImageNetwork(_network("tiny"), _preprocess(8), "t").eval()
    images = torch.rand(4, 3, 8, 8)
    (first, *_) = network(images, EVERYTHING).bn
    x = network.network.conv1(network.preprocess(images))
    assert torch.allclose(first.mean_C, x.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(first.var_C, x.var((0, 2, 3), correction=0), atol=1e-6)
    assert first.stored_mean_C is network.network.bn1.running_mean


def test_channel_means_are_those_of_each_image() -> None:
    network = ImageNetwork(_network("tiny"), _preprocess(8), "t").eval()
    images = torch.rand(4, 3, 8, 8)
    means_ND = network(images, frozenset({MEANS})).means_ND
    heard: list[torch.Tensor] = []
    norms = [network.network.get_submodule(name) for name in network.taps.batch_norms]
    hooks = [norm.register_forward_pre_hook(lambda _, args: heard.append(args[0])) for norm in norms]
    network(images)
    [hook.remove() for hook in hooks]
    assert means_ND is not None and torch.allclose(means_ND, torch.cat([x.mean((2, 3)) for x in heard], dim=1))
    assert network.shapes(8, 3, frozenset({MEANS})) == {MEANS: (means_ND.shape[1],)}
    alone = network(images[2:3], frozenset({MEANS})).means_ND
    assert alone is not None and torch.allclose(alone, means_ND[2:3], atol=1e-6)
    named = network(images, frozenset({NAMED_MEANS + "bn2", NAMED_MEANS + "conv1", MAP}))
    assert named.means_ND is not None and named.tensor(NAMED_MEANS + "bn2") is named.means_ND
    of_conv1 = network.preprocess(images).mean((2, 3))  # it runs first, so its input stands first
    assert torch.allclose(named.means_ND[:, :3], of_conv1, atol=1e-6)
    assert torch.equal(named.means_ND[:, 3:], heard[1].mean((2, 3)))
    with pytest.raises(ValueError, match="means.*batch norm"):
        ImageNetwork(_network("lenet5"), _preprocess(32), "l")(torch.rand(1, 3, 32, 32), frozenset({MEANS}))


def test_no_hook_outlives_a_pass() -> None:
    network = ImageNetwork(_network("resnet8"), _preprocess(8), "t").eval()
    network(torch.rand(2, 3, 8, 8), EVERYTHING)
    with pytest.raises(RuntimeError):
        network(torch.rand(2, 5, 8, 8), EVERYTHING)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_a_signal_that_does_not_exist_is_named() -> None:
    plain = ImageNetwork(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), Preprocess(2, 3, [0.0] * 3, [1.0] * 3), "p")
    for need, what in ((BN, "bn term"), (MAP, "convolution map")):
        with pytest.raises(ValueError, match=what):
            plain(torch.rand(1, 3, 2, 2), frozenset({need}))


def test_preprocessing_is_differentiable_and_converts_channels_and_sizes() -> None:
    grey = torch.rand(2, 1, 10, 10, requires_grad=True)
    rgb = Preprocess(8, 3, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0])(grey)
    assert rgb.shape == (2, 3, 8, 8)
    rgb.sum().backward()
    assert grey.grad is not None and (grey.grad != 0).all()
    back = Preprocess(10, 1, [0], [1])(torch.ones(2, 3, 10, 10))  # type: ignore[list-item]
    assert back.dtype == torch.float32 and torch.allclose(back, torch.ones(2, 1, 10, 10))


def test_preprocessing_names_a_wrong_number_of_means() -> None:
    with pytest.raises(ValueError, match="need 3 values"):
        Preprocess(8, 3, [0.5], [0.5])


# ------------------------------------------------------------------------------------------------- folding


@pytest.mark.parametrize("arch", NORMED + ["torchvision/resnet18", "torchvision/mobilenet_v2"])
def test_folding_keeps_the_answers(arch: str) -> None:
    network, size = _network(arch), 32 if arch.startswith(("vgg", "torchvision")) else 8
    images = torch.rand(3, 3, size, size)
    with torch.no_grad():
        expected = network(images)
        folded = fold_batch_norm(copy.deepcopy(network), torch.rand(4, 3, size, size))
        found = folded(images)
    assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    left = sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    all_of_them = sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    assert left < all_of_them
    # Pre-activation networks keep those norms whose input a shortcut shares; the others lose all.
    assert arch.startswith("wrn") == (left > 0)
    assert {p.dtype for p in folded.parameters()} == {torch.float32}


def test_folding_leaves_a_shared_convolution_output_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.bn(x) + x

    # Fresh statistics differ from the identity by batch norm's epsilon alone.
    network = Shared().eval()
    fold_batch_norm(network, torch.rand(2, 3, 4, 4))
    assert isinstance(network.bn, nn.BatchNorm2d)


def test_folding_leaves_batch_norm_without_statistics_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    fold_batch_norm(network, torch.rand(2, 3, 4, 4))
    assert isinstance(network[1], nn.BatchNorm2d)


# ------------------------------------------------------------------------------------------------ teachers


def test_a_teacher_is_sealed() -> None:
    teacher = Teacher(_network("resnet8").train(), _preprocess(8), "t")
    nn.Sequential(teacher).train()
    teacher.train()
    for one in (teacher, teacher.answering(), teacher.answering(fold=False)):
        assert not any(m.training for m in one.modules())
        assert not any(p.requires_grad for p in one.parameters())
    before = copy.deepcopy(teacher.state_dict())
    images = torch.rand(4, 3, 8, 8, requires_grad=True)
    teacher(images, EVERYTHING).logits_NC.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_the_answering_copy_says_the_same_and_shares_nothing() -> None:
    order = [2, 0, 1, 4, 3]
    teacher = Teacher(_network("wrn16_1"), _preprocess(8), "t", class_order=order)
    twin, images = teacher.answering(), torch.rand(4, 3, 12, 12)
    said, again = (one(images, frozenset({LOGITS, MAP, FEATURES})) for one in (teacher, twin))
    assert torch.allclose(said.logits_NC, again.logits_NC, atol=1e-5)
    assert torch.allclose(said.map_NDHW, again.map_NDHW, atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(said.features_ND, again.features_ND, atol=1e-5)  # type: ignore[arg-type]
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in twin.parameters()}


def test_what_is_folded_does_not_depend_on_torchs_generator() -> None:
    teacher = Teacher(build_network("wrn16_1", num_classes=5), _preprocess(8), "t")  # fresh statistics
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(teacher.answering().state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.parametrize("key", ["conv1.weight", "bn2.running_var", "fc.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_refused_by_name(key: str, value: float) -> None:
    network = _network("tiny")
    network.state_dict()[key].view(-1)[0] = value
    with pytest.raises(ValueError, match=rf"teacher bob.*{key}"):
        Teacher(network, _preprocess(8), "bob")


def test_logits_come_in_the_runs_class_order() -> None:
    own, reference = ["ant", "bee", "cat", "dog", "elk"], ["dog", "ant", "elk", "cat", "bee"]
    order = class_order(own, reference, "t")
    images = torch.rand(2, 3, 8, 8)
    plain = Teacher(_network("tiny"), _preprocess(8), "t")(images).logits_NC
    ordered = Teacher(_network("tiny"), _preprocess(8), "t", own, order)(images).logits_NC
    for place, label in enumerate(reference):
        assert torch.equal(ordered[:, place], plain[:, own.index(label)])


def test_equal_orders_move_nothing() -> None:
    assert class_order(["a", "b"], ["a", "b"], "t") is class_order(None, ["a"], "t") is class_order(["a"], None, "t")


@pytest.mark.parametrize("names", [["a", "c"], ["a", "a"]])
def test_other_class_names_are_an_error(names: list[str]) -> None:
    with pytest.raises(ValueError, match="teacher t: class names differ"):
        class_order(names, ["a", "b"], "t")


# -------------------------------------------------------------------------------------- generators, heads


@pytest.mark.parametrize("size", [16, 28, 32, 64, 224])
@pytest.mark.parametrize("head", ["sigmoid", "bn"])
@pytest.mark.parametrize(("blocks", "channels"), [(3, 1), (2, 3)])
def test_generators_meet_any_size(size: int, head: str, blocks: int, channels: int) -> None:
    torch.manual_seed(0)
    generator = Generator(latent=8, width=8, blocks=blocks, size=size, channels=channels, head=head)
    images = generator(torch.randn(4, 8))
    assert images.shape == (4, channels, size, size) and images.isfinite().all()
    assert len(generator.sides) == blocks + 1 and generator.sides[-1] == size
    assert all(a < b <= 2 * a for a, b in zip(generator.sides, generator.sides[1:], strict=False))
    if head == "sigmoid":
        assert images.min() >= 0 and images.max() <= 1
    else:
        assert torch.allclose(images.mean((0, 2, 3)), torch.full((channels,), 0.5), atol=1e-4)
        assert torch.allclose(images.std((0, 2, 3)), torch.full((channels,), 0.25), atol=1e-2)


@pytest.mark.parametrize("head", ["sigmoid", "bn"])
def test_every_parameter_of_a_generator_matters(head: str) -> None:
    """A weight without effect would get rounding errors for a gradient, and Adam steps of full size."""
    torch.manual_seed(0)
    generator = Generator(latent=8, width=8, blocks=2, size=8, channels=3, head=head).double()
    latents, weights = torch.randn(4, 8).double(), torch.randn(4, 3, 8, 8).double()
    (generator(latents).sin() * weights).sum().backward()
    for name, p in generator.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-9, name


@pytest.mark.parametrize(("size", "side", "blocks", "channels"), [(224, 14, 4, 3), (28, 4, 3, 1), (8, 4, 1, 3)])
@pytest.mark.parametrize("head", ["sigmoid", "bn"])
def test_a_generator_of_latents_with_places(size: int, side: int, blocks: int, channels: int, head: str) -> None:
    torch.manual_seed(0)
    generator = make_generator("spatial", 6, 8, blocks, size, channels, head)
    assert isinstance(generator, SpatialGenerator) and generator.latent_shape == (6, side, side)
    latents = torch.randn(3, *generator.latent_shape)
    images = generator(latents)
    assert images.shape == (3, channels, size, size) and images.isfinite().all()
    assert [norm.num_features for norm in generator.norms] == [8, 8, 4, 4, 4][: blocks + 1]
    images.double().sin().mul(torch.randn(images.shape).double()).sum().backward()
    for name, p in generator.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 1e-9, name
    # It has no layer that sees the whole image: far corners do not know of each other.
    if blocks == 4:
        moved = latents.clone()
        moved[:, :, 0, 0] += 1.0
        far = slice(size // 2, None)
        assert torch.equal(generator.eval()(moved)[:, :, far, far], generator(latents)[:, :, far, far])


def test_a_generator_of_no_images() -> None:
    assert Generator(8, 8, 2, 8, 3, "sigmoid").eval()(torch.zeros(0, 8)).shape == (0, 3, 8, 8)


def test_the_vid_head_predicts_a_map_of_the_teachers_depth() -> None:
    head = VIDHead(5, 7, initial_rho())
    assert head(torch.rand(2, 5, 3, 4)).shape == (2, 7, 3, 4)
    assert torch.allclose(variance(head.rho), torch.full((7,), 5.0), atol=1e-4)
    assert parameter_count(head) == 5 * 7 + 7 * 7 * 2 + 7
    F.mse_loss(head(torch.rand(2, 5, 3, 4)), torch.zeros(2, 7, 3, 4)).backward()
    assert all(p.grad is not None for p in head.mean.parameters())


def test_teachers_keep_doubles_and_half_precision() -> None:
    teacher: Any = Teacher(_network("tiny"), _preprocess(8), "t")
    doubles = copy.deepcopy(teacher).double()
    assert doubles(torch.rand(2, 3, 8, 8).double()).logits_NC.dtype == torch.float64
    assert {p.dtype for p in doubles.answering().parameters()} == {torch.float64}
    half = teacher.cast(torch.bfloat16)
    images = torch.rand(2, 3, 8, 8)
    assert half(images).logits_NC.dtype == torch.bfloat16
    assert (half(images).logits_NC.double() - doubles(images.double()).logits_NC).abs().max() < 0.3
    assert half.network.bn1.running_mean.dtype == torch.float32


def test_a_bf16_teacher_with_loose_parameters_runs_under_autocast() -> None:
    torch.manual_seed(0)
    network = build_network("torchvision/convnext_tiny", num_classes=10)
    teacher = Teacher(network, Preprocess(32, 3, [0.5] * 3, [0.25] * 3), "t")
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    full = teacher(images).logits_NC.detach()
    half = teacher.cast(torch.bfloat16)(images).logits_NC
    assert not torch.equal(half.float(), full)
    assert torch.allclose(half.float(), full, atol=0.02 * float(full.abs().max()))
    half.float().sum().backward()
    assert images.grad is not None and float(images.grad.abs().sum()) > 0


def test_a_teacher_whose_answers_depend_on_the_batch_is_refused() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.LazyLinear(3)
    )
    network(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"teacher t: batch norm 1 has no stored statistics"):
        Teacher(network, Preprocess(8, 1, [0.5], [0.25]), "t")
