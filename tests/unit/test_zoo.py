"""The zoo's networks: shapes, sizes, gradients, public parameter names, and agreement with torchvision's."""

import builtins
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dfkd_dist.models.registry import ZOO, build_network, network_names, replace_classifier

CHEAP = ["tiny", "resnet8", "lenet5", "wrn16_1", "shufflenetv2", "mobilenetv2"]
DISTINCT = [name for name in network_names() if not name.endswith("_bn")]

# RepDistiller's figures at 100 classes, then those of the CIFAR-10 literature (3 channels throughout).
PARAMETERS = [
    ("resnet8x4", 100, 1_233_540),
    ("resnet32x4", 100, 7_433_860),
    ("resnet110", 100, 1_736_564),
    ("wrn16_2", 100, 703_284),
    ("wrn40_1", 100, 569_780),
    ("wrn40_2", 100, 2_255_156),
    ("vgg8", 100, 3_965_028),
    ("vgg13", 100, 9_462_180),
    ("mobilenetv2", 100, 812_836),
    ("shufflenetv1", 100, 949_258),
    ("shufflenetv2", 100, 1_355_528),
    ("resnet8", 100, 83_892),
    ("resnet20", 100, 278_324),
    ("resnet32", 100, 472_756),
    ("resnet56", 100, 861_620),
    ("resnet18", 10, 11_173_962),
    ("resnet34", 10, 21_282_122),
    ("resnet50", 10, 23_520_842),
    ("vgg11", 10, 9_231_114),
    ("vgg13", 10, 9_416_010),
    ("vgg16", 10, 14_728_266),
    ("wrn16_1", 10, 175_066),
    ("wrn40_2", 10, 2_243_546),
    ("resnet110x2", 10, 6_899_610),
    ("resnet116", 10, 1_827_930),
]


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("arch", "num_classes", "expected"), PARAMETERS)
def test_parameter_count_is_the_published_one(arch: str, num_classes: int, expected: int) -> None:
    with torch.device("meta"):
        assert count_parameters(build_network(arch, num_classes=num_classes)) == expected


@pytest.mark.parametrize(("arch", "expected"), [("lenet5", 61_706), ("lenet5_half", 15_738)])
def test_lenet_parameter_count_on_grey_images(arch: str, expected: int) -> None:
    assert count_parameters(build_network(arch, num_classes=10, in_channels=1)) == expected


def test_the_promised_names_are_there() -> None:
    promised = """tiny lenet5 lenet5_half resnet8 resnet18 resnet34 resnet50 resnet110 resnet110x2 resnet116
        resnet8x4 resnet32x4 wrn16_1 wrn16_2 wrn40_1 wrn40_2 vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn
        mobilenetv2 shufflenetv1 shufflenetv2""".split()
    assert set(promised) <= set(network_names())
    assert network_names() == sorted(ZOO)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("arch", DISTINCT)
def test_logits_at_small_sizes(arch: str, channels: int) -> None:
    network = build_network(arch, num_classes=7, in_channels=channels).eval()
    with torch.no_grad():
        for size in (16, 28, 32):
            logits_NC = network(torch.randn(1, channels, size, size))
            assert logits_NC.shape == (1, 7)
            assert torch.isfinite(logits_NC).all()


@pytest.mark.parametrize("arch", [*CHEAP, "vgg8", "shufflenetv1"])
def test_logits_at_64_px_and_on_oblong_images(arch: str) -> None:
    network = build_network(arch, num_classes=5).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 3, 64, 64)).shape == (2, 5)
        assert network(torch.randn(2, 3, 33, 47)).shape == (2, 5)


@pytest.mark.parametrize("arch", DISTINCT)
def test_gradients_reach_every_parameter_and_the_images(arch: str) -> None:
    torch.manual_seed(0)
    network = build_network(arch, num_classes=4).train()
    images = torch.randn(4, 3, 16, 16, requires_grad=True)
    F.cross_entropy(network(images), torch.arange(4)).backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("arch", DISTINCT)
def test_evaluation_is_deterministic_and_leaves_buffers_and_images_alone(arch: str) -> None:
    network = build_network(arch, num_classes=3).eval()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    images = torch.randn(2, 3, 16, 16)
    kept = images.clone()
    with torch.no_grad():
        first, second = network(images), network(images)
    assert torch.equal(first, second)
    assert torch.equal(images, kept)
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("arch", DISTINCT)
def test_parts_are_plain_batch_norm_without_dropout_or_in_place_relu(arch: str) -> None:
    with torch.device("meta"):
        network = build_network(arch, num_classes=3)
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert all(type(norm) is nn.BatchNorm2d for norm in norms)
    assert bool(norms) != arch.startswith("lenet5")
    assert not any(isinstance(module, nn.Dropout) for module in network.modules())
    assert not any(getattr(module, "inplace", False) for module in network.modules())


