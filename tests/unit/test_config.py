"""Reading recipes: what is refused and how that is said, bases, overrides, and numbers as people write them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dfkd_dist.config import (
    GenerativeSpec,
    LabelledSpec,
    Recipe,
    RecipeError,
    TeachersRecipe,
    apply_override,
    dump,
    find_recipe,
    load_recipe,
    load_teachers_recipe,
    parse,
    read_yaml,
)

Tree = dict[str, Any]


def recipe(*overrides: str) -> Tree:
    """A small correct DFMF recipe, changed by overrides."""
    tree: Tree = {
        "name": "small",
        "method": "DFMF",
        "image": {"size": 16, "channels": 1},
        "num_classes": 10,
        "batch": 16,
        "rounds": {"warmup": 2, "main": 3},
        "teachers": [{"name": n, "weights": "random", "arch": "tiny"} for n in "ab"],
        "student": {"arch": "tiny"},
        "source": {
            "kind": "generative",
            "loss": {"bn": 0.1, "adv": 1.0},
            "adversary": {"against": "assistant"},
            "assistant": {"steps": 2},
        },
    }
    return changed(tree, overrides)


def labelled(*overrides: str) -> Tree:
    """A small correct recipe with labels."""
    tree: Tree = {
        "name": "small",
        "method": "supervised",
        "image": {"size": 16, "channels": 1},
        "num_classes": 10,
        "rounds": {"main": 3},
        "student": {"arch": "tiny"},
        "objective": {"kl": 0.0, "ce": 1.0},
        "source": {"kind": "labelled", "dataset": {"kind": "digits", "size": 16, "channels": 1}},
    }
    return changed(tree, overrides)


def teachers(*overrides: str) -> Tree:
    """A small correct teachers recipe."""
    tree: Tree = {
        "name": "small",
        "dataset": {"kind": "digits", "size": 16, "channels": 1},
        "split": {"parties": 2},
        "archs": ["tiny"],
        "epochs": 1,
    }
    return changed(tree, overrides)


def changed(tree: Tree, overrides: Sequence[str]) -> Tree:
    for override in overrides:
        apply_override(tree, override)
    return tree


def refusal(tree: Tree, kind: type[Recipe] | type[TeachersRecipe] = Recipe) -> str:
    """What is said about a wrong recipe."""
    with pytest.raises(RecipeError) as caught:
        parse(kind, tree, where="mine.yaml")
    said = str(caught.value)
    assert said.startswith("mine.yaml:\n  ")
    return said


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------- correct recipes


def test_the_small_recipes_are_correct() -> None:
    assert isinstance(parse(Recipe, recipe()).source, GenerativeSpec)
    assert isinstance(parse(Recipe, labelled()).source, LabelledSpec)
    assert parse(TeachersRecipe, teachers()).archs == ["tiny"]


@pytest.mark.parametrize("tree", [recipe("optimizer.lr=1e-5", "student.mean=[0.1]", "about='no'"), labelled()])
def test_a_dumped_recipe_reads_back_equal(tree: Tree, tmp_path: Path) -> None:
    spec = parse(Recipe, tree)
    assert load_recipe(write(tmp_path / "r.yaml", dump(spec))) == spec


def test_a_dumped_teachers_recipe_reads_back_equal(tmp_path: Path) -> None:
    spec = parse(TeachersRecipe, teachers("optimizer.lr=1e-5"))
    assert load_teachers_recipe(write(tmp_path / "t.yaml", dump(spec))) == spec


def test_the_run_directory_is_filled_in() -> None:
    assert parse(Recipe, recipe("out=runs/{name}/seed{seed}", "seed=3")).run_dir() == Path("runs/small/seed3")


def test_a_recipe_cannot_be_changed_after_reading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(Recipe, recipe()).batch = 3  # type: ignore[misc]


def test_a_section_given_in_part_keeps_the_rest_of_its_default() -> None:
    spec = parse(
        Recipe,
        recipe("optimizer.lr=0.1", "source.optimizer.lr=2e-3", "source.assistant.objective.temperature=4"),
    )
    assert (spec.optimizer.lr, spec.optimizer.nesterov) == (0.1, True)
    assert isinstance(spec.source, GenerativeSpec) and spec.source.assistant is not None
    optimizer, objective = spec.source.optimizer, spec.source.assistant.objective
    assert (optimizer.kind, optimizer.lr, optimizer.betas) == ("adam", 2e-3, [0.5, 0.999])
    assert (objective.kl, objective.vid, objective.temperature) == (1.0, 1.0, 4.0)


def test_a_section_of_another_kind_takes_nothing_from_the_default() -> None:
    spec = parse(Recipe, recipe("optimizer.kind=adam", "source.optimizer={kind: sgd, lr: 0.1}"))
    assert (spec.optimizer.kind, spec.optimizer.nesterov) == ("adam", False)
    assert isinstance(spec.source, GenerativeSpec) and spec.source.optimizer.betas == [0.9, 0.999]


# ------------------------------------------------------------------------------- keys, types and ranges


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("sudent.arch=tiny", "sudent", "student"),
        ("student.ach=tiny", "student.ach", "arch"),
        ("teachers.1.weight_file=x", "teachers.1.weight_file", "weight"),
        ("source.loss.addv=1.0", "source.loss.addv", "adv"),
        ("source.assistant.optimiser.lr=1.0", "source.assistant.optimiser", "optimizer"),
        ("source.asistant=3", "source.asistant", "assistant"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(override: str, key: str, nearest: str) -> None:
    said = refusal(recipe(override))
    assert f"\n  {key}: unknown key (given: " in said
    assert f"did you mean '{nearest}'?; allowed: " in said


@pytest.mark.parametrize("key", ["generative", "labelled", "kind"])
def test_an_unknown_key_that_is_called_like_a_kind_is_named(key: str) -> None:
    assert f"\n  {key}: unknown key" in refusal(recipe(f"{key}=3"))
    if key != "kind":
        assert f"\n  source.{key}: unknown key" in refusal(recipe(f"source.{key}=3"))


@pytest.mark.parametrize(
    ("override", "key", "given"),
    [
        ("batch='3'", "batch", "'3'"),
        ("batch=3.5", "batch", "3.5"),
        ("batch=true", "batch", "True"),
        ("seed=null", "seed", "None"),
        ("method=3", "method", "3"),
        ("optimizer.lr='0.1'", "optimizer.lr", "'0.1'"),
        ("optimizer.nesterov=1", "optimizer.nesterov", "1"),
        ("optimizer.betas=0.9", "optimizer.betas", "0.9"),
        ("teachers=a", "teachers", "'a'"),
        ("student=tiny", "student", "'tiny'"),
        ("teachers.0.std=[a]", "teachers.0.std.0", "'a'"),
    ],
)
def test_a_wrong_type_is_refused_and_never_converted(override: str, key: str, given: str) -> None:
    said = refusal(recipe(override))
    assert f"\n  {key}: Input should be a valid " in said
    assert f"(given: {given})" in said


@pytest.mark.parametrize(
    ("override", "key", "allowed"),
    [
        ("batch=0", "batch", "greater than or equal to 1"),
        ("seed=-1", "seed", "greater than or equal to 0"),
        ("num_classes=1", "num_classes", "greater than or equal to 2"),
        ("image.size=5000", "image.size", "less than or equal to 1024"),
        ("image.channels=2", "image.channels", "1 or 3"),
        ("optimizer.lr=0", "optimizer.lr", "greater than 0"),
        ("optimizer.lr=.inf", "optimizer.lr", "finite number"),
        ("optimizer.lr=.nan", "optimizer.lr", "finite number"),
        ("optimizer.betas=[0.9]", "optimizer.betas", "at least 2 items"),
        ("optimizer.betas=[0.9, 1.5]", "optimizer.betas.1", "less than or equal to 1"),
        ("source.loss.bn=-0.1", "source.loss.bn", "greater than or equal to 0"),
        ("source.generator.blocks=9", "source.generator.blocks", "less than or equal to 6"),
        ("augment.hue=0.6", "augment.hue", "less than or equal to 0.5"),
        ("rounds.main=0", "rounds.main", "greater than or equal to 1"),
        ("name=a/b", "name", "should match pattern"),
        ("teachers.0.weight=0", "teachers.0.weight", "greater than 0"),
        ("out='{nam}'", "out", "allowed: {name} and {seed}"),
        ("out='{'", "out", "allowed: {name} and {seed}"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(override: str, key: str, allowed: str) -> None:
    said = refusal(recipe(override))
    assert f"\n  {key}: " in said
    assert allowed in said


def test_a_mistyped_choice_is_answered_with_the_nearest() -> None:
    said = refusal(recipe("source.adversary.form=maskedkl"))
    assert "source.adversary.form: Input should be 'kl', 'l1', 'log_l1' or 'masked_kl' (given: 'maskedkl')" in said
    assert "did you mean 'masked_kl'?" in said


def test_a_missing_key_is_named() -> None:
    tree = recipe()
    del tree["student"], tree["teachers"][0]["weights"]
    said = refusal(tree)
    assert "\n  student: required, but not given" in said
    assert "\n  teachers.0.weights: required, but not given" in said


def test_all_errors_come_at_once() -> None:
    assert len(refusal(recipe("batch=0", "seed=-1", "sudent=3")).splitlines()) == 4


# ----------------------------------------------------------------------------------- the union of sources

KINDS = "generative, mosaic, labelled, stream, inversion"


def test_a_wrong_source_kind_is_named_with_the_nearest_and_all() -> None:
    said = refusal(recipe("source.kind=generativ"))
    wrong = "  source.kind: unknown kind (given: 'generativ'); did you mean 'generative'?; "
    assert said.splitlines()[1:] == [wrong + f"allowed: {KINDS}"]


def test_a_source_without_kind_says_what_is_allowed() -> None:
    tree = recipe()
    del tree["source"]["kind"]
    assert refusal(tree).splitlines()[1:] == [f"  source.kind: required, but not given; allowed: {KINDS}"]


@pytest.mark.parametrize("source", ["generative", 3, None, []])
def test_a_source_that_is_no_mapping_is_refused(source: object) -> None:
    assert "\n  source: " in refusal(recipe() | {"source": source})


def test_paths_into_the_source_are_those_of_the_file() -> None:
    said = refusal(recipe("source.assistant.objective.kl=-1", "source.optimizer.lr=0"))
    assert "\n  source.assistant.objective.kl: " in said
    assert "\n  source.optimizer.lr: " in said


# ------------------------------------------------------------------------------- impossible combinations


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer={kind: adam, nesterov: true}"], "nesterov: true needs kind: sgd"),
        (["optimizer.momentum=0"], "nesterov: true needs kind: sgd with momentum > 0"),
        (["schedule.milestones=[0.5]"], "milestones are needed by kind: multistep, and only there"),
        (["schedule.kind=multistep"], "milestones are needed by kind: multistep, and only there"),
        (["schedule={kind: multistep, milestones: [0.6, 0.4]}"], "milestones must rise, got [0.6, 0.4]"),
        (["objective.kl=0"], "all weights are 0; give at least one of kl, vid, l1, at, ce"),
        (["source.adversary.against=none", "source.assistant=null"], "loss.adv is 1.0 but adversary.against is none"),
        (["source.loss.adv=0"], "adversary.against is assistant but loss.adv is 0"),
        (["source.assistant=null"], "an `assistant` section is needed by adversary.against: assistant"),
        (["source.adversary.against=student"], "an `assistant` section is needed by adversary.against: assistant"),
        (["source.freeze_after_warmup=true"], "leaves loss.adv without effect; set loss.adv: 0"),
        (
            ["source={kind: generative, loss: {bn: 1}, warmup_loss: {adv: 1}}"],
            "warmup_loss.adv has a weight but adversary.against is none",
        ),
        (["source={kind: generative, loss: {bn: 0}}"], "the generator has nothing to minimise"),
        (
            ["source={kind: generative, loss: {bn: 1}, freeze_after_warmup: true, student_images: from_update}"],
            "student_images: from_update needs generator steps",
        ),
        (
            ["source.student_images=from_update", "source.student_first=true"],
            "student_images: from_update needs the generator step first",
        ),
        (
            ["source={kind: generative, loss: {bn: 1}, freeze_after_warmup: true}", "rounds.warmup=0"],
            "needs rounds.warmup > 0, or no generator ever trains",
        ),
        (["source.loss={adv: 1}"], "rounds.warmup is 2, but every weight of the warm-up is 0"),
        (["precision.train=fp64"], "fp64 must be given to both train (fp64) and teacher (fp32)"),
        (["student.pretrained=true", "student.weights=a.pt"], "weights is 'a.pt' and pretrained is true"),
        (["teachers.1.name=a"], "teachers: names must differ, got ['a', 'a']"),
        (["teachers=[]"], "teachers: at least one is needed by source.kind: generative"),
        (["objective.ce=1"], "objective.ce needs labels (source.kind: labelled, or stream)"),
        (["batch=1"], "batch is 1, fewer than the 2 teachers"),
        (
            ["evaluation.dataset={kind: npz, size: 16, channels: 1}"],
            "evaluation.dataset: kind: npz needs `path`",
        ),
        (
            ["evaluation.dataset={kind: torchvision, path: x, size: 16, channels: 1}"],
            "evaluation.dataset: kind: torchvision needs `name`",
        ),
    ],
)
def test_an_impossible_combination_is_refused(overrides: list[str], said: str) -> None:
    assert said in refusal(recipe(*overrides))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rounds.student_steps=epoch"], "rounds.student_steps is 'epoch', but source.kind is labelled"),
        (["objective.ce=0", "objective.kl=1"], "needs objective.ce > 0 and no other objective weight"),
        (["objective.vid=1"], "needs objective.ce > 0 and no other objective weight"),
        (["rounds.warmup=1"], "a labelled source has no warm-up (allowed: 0)"),
        (["source.split={mode: bl, parties: 2, ratio: 3}"], "mode: bl means ratio 1, got 3.0; did you mean mode: ibl?"),
        (["source.party=0"], "party is 0 but there is no `split`"),
        (["source.party=2", "source.split.parties=2"], "party is 2; allowed: 0 to 1 (split.parties)"),
    ],
)
def test_an_impossible_labelled_recipe_is_refused(overrides: list[str], said: str) -> None:
    assert said in refusal(labelled(*overrides))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["archs=[tiny, tiny, tiny]"], "archs: give 1 or split.parties (2) names, got 3"),
        (["archs=[]"], "archs: List should have at least 1 item"),
        (["mean=[0.5]"], "mean and std: give neither, or 1 values each (dataset.channels)"),
        (["mean=[0.5, 0.5]", "std=[0.5, 0.5]"], "mean and std: give neither, or 1 values each"),
        (["arch=tiny"], "arch: unknown key (given: 'tiny'); did you mean 'archs'?"),
    ],
)
def test_an_impossible_teachers_recipe_is_refused(overrides: list[str], said: str) -> None:
    assert said in refusal(teachers(*overrides), TeachersRecipe)


# --------------------------------------------------------------------------------------------------- base


def test_a_base_is_merged_by_key_and_lists_are_replaced(tmp_path: Path) -> None:
    write(tmp_path / "under.yaml", "a: 1\nb: {c: 2, d: 3}\ne: [1, 2, 3]\nf: {x: 1}\n")
    over = write(tmp_path / "over.yaml", "base: under.yaml\nb: {d: 4}\ne: [9]\nf: null\n")
    assert read_yaml(over) == {"a": 1, "b": {"c": 2, "d": 4}, "e": [9], "f": None}


def test_bases_of_bases_and_lists_of_bases_are_merged_later_ones_on_top(tmp_path: Path) -> None:
    write(tmp_path / "root.yaml", "a: root\nb: root\nc: root\nd: root\n")
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "one.yaml", "base: ../root.yaml\nb: one\nc: one\nd: one\n")
    write(tmp_path / "parts" / "two.yaml", "c: two\nd: two\n")
    leaf = write(tmp_path / "leaf.yaml", "base: [parts/one.yaml, parts/two.yaml]\nd: leaf\n")
    assert read_yaml(leaf) == {"a": "root", "b": "one", "c": "two", "d": "leaf"}


def test_two_bases_may_share_a_base(tmp_path: Path) -> None:
    write(tmp_path / "root.yaml", "a: 1\n")
    write(tmp_path / "one.yaml", "base: root.yaml\nb: 1\n")
    write(tmp_path / "two.yaml", "base: root.yaml\nc: 1\n")
    assert read_yaml(write(tmp_path / "leaf.yaml", "base: [one.yaml, two.yaml]\n")) == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize(
    ("under", "over", "merged"),
    [
        ("{kind: x, a: 1}", "{b: 2}", {"kind": "x", "a": 1, "b": 2}),
        ("{a: 1}", "{kind: x, b: 2}", {"kind": "x", "a": 1, "b": 2}),
        ("{kind: x, a: 1}", "{kind: x, b: 2}", {"kind": "x", "a": 1, "b": 2}),
        ("{kind: x, a: 1}", "{kind: y, b: 2}", {"kind": "y", "b": 2}),
    ],
)
def test_a_section_of_another_kind_replaces_the_base_one(tmp_path: Path, under: str, over: str, merged: Tree) -> None:
    write(tmp_path / "under.yaml", f"source: {under}\n")
    assert read_yaml(write(tmp_path / "over.yaml", f"base: under.yaml\nsource: {over}\n")) == {"source": merged}


@pytest.mark.parametrize("back", ["a.yaml", "b.yaml", "[c.yaml, a.yaml]"])
def test_a_circle_of_bases_is_refused(tmp_path: Path, back: str) -> None:
    write(tmp_path / "c.yaml", "x: 1\n")
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", f"base: {back}\n")
    with pytest.raises(RecipeError, match="leads in a circle: .*a.yaml -> .*b.yaml"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize("base", ["3", "null", "[3]", "{a: 1}"])
def test_a_base_that_is_no_name_is_refused(tmp_path: Path, base: str) -> None:
    with pytest.raises(RecipeError, match="base: expected a file name or a list of them"):
        read_yaml(write(tmp_path / "a.yaml", f"base: {base}\n"))


def test_a_missing_base_or_recipe_names_the_nearest_shipped_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe file debug/dfmff.yaml; did you mean 'debug/dfmf.yaml'?"):
        read_yaml(write(tmp_path / "a.yaml", "base: debug/dfmff.yaml\n"))
    with pytest.raises(RecipeError, match="no recipe file configs/debug/dfmff.yaml; did you mean 'debug/dfmf.yaml'?"):
        find_recipe("configs/debug/dfmff.yaml")


def test_a_shipped_recipe_is_found_by_its_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("debug/dfmf.yaml") == find_recipe("configs/debug/dfmf.yaml")
    assert load_recipe("debug/dfmf.yaml").name == "debug_dfmf"


# --------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(("text", "line"), [("a: 1\nb: 3\na: 2\n", 3), ("x: {a: 1, a: 2}\n", 1)])
def test_a_repeated_key_is_refused_with_its_place(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(RecipeError, match=f"r.yaml: .*key 'a' stands twice\n.*line {line}, column"):
        read_yaml(write(tmp_path / "r.yaml", text))


@pytest.mark.parametrize(
    ("text", "number"), [("1e-3", 1e-3), ("5E-4", 5e-4), ("1e3", 1000.0), (".5e1", 5.0), ("-2e+2", -200.0)]
)
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str, number: float) -> None:
    assert read_yaml(write(tmp_path / "r.yaml", f"a: {text}\nb: [{text}]\n")) == {"a": number, "b": [number]}
    tree: Tree = {}
    apply_override(tree, f"a={text}")
    assert tree == {"a": number}


@pytest.mark.parametrize("text", ["e3", "1e", "'1e-3'", "v1e3"])
def test_other_text_with_an_e_stays_text(tmp_path: Path, text: str) -> None:
    assert isinstance(read_yaml(write(tmp_path / "r.yaml", f"a: {text}\n"))["a"], str)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch owned']",
        "!!python/name:os.system",
        "!!python/object/new:tuple [[1]]",
        "!mine 3",
    ],
)
def test_tags_that_make_objects_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="not valid YAML: could not determine a constructor for the tag"):
        read_yaml(write(tmp_path / "r.yaml", f"a: {text}\n"))
    with pytest.raises(RecipeError, match="the value is not valid YAML"):
        apply_override({}, f"a={text}")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- 1\n- 2\n", "expected keys and values, found list"),
        (b"", "expected keys and values, found NoneType"),
        (b"a: [1\n", "not valid YAML"),
        (b"a: \xff\xfe\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=f"r.yaml: {said}"):
        read_yaml(tmp_path / "r.yaml")


# ---------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a.b=3", {"a": {"b": 3, "list": [{"x": 1}, {"x": 2}], "numbers": [1, 2]}}),
        ("a.list.1.x=5", {"a": {"b": 0, "list": [{"x": 1}, {"x": 5}], "numbers": [1, 2]}}),
        ("a.list.0.new.deep=1", {"a": {"b": 0, "list": [{"x": 1, "new": {"deep": 1}}, {"x": 2}], "numbers": [1, 2]}}),
        ("a.numbers.1=7", {"a": {"b": 0, "list": [{"x": 1}, {"x": 2}], "numbers": [1, 7]}}),
        ("a.numbers=[]", {"a": {"b": 0, "list": [{"x": 1}, {"x": 2}], "numbers": []}}),
        ("a={}", {"a": {}}),
        ("a=x=y", {"a": "x=y"}),
        ("a=", {"a": None}),
    ],
)
def test_an_override_sets_one_value_in_place(override: str, value: Tree) -> None:
    tree: Tree = {"a": {"b": 0, "list": [{"x": 1}, {"x": 2}], "numbers": [1, 2]}}
    apply_override(tree, override)
    assert tree == value


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teachers.2.arch=tiny", "'2' must be a number from 0 to 1"),
        ("teachers.-1.arch=tiny", "'-1' must be a number from 0 to 1"),
        ("teachers.b.arch=tiny", "'b' must be a number from 0 to 1"),
        ("teachers.2={}", "'2' must be a number from 0 to 1"),
        ("source.betas.0.x=1", "'0' is the value 0.5; nothing stands below it"),
        ("batch", "expected key=value"),
        ("=3", "expected key=value"),
        ("batch=[1", "the value is not valid YAML"),
    ],
)
def test_a_wrong_override_is_refused(override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=f"override {override!r}: .*{said}".replace("[", r"\[")):
        apply_override(recipe() | {"source": {"betas": [0.5]}}, override)


def test_overrides_of_a_file_are_checked_like_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", dump(parse(Recipe, recipe())))
    assert load_recipe(path, ["teachers.1.arch=resnet8", "optimizer.lr=1e-2"]).optimizer.lr == 0.01
    with pytest.raises(RecipeError, match="teachers.1.ach: unknown key"):
        load_recipe(path, ["teachers.1.ach=resnet8"])
