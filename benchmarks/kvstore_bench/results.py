"""Writes the result file of a benchmark."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvstore_bench.meta import run_meta

Row = Mapping[str, Any]


def write_results(
    rows: Sequence[Row], path: Path | None, meta: Row | None = None, **more: Sequence[Row]
) -> None:
    """Writes `{"meta": ..., "rows": [...]}` to `path`, unless it is None. `more` contains further tables by name."""
    if path is None:
        return
    tables = {name: list(table) for name, table in (("rows", rows), *more.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": run_meta() | dict(meta or {})} | tables, indent=2) + "\n")