def test_vgg_with_and_without_suffix_is_the_same_network() -> None:
    with torch.device("meta"):
        plain = build_network("vgg11", num_classes=10).state_dict()
        suffixed = build_network("vgg11_bn", num_classes=10).state_dict()
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in suffixed.items()}


# --- agreement with independent implementations -----------------------------------------------------------


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Randomise `source` (batch statistics too) and copy its tensors to `target` by position."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in source.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if "running_var" in name else noise * 0.1 + tensor)
    for ours, theirs in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        ours.copy_(theirs)


def torchvision_resnet_for_small_images(arch: str) -> nn.Module:
    network = torchvision.models.get_model(arch, num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def torchvision_shufflenet_for_small_images() -> nn.Module:
    network = torchvision.models.shufflenet_v2_x1_0(num_classes=10)
    network.conv1[0] = nn.Conv2d(3, 24, 1, bias=False)
    network.maxpool = nn.Identity()
    return network


def torchvision_vgg_for_small_images() -> nn.Module:
    layers = list(torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True))
    pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    kept = [layer for i, layer in enumerate(layers) if i not in pools[3:]]
    return nn.Sequential(*kept, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def torchvision_blocks_resnet8x4() -> nn.Module:
    block = torchvision.models.resnet.BasicBlock

    def stage(c_in: int, c_out: int, stride: int) -> nn.Module:
        projection = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        return block(c_in, c_out, stride, projection)

    stem = [nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    stages = [stage(32, 64, 1), stage(64, 128, 2), stage(128, 256, 2)]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


@pytest.mark.parametrize(
    ("arch", "reference"),
    [
        ("resnet18", lambda: torchvision_resnet_for_small_images("resnet18")),
        ("resnet50", lambda: torchvision_resnet_for_small_images("resnet50")),
        ("shufflenetv2", torchvision_shufflenet_for_small_images),
        ("vgg11", torchvision_vgg_for_small_images),
        ("resnet8x4", torchvision_blocks_resnet8x4),
    ],
)
def test_same_function_as_torchvision_parts(arch: str, reference) -> None:
    theirs, ours = reference().eval(), build_network(arch, num_classes=10).eval()
    copy_in_order(theirs, ours)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


class FromState:
    """The layers of a network written once more, by name, for the families that torchvision does not have."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2, groups=groups)

    def bn(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def linear(self, name: str, maps: Tensor) -> Tensor:
        return maps.mean((2, 3)) @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def wrn16_2(self, x: Tensor) -> Tensor:
        """Zagoruyko and Komodakis 2016, Fig. 1(d) without dropout."""
        x = self.conv("conv1", x)
        for stage in (1, 2, 3):
            for i in (0, 1):
                name, stride = f"block{stage}.layer.{i}", 2 if stage > 1 and i == 0 else 1
                active = self.bn(f"{name}.bn1", x).relu()
                out = self.conv(f"{name}.conv1", active, stride)
                out = self.conv(f"{name}.conv2", self.bn(f"{name}.bn2", out).relu())
                x = out + (self.conv(f"{name}.convShortcut", active, stride) if i == 0 else x)
        return self.linear("fc", self.bn("bn1", x).relu())

    def shufflenetv1(self, x: Tensor) -> Tensor:
        """Zhang et al. 2018, Fig. 2(b) and (c), with ReLU after the depthwise convolution."""
        x = self.bn("bn1", self.conv("conv1", x)).relu()
        for stage, units in ((1, 4), (2, 8), (3, 4)):
            for i in range(units):
                name, stride = f"layer{stage}.{i}", 2 if i == 0 else 1
                groups = 1 if (stage, i) == (1, 0) else 3
                out = self.bn(f"{name}.bn1", self.conv(f"{name}.conv1", x, groups=groups)).relu()
                hidden = out.shape[1]
                order = torch.arange(hidden).view(groups, -1).T.flatten()
                out = self.conv(f"{name}.conv2", out[:, order], stride, groups=hidden)
                out = self.bn(f"{name}.bn2", out).relu()
                out = self.bn(f"{name}.bn3", self.conv(f"{name}.conv3", out, groups=3))
                x = torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1).relu() if i == 0 else (out + x).relu()
        return self.linear("linear", x)

    def mobilenetv2(self, x: Tensor) -> Tensor:
        """Sandler et al. 2018, Fig. 4(d), with ReLU and RepDistiller's strides."""
        x = self.bn("conv1.1", self.conv("conv1.0", x, 2)).relu()
        for stage, (units, stage_stride) in enumerate([(1, 1), (2, 1), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1)]):
            for i in range(units):
                name, stride = f"blocks.{stage}.{i}.conv", stage_stride if i == 0 else 1
                out = self.bn(f"{name}.1", self.conv(f"{name}.0", x)).relu()
                out = self.bn(f"{name}.4", self.conv(f"{name}.3", out, stride, groups=out.shape[1])).relu()
                out = self.bn(f"{name}.7", self.conv(f"{name}.6", out))
                x = x + out if i > 0 else out
        return self.linear("classifier.0", self.bn("conv2.1", self.conv("conv2.0", x)).relu())


@pytest.mark.parametrize("arch", ["wrn16_2", "shufflenetv1", "mobilenetv2"])
def test_same_function_as_written_from_the_paper(arch: str) -> None:
    network = build_network(arch, num_classes=10).eval()
    copy_in_order(network, network)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = getattr(FromState(network.state_dict()), arch)(images)
        assert expected.std() > 1e-3  # a network that forgot its input would agree with anything
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)


