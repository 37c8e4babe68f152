"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dfkd_dist.engine.plan import Plan, Role

Row = Sequence[str]


def table(plan: Plan) -> str:
    """Mesh, then each role, then what the figures mean."""
    blocks = [_mesh(plan), *[_role(plan, role) for role in plan.roles], "\n".join(plan.notes)]
    return "\n\n".join(blocks) + "\n"


def _mesh(plan: Plan) -> str:
    lines = [
        f"{plan.name} ({plan.method}) on {plan.ranks} ranks: {len(plan.rows)} rows x {plan.columns} columns",
        *[f"  row {t}: {', '.join(names) or 'no teachers'}" for t, names in enumerate(plan.rows)],
        "rounds: " + ", ".join(f"{count:,} {kind}" for kind, count in plan.rounds.items()),
    ]
    for kind, seconds in plan.seconds.items():
        hours = seconds * plan.rounds[kind] / 3600
        lines.append(f"time of {kind} rounds: {seconds:.3g} s each, {hours:.3g} h in all (arithmetic alone)")
    return "\n".join(lines)


def _role(plan: Plan, role: Role) -> str:
    others = f" and {role.ranks - 1} like it" if role.ranks > 1 else ""
    head = f"rank {role.rank}{others} (row {role.row}): "
    head += f"{role.update_images} images of an update step, {role.student_images} of a student step"
    return "\n".join([head, _networks(role), _memory(role), _flops(role), *_traffic(role)])


def _networks(role: Role) -> str:
    return _columns([("network", "parameters")] + [(name, f"{count:,}") for name, count in role.networks.items()])


def _memory(role: Role) -> str:
    memory = role.memory
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "peak": memory.peak,
    }
    rows = [("memory", "bytes")] + [(name, human(size)) for name, size in parts.items()]
    rows += [(f"{k} {phase}", human(size)) for k, phases in memory.phases.items() for phase, size in phases.items()]
    return _columns(rows)


def _flops(role: Role) -> str:
    rows = [("FLOPs per round", "")]
    for kind, phases in role.flops.items():
        rows += [(f"{kind} {phase}", f"{count:.4g}") for phase, count in phases.items()]
        rows.append((f"{kind} total", f"{role.total_flops(kind):.4g}"))
    return _columns(rows)


def _traffic(role: Role) -> list[str]:
    blocks = []
    for kind, sent in role.traffic.items():
        rows = [(f"{kind} round sends", "collective", "among", "calls", "bytes")]
        rows += [(t.phase, t.kind, f"{t.group} of {t.members}", f"{t.calls:,}", f"{t.bytes:,}") for t in sent]
        rows.append(("total", "", "", f"{sum(t.calls for t in sent):,}", f"{role.total_bytes(kind):,}"))
        blocks.append(_columns(rows))
    return blocks


def _columns(rows: Sequence[Row]) -> str:
    """Names to the left, figures (the columns after the texts) to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    texts = 3 if len(widths) == 5 else 1
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < texts else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def human(size: int) -> str:
    """Bytes in binary units."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:,.4g} GiB"
