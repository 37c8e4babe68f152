"""The plan against what really happens on one rank: live bytes, FLOPs; and its arithmetic against a dry run."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dfkd_dist.config import Recipe, parse
from dfkd_dist.engine.build import build
from dfkd_dist.engine.live_memory import LiveBytes, storage_bytes
from dfkd_dist.engine.metrics import Meters
from dfkd_dist.engine.plan import plan
from dfkd_dist.engine.plan_probe import measured_rate
from dfkd_dist.engine.plan_table import human
from dfkd_dist.engine.plan_trace import MAIN, WARM_UP, adopt_build, players_of
from dfkd_dist.models.weights import WeightsError

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------- recipes


def dfmf(k: int = 2, arch: str = "tiny", **changes: Any) -> dict[str, Any]:
    """DFMF with all of its terms, at 16 px, two steps of each kind."""
    source = {
        "kind": "generative",
        "generator": {"latent": 32, "width": 16, "blocks": 2},
        "loss": {"bn": 0.1, "ice": 0.1, "bce": 0.1, "adv": 1.0},
        "adversary": {"against": "assistant"},
        "assistant": {"steps": 2},
    }
    content: dict[str, Any] = {
        "name": "planned",
        "method": "DFMF",
        "image": {"size": 16, "channels": 1},
        "num_classes": 10,
        "batch": 24,
        "rounds": {"warmup": 1, "main": 2, "student_steps": 2},
        "student": {"arch": arch},
        "teachers": [{"name": f"t{i}", "weights": "random", "arch": arch} for i in range(k)],
        "objective": {"vid": 1.0},
        "source": source,
        "augment": {"rotation": 10.0, "crop_padding": 2, "flip": True},
    }
    return content | changes


def dfq_adv(k: int = 2, **changes: Any) -> dict[str, Any]:
    """DFQ with ADV: the student is the adversary, read with the batch's statistics."""
    source = {
        "kind": "generative",
        "generator": {"latent": 32, "width": 16, "blocks": 2},
        "loss": {"bn": 1.0, "ice": 1.0, "bce": 1.0, "adv": 1.0},
        "warmup_loss": {"bn": 1.0, "ice": 1.0},
        "adversary": {"against": "student", "batch_norm": "batch"},
    }
    return dfmf(k) | {"method": "DFQ", "objective": {}, "source": source, "augment": {}} | changes


def dafl(k: int = 1, **changes: Any) -> dict[str, Any]:
    """DAFL: the student sees what the generator step made; no warm-up."""
    source = {
        "kind": "generative",
        "generator": {"latent": 32, "width": 16, "blocks": 2, "head": "bn"},
        "loss": {"oh": 1.0, "bce": 5.0, "act": 0.1},
        "student_images": "from_update",
    }
    rounds = {"main": 2, "student_steps": 1}
    return dfmf(k) | {"method": "DAFL", "objective": {}, "source": source, "rounds": rounds} | changes


def frozen(k: int = 2) -> dict[str, Any]:
    """DFQ without ADV: no generator steps after warm-up."""
    content = dfq_adv(k)
    changes = {"loss": {"bn": 1.0, "ice": 1.0}, "adversary": {}, "freeze_after_warmup": True}
    return content | {"source": content["source"] | changes}


def labelled() -> dict[str, Any]:
    """A private teacher's training."""
    return dfmf(0) | {
        "source": {"kind": "labelled", "dataset": {"kind": "digits", "size": 16, "channels": 1}},
        "objective": {"kl": 0.0, "ce": 1.0},
        "rounds": {"main": 2},
    }


def recipe(content: dict[str, Any]) -> Recipe:
    return parse(Recipe, content)


# ------------------------------------------------------------------------------------------- measuring a real run


