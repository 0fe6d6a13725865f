"""What all benchmarks share: the result file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvstore_service.meta import run_meta


def write_results(
    rows: Sequence[Mapping[str, Any]], path: Path | None, meta: Mapping[str, Any] | None = None
) -> None:
    """Write `{"meta": ..., "rows": [...]}` to `path`, if there is one."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": run_meta() | dict(meta or {}), "rows": list(rows)}, indent=2) + "\n")
