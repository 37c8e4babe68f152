"""Who looks at which images: networks and collections by name, class balance, contact sheets, maps of features."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.io import decode_png, encode_png, read_file

from dfkd_dist.config import DatasetSpec, Recipe, parse
from dfkd_dist.data.datasets import DatasetError, load_image_set, to_uint8
from dfkd_dist.engine.build import Build, build
from dfkd_dist.engine.figures import PADDING
from dfkd_dist.engine.look.balance import Balance, class_balance, draw_balance
from dfkd_dist.engine.look.collection import Collection, GeneratorCollection, SetCollection, folder_collection
from dfkd_dist.engine.look.fid import Fid, FidByClass
from dfkd_dist.engine.look.named import Finder
from dfkd_dist.engine.look.networks import feature_network, judge, run_classes
from dfkd_dist.engine.look.results import lines, write_results
from dfkd_dist.engine.look.sheet import draw_sheet, save_sheet, sheet_rows
from dfkd_dist.engine.look.tsne import Map, draw_maps, map_of_classes, map_of_collections, project
from dfkd_dist.engine.teachers import teacher_weights
from dfkd_dist.models.cards import Card, save_network
from dfkd_dist.models.registry import build_network
from tests.image_data import pictures, spec_of, write_folder, write_npz
from tests.looks import CPU, Given, by_first_pixel, of_rows, pixels
from tests.recipes import NAMES, dfmf, labelled, stir, write_teachers
from tests.voters import image_set, speak_up


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A run of three unlike teachers; the second has its classes in another order."""
    return speak_up(build(parse(Recipe, dfmf(write_teachers(tmp_path_factory.mktemp("looks"), 3))), CPU))


def everything(collection: Collection, batch: int = 7) -> torch.Tensor:
    return torch.cat([seen.bytes() for seen in collection.batches(batch)])


def picture(path: Path) -> torch.Tensor:
    return decode_png(read_file(str(path)))


# ------------------------------------------------------------------------------------------- networks


def test_judges_answer_in_the_runs_class_order(built: Build) -> None:
    images = Given(pictures(30))
    seen = next(iter(images.batches(30)))
    with torch.no_grad():
        said = {t.name: t(seen.floats(CPU, torch.float64)).logits_NC.softmax(dim=1) for t in built.teachers}
        said["student"] = built.side.network.eval()(seen.floats(CPU, torch.float64)).logits_NC.softmax(dim=1)
    said["ensemble"] = sum(w * said[f"t{k}"] for k, w in enumerate(teacher_weights(built.recipe)))
    for name, probs_NC in said.items():
        choice_N, confidence_N = judge(built, name)(seen)
        assert torch.equal(choice_N, probs_NC.argmax(dim=1)), name
        assert torch.allclose(confidence_N.double(), probs_NC.max(dim=1).values, atol=1e-6)
    assert judge(built).name == "ensemble" and judge(built).classes == tuple(NAMES)
    assert len({tuple(p.argmax(dim=1).tolist()) for p in said.values()}) > 3


def test_a_judge_from_a_file_has_its_classes_reordered(built: Build, tmp_path: Path) -> None:
    card = Card("tiny", 5, 8, 3, [0.4] * 3, [0.3] * 3, NAMES[::-1])
    network = stir(build_network("tiny", num_classes=5), seed=3)
    save_network(tmp_path / "other.safetensors", network.state_dict(), card)
    seen = next(iter(Given(pictures(40)).batches(40)))
    with torch.no_grad():
        own_N = network.eval()(card.preprocess()(seen.floats(CPU))).argmax(dim=1)
    assert torch.equal(judge(built, str(tmp_path / "other.safetensors"))(seen)[0], 4 - own_N)
    few = Card("tiny", 3, 8, 3, [0.4] * 3, [0.3] * 3)
    save_network(tmp_path / "few.safetensors", build_network("tiny", num_classes=3).state_dict(), few)
    with pytest.raises(ValueError, match="has 3 classes, the run has 5"):
        judge(built, str(tmp_path / "few.safetensors"))
    assert feature_network(built, str(tmp_path / "few.safetensors"))(torch.rand(2, 3, 8, 8)).shape[0] == 2