def test_lenet_pads_28_px_by_two_on_each_side() -> None:
    network = build_network("lenet5", num_classes=10, in_channels=1).eval()
    images = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(network(images), network(F.pad(images, (2, 2, 2, 2))))


# --- parameter names of public checkpoints ----------------------------------------------------------------

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def bn(name: str, channels: int) -> Shapes:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (channels,)
    yield f"{name}.num_batches_tracked", ()


def linear(name: str, c_in: int, c_out: int) -> Shapes:
    yield f"{name}.weight", (c_out, c_in)
    yield f"{name}.bias", (c_out,)


def public_wrn40_2() -> Shapes:
    yield "conv1.weight", (16, 3, 3, 3)
    widths = [16, 32, 64, 128]
    for stage in (1, 2, 3):
        c_in, c_out = widths[stage - 1], widths[stage]
        for i in range(6):
            c = c_in if i == 0 else c_out
            name = f"block{stage}.layer.{i}"
            yield from bn(f"{name}.bn1", c)
            yield f"{name}.conv1.weight", (c_out, c, 3, 3)
            yield from bn(f"{name}.bn2", c_out)
            yield f"{name}.conv2.weight", (c_out, c_out, 3, 3)
            if i == 0:
                yield f"{name}.convShortcut.weight", (c_out, c, 1, 1)
    yield from bn("bn1", 128)
    yield from linear("fc", 128, 10)


def public_resnet34() -> Shapes:
    yield "conv1.weight", (64, 3, 3, 3)
    yield from bn("bn1", 64)
    c = 64
    for stage, (width, depth) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for i in range(depth):
            name = f"layer{stage}.{i}"
            yield f"{name}.conv1.weight", (width, c, 3, 3)
            yield from bn(f"{name}.bn1", width)
            yield f"{name}.conv2.weight", (width, width, 3, 3)
            yield from bn(f"{name}.bn2", width)
            if c != width:
                yield f"{name}.shortcut.0.weight", (width, c, 1, 1)
                yield from bn(f"{name}.shortcut.1", width)
            c = width
    yield from linear("linear", 512, 10)


def public_vgg11() -> Shapes:
    c = 3
    for block, widths in enumerate([[64], [128], [256, 256], [512, 512], [512, 512]]):
        for i, width in enumerate(widths):
            yield f"block{block}.{3 * i}.weight", (width, c, 3, 3)
            yield f"block{block}.{3 * i}.bias", (width,)
            yield from bn(f"block{block}.{3 * i + 1}", width)
            c = width
    yield from linear("classifier", 512, 10)


def public_resnet8x4() -> Shapes:
    yield "conv1.weight", (32, 3, 3, 3)
    yield from bn("bn1", 32)
    widths = [32, 64, 128, 256]
    for stage in (1, 2, 3):
        c_in, c_out = widths[stage - 1], widths[stage]
        name = f"layer{stage}.0"
        yield f"{name}.conv1.weight", (c_out, c_in, 3, 3)
        yield from bn(f"{name}.bn1", c_out)
        yield f"{name}.conv2.weight", (c_out, c_out, 3, 3)
        yield from bn(f"{name}.bn2", c_out)
        yield f"{name}.downsample.0.weight", (c_out, c_in, 1, 1)
        yield from bn(f"{name}.downsample.1", c_out)
    yield from linear("fc", 256, 10)


