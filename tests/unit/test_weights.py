"""Weights: public checkpoints load, code is never run, refusals name what is wrong and change nothing."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from dfkd_dist.models import weights
from dfkd_dist.models.registry import build_network
from dfkd_dist.models.weights import WeightsError, load_state, load_weights, read_metadata, save_weights


class TouchesAFile:
    """An object whose unpickling would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def random_state(network: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Values that no fresh network has, in the shapes of `network`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(tensor.shape, generator=generator) + 0.5 if tensor.is_floating_point() else tensor + 3
        for name, tensor in network.state_dict().items()
    }


def clone_state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def assert_same_state(network: nn.Module, expected: dict[str, Tensor]) -> None:
    found = network.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def tiny() -> nn.Module:
    return build_network("tiny", num_classes=10, in_channels=1)


def write(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.suffix != ".legacy")
    return path


# --- what loads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".legacy"])
def test_every_format_loads(tiny: nn.Module, tmp_path: Path, suffix: str) -> None:
    state = random_state(tiny)
    load_weights(tiny, write(state, tmp_path / f"teacher{suffix}"))
    assert_same_state(tiny, state)


def test_safetensors_are_recognised_under_any_name(tiny: nn.Module, tmp_path: Path) -> None:
    path = write(random_state(tiny), tmp_path / "teacher.safetensors").rename(tmp_path / "teacher.pth")
    assert load_state(path).keys() == tiny.state_dict().keys()


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_and_prefixes_are_removed(tiny: nn.Module, tmp_path: Path, wrapper: str, prefix: str) -> None:
    state = random_state(tiny)
    checkpoint = {
        "epoch": 200,
        "arch": "tiny",
        "best_acc1": 95.2,
        wrapper: {prefix + name: tensor for name, tensor in state.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }
    torch.save(checkpoint, tmp_path / "best.pth")
    load_weights(tiny, tmp_path / "best.pth")
    assert_same_state(tiny, state)


def test_nested_wrappers_are_removed(tiny: nn.Module, tmp_path: Path) -> None:
    torch.save({"model": {"state_dict": random_state(tiny)}}, tmp_path / "nested.pth")
    assert load_state(tmp_path / "nested.pth").keys() == tiny.state_dict().keys()


def test_a_prefix_that_only_some_names_have_is_kept(tmp_path: Path) -> None:
    names = ["module.weight", "bias"]
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "x.pth")
    assert list(load_state(tmp_path / "x.pth")) == names


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_missing_batch_counters_are_tolerated(tiny: nn.Module, tmp_path: Path, suffix: str) -> None:
    state = {k: v for k, v in random_state(tiny).items() if not k.endswith("num_batches_tracked")}
    load_weights(tiny, write(state, tmp_path / f"old{suffix}"))
    found = tiny.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert found["bn1.num_batches_tracked"] == 0


def test_half_precision_files_load_into_single_precision(tiny: nn.Module, tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in random_state(tiny).items()}
    load_weights(tiny, write(state, tmp_path / "half.safetensors"))
    assert tiny.conv1.weight.dtype == torch.float32
    assert torch.equal(tiny.conv1.weight, state["conv1.weight"].float())


def rename_keys(state: dict[str, Tensor], *pairs: tuple[str, str]) -> dict[str, Tensor]:
    for ours, theirs in pairs:
        state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    return state


@pytest.mark.parametrize(
    ("arch", "pairs"),
    [
        (
            "lenet5",
            [
                ("conv1.", "features.0."),
                ("conv2.", "features.3."),
                ("conv3.", "features.6."),
                ("fc1.", "fc.0."),
            ]
            + [("fc2.", "fc.2.")],
        ),
        ("resnet18", [("linear.", "fc."), (".shortcut.", ".downsample.")]),
        ("shufflenetv2", [("linear.", "fc.")]),
        ("resnet8", [("fc.", "linear."), (".downsample.", ".shortcut.")]),
        ("wrn16_1", [("fc.", "linear.")]),
    ],
)
def test_other_public_names_are_translated(tmp_path: Path, arch: str, pairs: list[tuple[str, str]]) -> None:
    network = build_network(arch, num_classes=10)
    state = random_state(network)
    public = rename_keys(state, *pairs)
    assert public.keys() != state.keys()
    torch.save({"state_dict": public}, tmp_path / "public.pth")
    load_weights(network, tmp_path / "public.pth")
    assert_same_state(network, state)


