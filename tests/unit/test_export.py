"""The student's files: read back they say the same, as safetensors and as ONNX."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dfkd_dist
from dfkd_dist.config import ImageSpec, Recipe, parse
from dfkd_dist.engine.build import Build, build
from dfkd_dist.engine.export import export_onnx, export_student
from dfkd_dist.models.cards import Card, save_network
from dfkd_dist.models.registry import build_network
from dfkd_dist.models.weights import WeightsError, load_state
from tests.recipes import CLASSES, NAMES, dfmf, stir, write_teachers

CPU = torch.device("cpu")


def trained(folder: Path, **changes: object) -> Build:
    single = {"precision": {"train": "fp32", "teacher": "fp32"}, "rounds": {"warmup": 1, "main": 2}}
    one = build(parse(Recipe, dfmf(write_teachers(folder, 2), **{**single, **changes})), CPU)
    one.trainer.fit()
    return one


def logits(network: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return network(images).logits_NC


@pytest.mark.parametrize("size", [None, 12])
def test_a_loaded_student_says_the_same(tmp_path: Path, size: int | None) -> None:
    one, images = trained(tmp_path, student={"size": size}), torch.rand(6, 3, 8, 8)
    summary = {"name": "n", "method": "m", "seed": 3, "student": {"accuracy": 12.5}, "teachers": [1]}
    path, beside = export_student(one, tmp_path / "out" / "student.safetensors", summary)
    assert sorted(path.parent.iterdir()) == [beside, path]
    loaded = dfkd_dist.load_student(path)
    assert not loaded.training
    # The same numbers bit by bit in the same memory layout; another layout has kernels of its own.
    expected = logits(one.side.network.eval(), images)
    assert torch.allclose(logits(loaded, images), expected, atol=1e-5)
    assert torch.equal(logits(loaded.to(memory_format=torch.channels_last), images), expected)
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["about"] == {"name": "n", "method": "m", "seed": 3, "accuracy": 12.5} and card["classes"] == NAMES


def test_only_the_network_is_exported(tmp_path: Path) -> None:
    one = trained(tmp_path)
    assert any("vid.heads" in name for name in one.side.state_dict())
    found = load_state(export_student(one, tmp_path / "s.safetensors")[0])
    assert set(found) == set(build_network("tiny", num_classes=CLASSES, in_channels=3).state_dict())


def test_double_precision_is_stored_single(tmp_path: Path) -> None:
    one = trained(tmp_path, precision={"train": "fp64", "teacher": "fp64"})
    path, images = export_student(one, tmp_path / "s.safetensors")[0], torch.rand(6, 3, 8, 8)
    assert {value.dtype for value in load_state(path).values()} == {torch.float32, torch.int64}
    said = logits(dfkd_dist.load_student(path), images)
    assert torch.allclose(said, logits(one.side.network.eval(), images.double()).float(), atol=1e-4)


def test_a_missing_student_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="student.json"):
        dfkd_dist.load_student(tmp_path / "student.safetensors")


def saved(folder: Path, arch: str, size: int, channels: int) -> Path:
    card = Card(arch, CLASSES, size, channels, [0.4] * channels, [0.2] * channels, NAMES)
    torch.manual_seed(0)
    network = stir(build_network(arch, num_classes=CLASSES, in_channels=channels), seed=1)
    save_network(folder / "net.safetensors", network.state_dict(), card)
    return folder / "net.safetensors"


@pytest.mark.parametrize(
    ("arch", "size", "channels", "image"),
    [("tiny", 8, 3, ImageSpec(size=8, channels=3)), ("resnet8", 12, 1, ImageSpec(size=8, channels=3))],
    ids=["as_it_is", "resized_and_grey"],
)
def test_onnx_says_the_same_for_any_batch(
    tmp_path: Path, arch: str, size: int, channels: int, image: ImageSpec
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = saved(tmp_path, arch, size, channels)
    out = export_onnx(path, tmp_path / "out" / "net.onnx", image)
    assert [p.name for p in out.parent.iterdir()] == ["net.onnx"]
    model = onnx.load(str(out))
    onnx.checker.check_model(model, full_check=True)
    (given,), (answer,) = model.graph.input, model.graph.output
    assert (given.name, answer.name) == ("images", "logits")
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["batch", 3, 8, 8]
    assert [d.dim_param or d.dim_value for d in answer.type.tensor_type.shape.dim] == ["batch", CLASSES]
    network = dfkd_dist.load_student(path)
    for count in (1, 5):
        images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
        said = torch.from_numpy(run_onnx(out, images))
        assert torch.allclose(said, logits(network, images), atol=1e-4)


def run_onnx(path: Path, images: Tensor) -> object:
    """With the real runtime where there is one, else with ONNX's own reference."""
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return ReferenceEvaluator(str(path)).run(None, {"images": images.numpy()})[0]
    return onnxruntime.InferenceSession(str(path)).run(None, {"images": images.numpy()})[0]


def test_missing_onnx_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'dfkd-dist\[onnx\]'"):
        export_onnx(tmp_path / "net.safetensors", tmp_path / "net.onnx", ImageSpec(size=8, channels=3))
    assert list(tmp_path.iterdir()) == []
