"""Writes the table of values into the chart's README.md: `python helm/readme.py`.

A value is described by the comment above it that begins with `# --`."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "kvstore"
_MARK = "<!-- values: made by helm/readme.py -->"
_KEY = re.compile(r"( *)([A-Za-z0-9]+):")
_COMMENT = re.compile(r" *# -- (.*)")


def rendered() -> str:
    """README.md with a table that fits values.yaml."""
    text = (CHART / "README.md").read_text()
    return text[: text.index(_MARK) + len(_MARK)] + "\n\n" + _table((CHART / "values.yaml").read_text())


def _table(values: str) -> str:
    lines = ["| value | default | meaning |", "| --- | --- | --- |"]
    parsed, path, comment = yaml.safe_load(values), list[str](), ""
    for line in values.splitlines():
        if found := _COMMENT.match(line):
            comment = found[1]
        elif key := _KEY.match(line):
            path = [*path[: len(key[1]) // 2], key[2]]
            if comment:
                default = json.dumps(_at(parsed, path), ensure_ascii=False)
                lines.append(f"| `{'.'.join(path)}` | `{default}` | {comment} |")
            comment = ""
    return "\n".join(lines) + "\n"


def _at(values: Any, path: list[str]) -> Any:
    for key in path:
        values = values[key]
    return values


if __name__ == "__main__":
    (CHART / "README.md").write_text(rendered())