def test_torchvision_checkpoint_of_a_small_image_resnet_computes_the_same(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    torch.save(theirs.state_dict(), tmp_path / "r18.pth")
    ours = build_network("resnet18", num_classes=10)
    load_weights(ours, tmp_path / "r18.pth")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)


def test_every_rename_has_a_source_and_no_rule_touches_known_names(tiny: nn.Module) -> None:
    assert all(source for _, _, source in weights.RENAMES)
    state = random_state(tiny)
    assert weights._rename(state, tiny.state_dict()).keys() == state.keys()


# --- what is refused, and that nothing changes then -------------------------------------------------------


def refuse(network: nn.Module, path: Path, match: str, strict: bool = True) -> str:
    before = clone_state(network)
    with pytest.raises(WeightsError, match=match) as caught:
        load_weights(network, path, strict=strict)
    assert_same_state(network, before)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_missing_and_unexpected_tensors_are_named(tiny: nn.Module, tmp_path: Path) -> None:
    state = random_state(tiny)
    state["head.weight"] = state.pop("fc.weight")
    path = write(state, tmp_path / "x.safetensors")
    message = refuse(tiny, path, "missing: fc.weight; unexpected: head.weight")
    assert "TinyNet" in message


def test_eight_names_then_a_count(tiny: nn.Module, tmp_path: Path) -> None:
    state = random_state(tiny) | {f"extra{i}": torch.zeros(1) for i in range(11)}
    message = refuse(tiny, write(state, tmp_path / "x.safetensors"), r"unexpected: .* and 3 more")
    assert message.count("extra") == 8


@pytest.mark.parametrize("strict", [True, False])
def test_wrong_shapes_are_named(tiny: nn.Module, tmp_path: Path, strict: bool) -> None:
    other = build_network("tiny", num_classes=100, in_channels=1)
    path = write(random_state(other), tmp_path / "x.pth")
    message = refuse(tiny, path, r"fc.weight \[100, 96\] instead of \[10, 96\]", strict)
    assert "fc.bias [100] instead of [10]" in message


@pytest.mark.parametrize("strict", [True, False])
def test_integers_for_floats_are_refused(tiny: nn.Module, tmp_path: Path, strict: bool) -> None:
    state = random_state(tiny)
    state["fc.bias"] = torch.zeros(10, dtype=torch.int8)
    refuse(tiny, write(state, tmp_path / "x.pth"), "fc.bias torch.int8 instead of torch.float32", strict)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(tiny: nn.Module, tmp_path: Path, value: float, strict: bool) -> None:
    state = random_state(tiny)
    state["bn2.running_var"][5] = value
    path = write(state, tmp_path / "x.safetensors")
    message = refuse(tiny, path, "NaN or infinity in: bn2.running_var", strict)
    assert "conv1" not in message


def test_several_problems_are_told_at_once(tiny: nn.Module, tmp_path: Path) -> None:
    state = random_state(tiny)
    state["fc.bias"] = torch.zeros(3)
    state["conv1.weight"].fill_(float("nan"))
    del state["bn3.weight"]
    message = refuse(tiny, write(state, tmp_path / "x.pth"), "wrong shape")
    assert "conv1.weight" in message and "missing: bn3.weight" in message


def test_not_strict_loads_what_fits(tiny: nn.Module, tmp_path: Path) -> None:
    state, before = random_state(tiny), clone_state(tiny)
    del state["fc.weight"]
    state["head.weight"] = torch.zeros(2)
    load_weights(tiny, write(state, tmp_path / "x.pth"), strict=False)
    found = tiny.state_dict()
    assert torch.equal(found["fc.weight"], before["fc.weight"])
    assert torch.equal(found["conv1.weight"], state["conv1.weight"])


def test_not_strict_still_refuses_another_network(tiny: nn.Module, tmp_path: Path) -> None:
    path = write({"w": torch.zeros(1)}, tmp_path / "x.pth")
    refuse(tiny, path, "none of its 1 tensors", strict=False)


