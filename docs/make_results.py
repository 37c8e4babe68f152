"""Put the tables of every `benchmarks/results/*.json` into docs/results.md, between its markers.

python -m benchmarks.document
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS, DOCUMENT = Path("benchmarks/results"), Path("docs/results.md")
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def section(path: Path) -> str:
    """One result as Markdown: headline, machine, rows."""
    result = json.loads(path.read_text())
    head, machine, versions = result["headline"], result["machine"], result["versions"]
    aim = "" if head.get("aim") is None else f" (aim: {head['aim']:g})"
    rows: list[dict[str, Any]] = result["rows"]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(keys)} |", f"| {' | '.join('---' for _ in keys)} |"]
    lines += [f"| {' | '.join(_shown(row.get(key)) for key in keys)} |" for row in rows]
    facts = f"{machine.get('gpu') or machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}"
    seeds = f", seeds {', '.join(map(str, result['seeds']))}" if "seeds" in result else ""
    return "\n".join(
        [f"### {path.stem}", "", f"{head['name']}: **{head['value']:.4g} {head['unit']}**{aim}", "", *lines, ""]
        + [f"`{path}`; {facts}{seeds}", ""]
    )


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    """Rewrite the part of the document between the markers."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    tables = "\n".join(section(path) for path in sorted(RESULTS.glob("*.json")))
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{tables}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
