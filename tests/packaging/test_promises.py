"""docs/promises.md names files that exist and tests that pytest collects."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "promises.md"


def rows() -> Iterator[tuple[str, list[str], list[str]]]:
    """(promise, files that keep it, tests of it) of every row; what is named stands in backticks."""
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 3 or cells[0] in ("promise", "---"):
            continue
        promise, kept, tests = cells
        yield promise, re.findall(r"`([^`]+)`", kept), re.findall(r"`([^`]+)`", tests)


def names_of_tests(path: Path) -> set[str]:
    """`name` of every test function, `Class::name` of every test method."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found.update(
                f"{node.name}::{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)
            )
    return {name for name in found if name.split("::")[-1].startswith("test_")}


ROWS = list(rows())


@pytest.mark.parametrize(("promise", "kept", "tests"), ROWS, ids=[row[0][:60] for row in ROWS])
def test_a_promise_names_code_and_a_test_that_exist(promise: str, kept: list[str], tests: list[str]) -> None:
    assert kept
    assert tests, f"no test holds: {promise}"
    for name in kept:
        assert (ROOT / name).exists(), f"{name} does not exist"
    for test in tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).is_file(), f"{path} does not exist"
        assert name in names_of_tests(ROOT / path), f"{path} has no test {name}"