class PeakMeters(Meters):
    """The highest number of live bytes inside any phase."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__(CPU)
        self.live, self.peak = live, 0

    @contextmanager
    def time(self, phase: str, images: int = 0) -> Iterator[None]:
        self.live.reset_peak()
        yield
        self.peak = max(self.peak, self.live.peak)


def measured_peak(content: Recipe, size: int = 1) -> int:
    """Live bytes at the peak of a real run on this rank."""
    built, live = build(content, CPU, size), LiveBytes()
    built.trainer.meters = meters = PeakMeters(live)
    with live:
        adopt_build(live, built)
        built.trainer.fit()
    assert sum(p.steps for p in players_of(built)) > 0
    return meters.peak


# --------------------------------------------------------------------------------------------------- live bytes


def test_a_storage_counts_once_and_until_it_is_gone() -> None:
    with LiveBytes() as live:
        a = torch.zeros(100)
        assert live.current == 400
        views = [a.view(10, 10), a[3:], a.t(), a.detach()]
        a.add_(1)
        assert (live.current, live.peak) == (400, 400)
        b = a + 1
        del b
        assert (live.current, live.peak) == (400, 800)
        del a
        assert live.current == 400, "the views keep it"
        views.clear()
        assert live.current == 0
        live.reset_peak()
        assert live.peak == 0


def test_what_autograd_saves_is_alive() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        assert live.adopt(weight) == 4000
        loss = weight.exp().sum()  # exp saves its result, 4000 bytes; the sum has 4
        assert live.current == 8004
        loss.backward()
        assert live.current == 4000 + 4 + 4000, "the saved result is gone, the gradient is there"
        weight.grad = None
        assert live.current == 4004


def test_adopting_modules_and_optimisers() -> None:
    module = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10))
    floats = 110 + 20 + 20
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    with LiveBytes() as live:
        assert live.adopt(module) == 4 * floats + 8  # num_batches_tracked is an int64
        assert live.adopt(module, optimizer) == 0
        module(torch.zeros(3, 10)).sum().backward()
        with live.paused():
            optimizer.step()
        assert live.adopt(optimizer) == 4 * 130
        assert live.adopt(optimizer) == 0
    assert storage_bytes(optimizer, optimizer) == 4 * 130
    assert storage_bytes(torch.zeros(10)[:5], [torch.zeros(2), torch.zeros(3)]) == 40 + 20


def test_tensors_from_before_and_other_threads_do_not_count() -> None:
    before = torch.zeros(50)
    with LiveBytes() as live:
        before.mul_(2)
        assert live.adopt(before) == 0 and live.current == 200, "seen as the result of an operation in place"
    after = torch.zeros(1000)
    assert live.current == 200 and len(after) == 1000
    del before
    assert live.current == 0


# --------------------------------------------------------------------------------------- memory, against real runs

RESNET = dfmf(1, "resnet18", batch=2, image={"size": 32, "channels": 3}, rounds={"main": 2, "student_steps": 1})
RESNET["precision"] = {"fold_batch_norm": False}  # folding tries each layer: seconds on a CPU

MEMORY = {
    "dfmf": dfmf(),
    "dfmf, unlike teachers": dfmf(
        teachers=[*dfmf(1)["teachers"], {"name": "r", "weights": "random", "arch": "resnet8"}]
    ),
    "dfmf, bf16": dfmf(precision={"train": "bf16", "teacher": "bf16"}),
    "dfmf, student by adam": dfmf(optimizer={"kind": "adamw", "lr": 0.001, "clip": 1.0}),
    "dfq with adv": dfq_adv(),
    "dfq without adv": frozen(),
    "dafl": dafl(),
    "pre-activation": dfmf(1, "wrn16_1"),
    "few images": dfmf(batch=2),
    "labelled": labelled(),
    "resnet18": RESNET,
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_that_of_a_real_run(name: str) -> None:
    content = recipe(MEMORY[name])
    memory, real = plan(content, 1).roles[0].memory, measured_peak(content)
    assert memory.peak == pytest.approx(real, rel=0.01)


def test_memory_by_part() -> None:
    role = plan(recipe(dfmf(1)), 1).roles[0]
    built = build(recipe(dfmf(1)), CPU)
    numbers = sum(p.gradient.numel() for p in players_of(built))
    assert role.memory.gradients == 4 * numbers
    generator = built.source.players[0].gradient.numel()
    adam_steps = len(built.source.players[0].parameters)
    assert role.memory.optimizer == 4 * (numbers + generator + adam_steps)  # one momentum each, Adam two and a count
    assert role.memory.peak == max(p for phases in role.memory.phases.values() for p in phases.values())
    assert role.networks["teacher/t0"] == sum(p.numel() for p in built.source.kits[0].teacher.parameters())  # type: ignore[attr-defined]
    assert role.networks["student"] == built.trainer.student.gradient.numel()


# ------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("content", [dfmf(), dfq_adv(1), dafl()], ids=["dfmf", "dfq", "dafl"])
def test_flops_are_those_of_a_real_run(content: dict[str, Any]) -> None:
    role = plan(recipe(content), 1).roles[0]
    built, counter = build(recipe(content), CPU), FlopCounterMode(display=False)
    with counter:
        built.trainer.fit()
    expected = sum(role.total_flops(kind) * {WARM_UP: 1, MAIN: 2}[kind] for kind in role.flops)
    assert counter.get_total_flops() == expected


# ----------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("k", "arch", "size"),
    [
        (4, "torchvision/resnet18", 224),
        pytest.param(2, "resnet18", 32, marks=pytest.mark.slow),
    ],
)
def test_a_thousand_ranks_without_weights_files_in_seconds(k: int, arch: str, size: int) -> None:
    teachers = [{"name": f"t{i}", "weights": f"nowhere/t{i}.safetensors", "arch": arch} for i in range(k)]
    content = dfmf(k, arch, teachers=teachers, batch=2048, image={"size": size, "channels": 3})
    start = time.process_time()
    found = plan(recipe(content), 1024)
    assert time.process_time() - start < 30
    assert len(found.rows) == k and found.columns == 1024 // k
    assert sum(role.ranks for role in found.roles) == 1024 and found.role_of(1023).row == k - 1
    assert not any(note.startswith("WARNING") for note in found.notes)
    assert f"1024 ranks: {k} rows x {1024 // k} columns" in found.table()


def test_the_text_and_the_json_say_the_same() -> None:
    found = plan(recipe(dfmf(3)), 4, flops_per_second=1e9)
    content, text = json.loads(json.dumps(found.to_json())), found.table()
    assert [role["teachers"] for role in content["roles"]] == [["t0", "t2"], ["t1"]]
    assert [role["ranks"] for role in content["roles"]] == [2, 2]
    for role in content["roles"]:
        assert human(role["memory"]["peak"]) in text
        assert all(f"{sent['bytes']:,}" in text for sent in role["traffic"]["main"])
        assert all(f"{count:,}" in text for count in role["networks"].values())
    busiest = max(sum(role["flops"]["main"].values()) for role in content["roles"])
    assert content["seconds"]["main"] == busiest / 1e9
    assert f"time of main rounds: {busiest / 1e9:.3g} s each" in text


def test_ranks_without_images_are_pointed_out() -> None:
    notes = [note for note in plan(recipe(dfmf(2, batch=4)), 16).notes if note.startswith("WARNING")]
    assert len(notes) == 2 and "8 of the ranks have no image in a generator step" in notes[0]


def test_what_cannot_be_planned_is_said() -> None:
    nameless = dfmf(1, teachers=[{"name": "t0", "weights": "nowhere/t0.safetensors"}])
    with pytest.raises(WeightsError, match=r"t0.*nowhere/t0\.safetensors: no such file"):
        plan(recipe(nameless), 2)
    with pytest.raises(ValueError, match="ranks is 0"):
        plan(recipe(dfmf()), 0)
    with pytest.raises(ValueError, match="mesh.rows is 2, which does not divide the 3 ranks"):
        plan(recipe(dfmf(mesh={"rows": 2})), 3)


def test_planning_leaves_no_trace() -> None:
    state = torch.random.get_rng_state()
    plan(recipe(dfmf(1)), 2)
    assert torch.equal(state, torch.random.get_rng_state())
    made: Tensor = torch.ones(3) * 2
    assert made.device == CPU and made.tolist() == [2, 2, 2]


def test_the_rate_is_measured_by_real_steps() -> None:
    assert 1e6 < measured_rate(recipe(dfmf(1)), CPU, batch=4) < 1e13
