"""`dfkd teachers train` on digits: what it writes is what it says, and finished teachers are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dfkd_dist
from dfkd_dist.cli import main
from dfkd_dist.config import DatasetSpec, dump, load_teachers_recipe
from dfkd_dist.data.datasets import load_image_set, to_image_space
from dfkd_dist.engine import private_teachers
from dfkd_dist.engine.entry import EXIT_REFUSED
from dfkd_dist.models.cards import read_card
from dfkd_dist.parallel.stopping import EXIT_STOPPED

DIGITS = DatasetSpec(kind="digits", size=16, channels=1)
RECIPE = "debug/teachers.yaml"
NAMES = ["t0", "t1", "gold"]
BLOCKS = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
Capture = pytest.CaptureFixture[str]


def train(out: Path, *arguments: str) -> int:
    return main(["teachers", "train", RECIPE, f"out={out}", "epochs=2", *arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three networks of the debug recipe after two epochs; tests put back what they take away."""
    out = tmp_path_factory.mktemp("private") / "made"
    assert train(out) == 0
    return out


def about(made: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((made / f"{name}.json").read_text())["about"])


def test_the_files(made: Path) -> None:
    expected = {f"{name}.{suffix}" for name in NAMES for suffix in ("safetensors", "json")}
    assert {p.name for p in made.iterdir()} == expected | {"teachers.json", "teachers.yaml", "runs"}
    assert {p.name for p in (made / "runs").iterdir()} == set(NAMES)
    assert json.loads((made / "teachers.json").read_text()) == [about(made, name) for name in NAMES]
    recipe = load_teachers_recipe(RECIPE, [f"out={made}", "epochs=2"])
    assert (made / "teachers.yaml").read_text() == dump(recipe)


def test_the_cards(made: Path) -> None:
    cards = {name: read_card(made / f"{name}.safetensors") for name in NAMES}
    for card in cards.values():
        assert (card["arch"], card["num_classes"], card["size"], card["channels"]) == ("tiny", 10, 16, 1)
        assert card["classes"] == [str(c) for c in range(10)]
    assert [cards[name]["frequent"] for name in NAMES] == [*BLOCKS, None]
    assert cards["t0"]["mean"] != cards["t1"]["mean"]  # each party's own images


def test_every_image_went_to_one_party(made: Path) -> None:
    count = len(load_image_set(DIGITS, "train"))
    images = [about(made, name)["images"] for name in NAMES]
    assert images[0] + images[1] == images[2] == count and min(images) > count // 3


@pytest.mark.parametrize("name", NAMES)
def test_the_accuracies_are_those_of_the_files(made: Path, name: str) -> None:
    test = load_image_set(DIGITS, "test")
    with torch.no_grad():
        logits_NC = dfkd_dist.load_student(made / f"{name}.safetensors")(
            to_image_space(test.images(torch.arange(len(test))))
        ).logits_NC
    right_N = logits_NC.argmax(dim=1) == test.labels_N
    assert about(made, name)["accuracy"] == pytest.approx(100.0 * right_N.double().mean().item())
    found = about(made, name)["frequent_accuracy"]
    if name == "gold":
        assert found is None
        return
    members_N = torch.isin(test.labels_N, torch.tensor(BLOCKS[NAMES.index(name)]))
    assert found == pytest.approx(100.0 * right_N[members_N].double().mean().item())


def test_resume_keeps_what_is_finished_and_makes_what_is_not(made: Path, capsys: Capture) -> None:
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in made.glob("*.*")}
    (made / "gold.json").unlink()  # as if killed between the weights and the card
    assert train(made, "--resume") == 0
    for name in NAMES[:2]:
        for path in (made / f"{name}.safetensors", made / f"{name}.json"):
            assert path.stat().st_mtime_ns == before[path][0]
    assert all(path.read_bytes() == content for path, (_, content) in before.items())
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == NAMES


def test_what_is_there_is_not_replaced_unasked(made: Path, capsys: Capture) -> None:
    before = {p: p.read_bytes() for p in made.rglob("*") if p.is_file()}
    assert train(made) == EXIT_REFUSED
    assert "give --resume to go on, --overwrite to start again, or out=OTHER" in capsys.readouterr().err
    assert train(made, "--resume", "batch=16") == EXIT_REFUSED
    assert "--resume with another recipe: batch (was 32, now 16)" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in made.rglob("*") if p.is_file()} == before


def test_a_foreign_directory_is_never_deleted(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert train(tmp_path, "--overwrite") == EXIT_REFUSED
    assert "--overwrite refuses to delete it" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_stopped_training_ends_with_the_code_for_it_and_can_go_on(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, started = private_teachers.run, []

    def stopped_at_the_second(recipe: Any, **options: Any) -> Any:
        started.append(recipe.name)
        return whole(recipe, **options) if len(started) == 1 else (EXIT_STOPPED, None)

    small = ("dataset.limit=200", "gold=null")
    monkeypatch.setattr(private_teachers, "run", stopped_at_the_second)
    assert train(tmp_path / "made", *small) == EXIT_STOPPED
    assert "training of t1 stopped with exit code 75; go on with --resume" in capsys.readouterr().err
    monkeypatch.setattr(private_teachers, "run", whole)
    assert train(tmp_path / "made", *small, "--resume") == 0
    assert len(json.loads((tmp_path / "made" / "teachers.json").read_text())) == 2
    assert train(tmp_path / "made", "dataset.limit=100", "gold=null", "--overwrite") == 0
    assert about(tmp_path / "made", "t0")["images"] < 100


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for key, value in {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    assert train(tmp_path / "teachers") == EXIT_REFUSED
    assert "one process, but 2 were started" in capsys.readouterr().err
    assert not (tmp_path / "teachers").exists()
