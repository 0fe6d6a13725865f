"""No module of the project imports, directly or through others, a module that imports it."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PACKAGES = (
    "api/kvstore_api",
    "codec/kvstore_codec",
    "client/kvstore_client",
    "cluster/kvstore_cluster",
    "kvstore_service",
    "benchmarks/kvstore_bench",
)
Graph = Mapping[str, set[str]]


def modules() -> dict[str, ast.Module]:
    found = {}
    for package in PACKAGES:
        root = PROJECT / package
        for file in root.rglob("*.py"):
            parts = file.relative_to(root.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def named(tree: ast.AST) -> Iterator[str]:
    """What may be a module among all that is imported, inside of functions and for type checkers, too: those who read
    two files that know each other have to read both."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """By module, those that it imports. Importing a module runs its packages first; those that a module is inside of
    run already."""
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        wanted: set[str] = set()
        for imported in named(tree):
            parts = imported.split(".")
            wanted.update(".".join(parts[:length]) for length in range(1, len(parts) + 1))
        graph[name] = {
            other for other in wanted if other in trees and other != name and not name.startswith(f"{other}.")
        }
    return graph


def circle(graph: Graph) -> list[str]:
    """One that there is, its first module repeated at its end; empty when there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found[::-1]  # each before what it imports
    return []


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c"]),
    ],
)
def test_circles_are_found(graph: Graph, expected: list[str]) -> None:
    found = circle(graph)
    assert found[:1] == found[-1:]
    assert sorted(set(found)) == expected


def test_no_module_imports_what_imports_it() -> None:
    assert circle(imports(modules())) == []