def test_features_are_what_enters_the_last_layer(built: Build) -> None:
    images = Given(pictures(12))
    seen = next(iter(images.batches(12)))
    for name in ("t0", "t1", "t2", "student"):
        network = feature_network(built, name)
        features_ND = network.of(seen)
        owner = built.side.network if name == "student" else next(t for t in built.teachers if t.name == name)
        last = [m for m in owner.network.modules() if isinstance(m, torch.nn.Linear)][-1]
        with torch.no_grad():
            logits_NC = owner.eval()(seen.floats(CPU, torch.float64)).logits_NC
            order = getattr(owner, "class_order", None)
            again_NC = last(features_ND)
        assert torch.allclose(again_NC if order is None else again_NC[:, order], logits_NC, atol=1e-9)
        assert features_ND.dtype == torch.float64 and network.name == name
    assert feature_network(built).name == "t0"


def test_looking_changes_nothing(built: Build) -> None:
    student = built.side.network.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    seen = next(iter(Given(pictures(9)).batches(9)))
    feature_network(built, "student").of(seen)
    judge(built, "student")(seen)
    assert student.training and all(p.requires_grad for p in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("find", [judge, feature_network])
def test_an_unknown_network_is_refused_with_what_is_allowed(built: Build, find: Any) -> None:
    with pytest.raises(ValueError, match=r"'t9': no such network; allowed: t0, t1, t2, student.* weights file"):
        find(built, "t9")


def test_a_run_without_teachers_asks_its_student(tmp_path: Path) -> None:
    one = build(parse(Recipe, labelled(tmp_path)), CPU)
    assert judge(one).name == feature_network(one).name == "student" and run_classes(one) == list("01234")
    with pytest.raises(ValueError, match="judge ensemble: the run has no teachers"):
        judge(one, "ensemble")


# ------------------------------------------------------------------------------------------ collections


def test_generators_images_are_those_of_sample(built: Build) -> None:
    source: Any = built.source
    whole = GeneratorCollection(source, source.kits, 26, 11, "made")
    sizes = [8, 9, 9]  # 26 images of three generators, in slices of at most the run's batch of 11
    expected = torch.cat([source.sample(kit, n) for kit, n in zip(source.kits, sizes, strict=True)])
    found = list(whole.batches(4))
    assert torch.equal(torch.cat([seen.images_NCHW for seen in found]), expected)
    assert torch.cat([seen.numbers_N for seen in found]).tolist() == list(range(26)) and len(whole) == 26
    assert all(seen.labels_N is None and len(seen.images_NCHW) <= 4 for seen in found)
    assert len(whole.part(10)) == 10 and len(whole.part(99)) == 26


def test_generators_slices_follow_the_latents(built: Build) -> None:
    source: Any = built.source
    kit = source.kits[0]
    long = GeneratorCollection(source, [kit], 25, 11, "made")
    slices = [source.sample(kit, stop - start, start) for start, stop in ((0, 8), (8, 16), (16, 25))]
    assert torch.equal(torch.cat([s.images_NCHW for s in long.batches(3)]), torch.cat(slices))
    assert not torch.allclose(slices[0], slices[1])
    with pytest.raises(ValueError, match="at least one image of each of 3 generators, found 2"):
        GeneratorCollection(source, source.kits, 2, 11, "made")


def test_a_folder_is_images_without_labels(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", {"cat": 4, "dog": 3})
    (tmp_path / "photos" / "loose.png").write_bytes(encode_png(pictures(1)[0]).numpy().tobytes())
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    found = folder_collection(tmp_path / "photos", 8, 1)
    assert len(found) == 8 and found.classes is None and everything(found).shape == (8, 1, 8, 8)
    assert all(seen.labels_N is None for seen in found.batches(5))
    (tmp_path / "empty").mkdir()
    for path, message in (("none", "no such folder"), ("empty", "found no images")):
        with pytest.raises(DatasetError, match=message):
            folder_collection(tmp_path / path, 8, 1)


def test_words_mean_collections(built: Build, tmp_path: Path) -> None:
    archive = write_npz(tmp_path / "set.npz")
    write_folder(tmp_path / "photos", {"x": 5})
    dataset = DatasetSpec(kind="npz", path=str(archive), size=8, channels=3)
    finder = Finder(built, dataset)
    assert finder.default_pool() == ["generators"]
    names = {
        "data": finder.find(["data"]),
        "made": Finder(built, dataset, images=30).find(["generators"]),
        "one": Finder(built, dataset, images=7).find(["generator=t1"]),
        "photos": finder.find([str(tmp_path / "photos")]),
        "set": finder.find(["kind=npz", f"path={archive}", "split=train", "val_fraction=0.2"]),
    }
    assert {key: len(found) for key, found in names.items()} == {
        "data": 10,
        "made": 30,
        "one": 7,
        "photos": 5,
        "set": 25,
    }
    assert [names[key].name for key in ("data", "one", "set")] == [
        "set.npz (test)",
        "generator of t1",
        "set.npz (train)",
    ]
    for found in names.values():  # in the run's image space
        assert everything(found).shape[1:] == (3, 8, 8)
    few = Finder(built, dataset, images=6, seed=3).find(["data"])
    whole = load_image_set(dataset, "test")
    kept = torch.cat([seen.numbers_N for seen in few.batches(4)])
    assert len(few) == 6 and torch.equal(everything(few), whole.images(kept))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "'nowhere': no such file, folder or word; allowed: data, generators"),
        (["data", "generators"], "means no images; allowed"),
        ([], "means no images"),
        (["generator=t9"], "no such teacher; allowed: t0, t1, t2"),
        (["data"], "give --data"),
        (["stream"], r"reads no stream \(source.kind is generative\)"),
        (["unselected"], "reads no stream"),
        (["kind=npz", "pfad=x"], "pfad: unknown key"),
        (["kind=npz", "path=absent.npz"], "absent.npz"),
    ],
)
def test_words_that_mean_nothing(built: Build, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Finder(built, None).find(words)


def test_a_run_on_labelled_images_has_no_pool(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--pool: this run made and chose no images"):
        Finder(build(parse(Recipe, labelled(tmp_path)), CPU), None).default_pool()


# ------------------------------------------------------------------------------------------ balance


def test_balance_counts_every_image_once(built: Build) -> None:
    pool = SetCollection(image_set(83), "pool")
    found = class_balance(pool, judge(built), batch=9)
    seen = next(iter(pool.batches(99)))
    expected = torch.bincount(judge(built)(seen)[0], minlength=5).tolist()
    assert list(found.counts) == expected and found.images == 83 and found.judge == "ensemble"
    assert [count for _, count, _ in found.ranking()] == sorted(expected, reverse=True)
    shares = np.array(expected) / 83
    assert found.evenness == pytest.approx(-sum(p * math.log(p) for p in shares if p) / math.log(5))


def test_a_ranking_names_missing_classes() -> None:
    found = Balance("pool", "judge", ("a", "b", "c", "d"), (5, 0, 15, 0))
    assert [(c, n) for c, n, _ in found.ranking()] == [(2, 15), (0, 5), (1, 0), (3, 0)]
    assert [p for _, _, p in found.ranking()] == [75.0, 25.0, 0.0, 0.0] and found.missing == ["b", "d"]
    written = found.as_dict()
    assert written["missing_classes"] == 2 and written["classes"][0] == {
        "class": "c",
        "index": 2,
        "images": 15,
        "percent": 75.0,
    }
    assert Balance("p", "j", ("a", "b"), (4, 4)).evenness == pytest.approx(1.0)
    assert Balance("p", "j", ("a", "b"), (4, 0)).evenness == 0.0


def test_nothing_has_no_balance() -> None:
    with pytest.raises(ValueError, match="class balance of none: found no images"):
        class_balance(Given(pictures(0), name="none"), by_first_pixel(["a", "b"]))


def test_a_balance_is_drawn_with_and_without_distances(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = Balance("pool", "judge", ("a", "b", "c"), (5, 0, 15))
    distances = [Fid(3.0, 9, 9, 2), Fid(None, 9, 0, 2), Fid(1.0, 9, 9, 2)]
    by_class = FidByClass(Fid(2.0, 27, 18, 2), distances, ("a", "b", "c"), "labels", "judge")
    first = picture(draw_balance(found, tmp_path / "one.png"))
    second = picture(draw_balance(found, tmp_path / "two.png", by_class))
    assert min(first.shape[1:]) > 300 and first.shape[1:] == second.shape[1:] and not torch.equal(first, second)
    many = Balance("pool", "judge", tuple(str(c) for c in range(100)), tuple(range(100)))
    assert picture(draw_balance(many, tmp_path / "many.png")).shape[2] > first.shape[2]
    assert len(list(tmp_path.iterdir())) == 3


# -------------------------------------------------------------------------------------------- sheets


def test_a_sheet_shows_the_surest_images_first() -> None:
    torch.manual_seed(0)
    images = torch.rand(60, 3, 8, 8, dtype=torch.float64)
    images[:, 0, 0, 0] = images[:, 0, 0, 0] * 0.7  # the last of four classes is never seen
    images[:, 0, 0, 0] = images[:, 0, 0, 0].clamp(max=0.74)
    names = ["ant", "bee", "cat", "dog"]
    rows = sheet_rows(Given(images), by_first_pixel(names), per_class=5, batch=7)
    assert [row.name for row in rows] == names and len(rows[3].images) == 0 and rows[3].found == 0
    for c, row in enumerate(rows[:3]):
        mine = images[(images[:, 0, 0, 0] * 4).floor() == c]
        order = mine[:, 0, 0, 1].argsort(descending=True)[:5]
        assert torch.equal(row.images, to_uint8(mine[order])) and row.found == len(mine)
        assert row.confidence == pytest.approx((0.5 + 0.5 * mine[order][:, 0, 0, 1]).tolist(), abs=1e-6)
    chosen = sheet_rows(Given(images), by_first_pixel(names), per_class=5, classes=["cat", "ant"])
    assert [row.name for row in chosen] == ["cat", "ant"] and torch.equal(chosen[1].images, rows[0].images)
    with pytest.raises(ValueError, match=r"unknown classes \['eel'\]; allowed: ant, bee"):
        sheet_rows(Given(images), by_first_pixel(names), classes=["eel"])
    with pytest.raises(ValueError, match="found no images"):
        sheet_rows(Given(images[:0]), by_first_pixel(names))


def test_equally_sure_images_keep_their_order() -> None:
    images = torch.zeros(9, 1, 2, 2, dtype=torch.float64)
    images[:, 0, 1, 1] = torch.arange(9) / 10
    (row, _) = sheet_rows(Given(images), by_first_pixel(["a", "b"]), per_class=4, batch=2)
    assert torch.equal(row.images, to_uint8(images[:4]))


@pytest.mark.parametrize(("side", "scale"), [(8, 4), (20, 2), (32, 1), (40, 1)])
def test_a_picture_of_a_sheet(tmp_path: Path, side: int, scale: int) -> None:
    images = pictures(40, height=side, width=side)
    rows = sheet_rows(Given(images), by_first_pixel(["first", "a much longer name"]), per_class=30)
    found, large = draw_sheet(rows, 30), scale * side
    pitch = large + PADDING
    assert found.dtype == torch.uint8 and found.shape[1] == PADDING + 2 * pitch
    width = PADDING + 30 * pitch
    grid, names = found[:, :, -width:], found[:, :, :-width]
    for r, row in enumerate(rows):
        top = PADDING + r * pitch
        assert 0 < len(row.images) < 30
        for n in range(30):
            cell = grid[:, top : top + large, PADDING + n * pitch : PADDING + n * pitch + large]
            shown = row.images[n] if n < len(row.images) else torch.full((3, side, side), 255, dtype=torch.uint8)
            # Every pixel is a square of `scale` pixels.
            assert torch.equal(cell, shown.kron(torch.ones(1, scale, scale, dtype=torch.uint8)))
        assert int(names[:, top : top + large].min()) < 100  # something is written there
    assert torch.equal(picture(save_sheet(rows, tmp_path / "deep" / "sheet.png", 30)), found)
    grey = sheet_rows(Given(images[:, :1]), by_first_pixel(["a", "b"]))
    assert draw_sheet(grey).shape[0] == 3


# ------------------------------------------------------------------------------------------------ maps


def test_a_map_keeps_apart_what_is_apart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    g = torch.Generator().manual_seed(0)
    near, far = torch.randn(40, 6, generator=g), torch.randn(30, 6, generator=g) + 40
    found = map_of_collections([("near", of_rows(near)), ("far", of_rows(far))], pixels(), points=35, seed=1)
    assert found.groups == ("near", "far") and np.bincount(found.group_N).tolist() == [35, 30]
    centres = [found.points_N2[found.group_N == g].mean(axis=0) for g in (0, 1)]
    inside = max(np.linalg.norm(found.points_N2[found.group_N == g] - centres[g], axis=1).max() for g in (0, 1))
    assert np.linalg.norm(centres[0] - centres[1]) > inside
    again = map_of_collections([("near", of_rows(near)), ("far", of_rows(far))], pixels(), points=35, seed=1)
    assert np.array_equal(found.points_N2, again.points_N2)
    one = picture(draw_maps([found], tmp_path / "one.png"))
    two = picture(draw_maps([found, again], tmp_path / "two.png"))
    assert two.shape[2] == 2 * one.shape[2] and two.shape[1] == one.shape[1]
    assert len(one.flatten(1).unique(dim=1).T) > 10
    assert found.as_dict()["groups"] == [{"name": "near", "points": 35}, {"name": "far", "points": 30}]


def test_a_map_of_few_points_lowers_the_perplexity() -> None:
    points_N2, used = project(torch.rand(10, 3))
    assert points_N2.shape == (10, 2) and used == 3.0
    with pytest.raises(ValueError, match="at least 4 points, found 3"):
        project(torch.rand(3, 3))


def test_a_map_of_classes_is_coloured_by_label(built: Build) -> None:
    images = image_set(60)
    network = feature_network(built, "student")
    found = map_of_classes(SetCollection(images, "set"), network, points=40, seed=2)
    numbers = next(iter(SetCollection(images, "set").part(40, 2).batches(99))).numbers_N
    assert found.title == "student" and torch.equal(torch.from_numpy(found.group_N), images.labels_N[numbers])
    unknown = images.labels_N.clone()
    unknown[numbers[:3]] = -1
    fewer = map_of_classes(Given(images.images_NCHW, unknown, NAMES), network, points=40, seed=2)
    assert len(fewer.points_N2) == 37
    with pytest.raises(ValueError, match="set has no labels"):
        map_of_classes(SetCollection(images, "set", labelled=False), network)


def test_many_classes_have_colours_but_no_legend(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    group_N = np.arange(100) % 50
    many = Map("student", np.random.default_rng(0).random((100, 2)), group_N, tuple(map(str, range(50))), 30.0)
    colours = picture(draw_maps([many], tmp_path / "many.png")).flatten(1).unique(dim=1)
    assert colours.shape[1] > 50


def test_missing_matplotlib_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'dfkd-dist\[plots\]'"):
        draw_balance(Balance("pool", "judge", ("a",), (1,)), tmp_path / "balance.png")
    assert list(tmp_path.iterdir()) == []


def test_missing_torch_fidelity_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dfkd_dist.engine.look import networks

    monkeypatch.setattr(networks, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'dfkd-dist\[metrics\]' torch-fidelity"):
        networks.inception_features(tmp_path / "weights.pt", CPU)


# --------------------------------------------------------------------------------------------- results


def test_results_of_several_calls_stand_side_by_side(tmp_path: Path) -> None:
    write_results(tmp_path / "out", {"balance": {"images": 1}, "fid": {"fid": float("nan")}})
    path = write_results(tmp_path / "out", {"balance": {"images": 2}})
    assert json.loads(path.read_text()) == {"balance": {"images": 2}, "fid": {"fid": None}}
    assert [p.name for p in path.parent.iterdir()] == ["evaluation.json"]
    for text, message in (("{", "not valid JSON"), ("[1]", "found a list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{message}.*--out"):
            write_results(path.parent, {})


def test_results_as_text() -> None:
    distance = {"fid": 1.25, "real_images": 50, "pool_images": 60, "features": 8, "full_rank": True}
    few = distance | {"fid": 7.5, "real_images": 5, "full_rank": False}
    none = distance | {"fid": None, "pool_images": 0, "full_rank": False}
    by_class = {"mean": 4.375, "classes": [{"class": "cat"} | few, {"class": "dog"} | none]}
    about = {"real": "set", "pool": "generators", "features_of": "t0"}
    ranked = [{"class": f"c{c}", "images": 30 - c, "percent": 1.0} for c in range(30)]
    found = "\n".join(
        lines(
            {
                "fid": about | distance | {"by_class": by_class},
                "patch_fid": about | {"sizes": [{"size": 4} | distance]},
                "balance": {
                    "pool": "generators",
                    "judge": "t0",
                    "images": 465,
                    "evenness": 0.5,
                    "missing_classes": 0,
                    "classes": ranked,
                    "picture": "x/balance.png",
                },
            }
        )
    )
    assert "FID of generators against set, features of t0:      1.250 (50 and 60 images)" in found
    assert "7.500 (5 and 60 images), fewer than features + 1 = 9: biased upwards" in found
    assert "- (50 and 0 images)" in found and "by class, mean 4.375" in found and "L =    4" in found
    assert "c0 " in found and "c9 " in found and "c10 " not in found and "c20 " in found and "..." in found
    assert "balance: x/balance.png" in found


def test_inception_features_come_from_a_file_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="torch-fidelity is extra")
    from dfkd_dist.engine.look.networks import inception_features
    from dfkd_dist.models.weights import WeightsError

    kind = library.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:  # its own weights would be downloaded
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(kind, "load_state_dict", lambda *_: None)
        network = kind("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    features = inception_features(tmp_path / "weights.pth", CPU)
    images = pictures(2, 1, 12, 12)
    found = features(images / 255)
    with torch.no_grad():
        expected = network(images.expand(-1, 3, -1, -1))[0]
    assert found.shape == (2, 2048) and torch.allclose(found, expected.double(), atol=1e-6)
    torch.save({"conv": torch.zeros(2)}, tmp_path / "other.pth")
    for name, message in (("other.pth", "does not fit torch-fidelity's Inception-v3"), ("none.pth", "no such file")):
        with pytest.raises(WeightsError, match=message):
            inception_features(tmp_path / name, CPU)


def test_digits_under_a_network(built: Build) -> None:
    """Real images: a set is nearer to its other half than to another set of pictures."""
    pytest.importorskip("torchmetrics")
    from dfkd_dist.engine.look.fid import fid

    spec = spec_of("digits", channels=3)
    train, test = (SetCollection(load_image_set(spec, split), split) for split in ("train", "test"))
    network = feature_network(built, "t0")
    same, other = fid(train, test, network), fid(train, Given(pictures(700)), network)
    assert same.full_rank and same.value is not None and other.value is not None
    assert 0 < same.value < 0.1 * other.value
