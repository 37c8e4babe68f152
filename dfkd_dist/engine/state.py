"""Everything of a run that moves, as parts of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dfkd_dist.engine import checkpoint
from dfkd_dist.engine.build import Build
from dfkd_dist.engine.trainer import Position

SOURCE, METERS = "source", "meters"


class _Kept(Mapping[str, Any]):
    """The source's parts of a checkpoint, each read when it is asked for: a rank needs few of them."""

    def __init__(self, found: checkpoint.Checkpoint) -> None:
        self.found = found
        self.names = {name.partition("/")[2]: name for name in found.files if name.startswith(f"{SOURCE}/")}

    def __getitem__(self, name: str) -> Any:
        return self.found.part(self.names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class RunState:
    """Saves and restores a built run. Random numbers are counter-based, so the position is all their state.

    Args:
        build: the run's objects on this rank.
        folder: where its checkpoints live.
    """

    def __init__(self, build: Build, folder: Path) -> None:
        self.build, self.folder = build, folder

    def save(self, seconds: float) -> None:
        """Write a checkpoint; every rank calls it at the same position.

        Raises:
            CheckpointError: on all ranks, if one could not write.
        """
        trainer, mesh, recipe = self.build.trainer, self.build.mesh, self.build.recipe
        at = trainer.position
        about = {
            "round": at.round,
            "updates": at.updates,
            "student": at.student,
            "tick": at.updates + at.student,
            "seconds": seconds,
            "images": dict(trainer.meters.images),
            "phase_seconds": dict(trainer.meters.seconds),
            "seed": recipe.seed,
        }
        source_state = trainer.source.state_dict()  # may talk to the row: every rank asks
        sums = mesh.world.gather_objects(trainer.meters.state_dict())
        parts: dict[str, Any] = {"student": trainer.student.state_dict(), METERS: sums} if mesh.rank == 0 else {}
        if mesh.row.rank == 0:
            parts |= {player.name: player.state_dict() for player in trainer.source.players}
            parts |= {f"{SOURCE}/{name}": state for name, state in source_state.items()}
        checkpoint.save(self.folder, about, parts, mesh.world, recipe.checkpoint.keep)

    def restore(self) -> float | None:
        """Take up the newest whole checkpoint; returns the seconds the run had taken, or None if there is none.

        Raises:
            CheckpointError: on all ranks, if checkpoints exist but none is whole, or one cannot be taken up.
        """
        world = self.build.mesh.world
        found = checkpoint.latest(self.folder, world)
        if found is None:
            return None
        # One rank may fail alone, on a part that the others do not read: they must hear of it.
        checkpoint.together(world, f"take up {found.path}", lambda: self._take_up(found))
        return float(found.about["seconds"])

    def _take_up(self, found: checkpoint.Checkpoint) -> None:
        trainer, about = self.build.trainer, found.about
        for player in [trainer.student, *trainer.source.players]:
            player.load_state_dict(found.part(player.name))
        trainer.source.load_state_dict(_Kept(found))
        trainer.position = Position(about["round"], about["updates"], about["student"])
        trainer.meters.load_state_dicts(found.part(METERS), self.build.mesh.world)
        trainer.meters.images.update(about["images"])
        trainer.meters.seconds.update(about["phase_seconds"])