@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"state_dict": {"w": bomb}}])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_torch_file_is_refused_and_not_run(tiny: nn.Module, tmp_path: Path, wrap, zipped: bool) -> None:
    touched = tmp_path / "touched"
    path = tmp_path / "evil.pth"
    torch.save(wrap(TouchesAFile(touched)), path, _use_new_zipfile_serialization=zipped)
    message = refuse(tiny, path, "refused.*never run")
    assert "safetensors.torch.save_file" in message and "system" in message
    assert not touched.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("protocol", "message"), [(0, "evil.pt"), (2, "refused.*system"), (4, "refused"), (5, "refused")]
)
def test_code_in_a_plain_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int, message: str) -> None:
    touched = tmp_path / "touched"
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps({"w": TouchesAFile(touched)}, protocol=protocol))
    with pytest.raises(WeightsError, match=message):
        load_state(path)
    assert not touched.exists()


def test_the_evil_file_would_have_run_code(tmp_path: Path) -> None:
    """The control: an unsafe reader does run it, so the tests above test something."""
    pickle.loads(pickle.dumps(TouchesAFile(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


def test_a_whole_pickled_network_is_refused(tiny: nn.Module, tmp_path: Path) -> None:
    torch.save(tiny, tmp_path / "network.pth")
    refuse(tiny, tmp_path / "network.pth", "refused.*TinyNet")


def test_harmless_foreign_objects_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"opt": argparse.Namespace(lr=0.1), "model": {}}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="refused.*argparse.Namespace"):
        load_state(tmp_path / "x.pth")


def test_a_missing_file_is_named(tiny: nn.Module, tmp_path: Path) -> None:
    refuse(tiny, tmp_path / "nowhere.pth", "no such file")
    refuse(tiny, tmp_path, "no such file")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_an_empty_file_is_named(tiny: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"empty{suffix}"
    path.touch()
    refuse(tiny, path, "the file is empty")


@pytest.mark.parametrize("kept", [0.0001, 0.3, 0.99])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".legacy"])
def test_a_truncated_file_is_named(tiny: nn.Module, tmp_path: Path, suffix: str, kept: float) -> None:
    path = write(random_state(tiny), tmp_path / f"cut{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: max(20, int(len(content) * kept))])
    refuse(tiny, path, "truncated or damaged")


@pytest.mark.parametrize("content", [b"hello, these are not weights\n", b"\x00" * 64, b"<!DOCTYPE html><html>"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_another_kind_of_file_is_named(tiny: nn.Module, tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_bytes(content)
    refuse(tiny, path, "truncated or damaged")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds a Tensor, not a mapping"),
        ([torch.zeros(3)], "holds a list, not a mapping"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        (
            {"epoch": 3, "student": {}},
            r"not tensors: epoch \(int\), student \(dict\); .*state_dict, model, net",
        ),
    ],
)
def test_files_without_a_state_dict_are_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=message):
        load_state(tmp_path / "x.pth")


# --- saving -----------------------------------------------------------------------------------------------


def test_saved_weights_load_with_their_metadata(tiny: nn.Module, tmp_path: Path) -> None:
    state = random_state(tiny)
    path = tmp_path / "new" / "student.safetensors"
    save_weights(state, path, {"arch": "tiny", "classes": "0,1"})
    load_weights(tiny, path)
    assert_same_state(tiny, state)
    assert read_metadata(path) == {"arch": "tiny", "classes": "0,1"}
    assert [entry.name for entry in path.parent.iterdir()] == ["student.safetensors"]


def test_shared_and_strided_tensors_are_stored_as_copies(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    image = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {"a": base, "tied": base, "view": base[1], "turned": base.transpose(0, 2), "image": image}
    state["grad"] = torch.zeros(2, requires_grad=True)
    save_weights(state, tmp_path / "x.safetensors")
    loaded = load_state(tmp_path / "x.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert read_metadata(tmp_path / "x.safetensors") == {}


@pytest.mark.parametrize(("module", "step"), [(safetensors.torch, "save_file"), (os, "fsync"), (os, "replace")])
def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, step: str
) -> None:
    path = tmp_path / "x.safetensors"
    save_weights({"w": torch.ones(2)}, path)

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(module, step, full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_weights({"w": torch.zeros(2)}, path)
    assert torch.equal(load_state(path)["w"], torch.ones(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_only_tensors_and_text_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(WeightsError, match="not tensors: epoch"):
        save_weights({"w": torch.zeros(1), "epoch": 3}, path)  # type: ignore[dict-item]
    with pytest.raises(WeightsError, match="metadata 'epoch' must be text, got int"):
        save_weights({"w": torch.zeros(1)}, path, {"epoch": 3})  # type: ignore[dict-item]
    assert not path.exists()


def test_metadata_of_another_file_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        read_metadata(tmp_path / "x.pth")