@pytest.mark.parametrize(
    ("arch", "public"),
    [
        ("wrn40_2", public_wrn40_2),
        ("resnet34", public_resnet34),
        ("vgg11", public_vgg11),
        ("resnet8x4", public_resnet8x4),
    ],
)
def test_state_dict_has_the_public_names_and_shapes(arch: str, public) -> None:
    with torch.device("meta"):
        state = build_network(arch, num_classes=10).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == dict(public())


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("mobilenetv2", ["conv1.0.weight", "blocks.1.1.conv.6.weight", "conv2.1.bias", "classifier.0.bias"]),
        ("shufflenetv1", ["bn1.weight", "layer2.7.conv3.weight", "layer3.3.bn3.bias", "linear.bias"]),
        ("shufflenetv2", ["layer1.0.conv5.weight", "layer2.7.bn3.weight", "conv2.weight", "linear.weight"]),
        ("lenet5", ["conv3.weight", "fc1.bias", "fc2.weight"]),
    ],
)
def test_state_dict_has_these_public_names(arch: str, names: list[str]) -> None:
    with torch.device("meta"):
        assert set(names) <= set(build_network(arch, num_classes=10).state_dict())


# --- the registry -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "kwargs", "message"),
    [
        ("resnet81", {}, "unknown network 'resnet81'.*resnet18"),
        ("ResNet18", {}, "nearest names are.*resnet18"),
        ("xyzzy", {}, "valid names are lenet5.*torchvision/NAME, timm/NAME"),
        ("hub/resnet18", {}, "unknown network 'hub/resnet18'"),
        ("torchvision/resnet81", {}, "unknown network 'torchvision/resnet81'.*resnet18"),
        ("torchvision/fcn_resnet50", {}, "unknown network"),
        ("torchvision/resnet18", {"in_channels": 1}, "takes 3 channels, got in_channels=1"),
        ("torchvision/googlenet", {}, "auxiliary outputs"),
        ("tiny", {"num_classes": 0}, "num_classes of 'tiny' must be at least 1, got 0"),
        ("tiny", {"in_channels": 0}, "in_channels of 'tiny' must be at least 1, got 0"),
        ("tiny", {"pretrained": True}, "'tiny' has no library weights"),
    ],
)
def test_what_cannot_be_built_is_refused(arch: str, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(arch, **{"num_classes": 10, **kwargs})


def test_torchvision_network_has_the_requested_classes() -> None:
    network = build_network("torchvision/mobilenet_v3_small", num_classes=6).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 3, 64, 64)).shape == (1, 6)


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11_bn", "squeezenet1_1", "densenet121", "vit_b_16", "swin_t", "maxvit_t"]
)
def test_replaced_classifier_is_the_one_that_num_classes_sets(name: str) -> None:
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
        replace_classifier(network, 7)
        wanted = torchvision.models.get_model(name, num_classes=7)
    shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in wanted.state_dict().items()}


def test_pretrained_keeps_the_library_weights_except_the_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    library = torchvision.models.resnet18()
    asked: list[str] = []

    def get_model(name: str, *, weights: str) -> nn.Module:
        asked.append(f"{name} {weights}")
        return library

    kept: dict[str, Tensor] = {name: tensor.clone() for name, tensor in library.state_dict().items()}
    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    same = build_network("torchvision/resnet18", num_classes=1000, pretrained=True)
    assert torch.equal(same.state_dict()["fc.weight"], kept["fc.weight"])
    network = build_network("torchvision/resnet18", num_classes=4, pretrained=True)
    assert asked == ["resnet18 DEFAULT"] * 2
    state = network.state_dict()
    assert state["fc.weight"].shape == (4, 512)
    for name, tensor in kept.items():
        assert name.startswith("fc.") or torch.equal(state[name], tensor), name


def test_a_network_without_classifier_cannot_have_it_replaced() -> None:
    with pytest.raises(ValueError, match="Sequential has no linear layer"):
        replace_classifier(nn.Sequential(nn.ReLU()), 3)


def test_timm_network_takes_any_number_of_channels() -> None:
    pytest.importorskip("timm", reason="timm is an extra")
    network = build_network("timm/resnet10t", num_classes=6, in_channels=1).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 1, 32, 32)).shape == (1, 6)
    with pytest.raises(ValueError, match="unknown network 'timm/resnet10tt'.*resnet10t"):
        build_network("timm/resnet10tt", num_classes=6)


def test_missing_timm_is_an_error_that_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_timm(name: str, *args, **kwargs):
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_timm)
    with pytest.raises(ImportError, match=r"pip install 'dfkd-dist\[timm\]'"):
        build_network("timm/resnet10t", num_classes=6)
