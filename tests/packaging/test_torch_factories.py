"""Tensors are made where we say, in the type we say: an engine may have set other defaults for its process."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Functions of torch that make a tensor on the default device unless they are told another.
FACTORIES = {
    "arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "randperm",
    "tensor", "as_tensor", "zeros", "hann_window", "tril_indices", "triu_indices",
}  # fmt: skip
# Those whose type follows torch's default, unless it is given or follows from what they are filled with.
FLOATS = {"empty", "eye", "linspace", "logspace", "ones", "rand", "randn", "zeros"}


def calls(path: Path) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
    ]


@pytest.mark.parametrize(("keyword", "functions"), [("device", FACTORIES), ("dtype", FLOATS)])
def test_every_tensor_is_made_where_and_as_we_say(keyword: str, functions: set[str]) -> None:
    forgotten = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}"
        for package in ("codec/kvstore_codec", "client/kvstore_client")
        for path in sorted((ROOT / package).rglob("*.py"))
        for call in calls(path)
        if call.func.attr in functions  # type: ignore[attr-defined]
        and not any(given.arg == keyword for given in call.keywords)
    ]
    assert forgotten == []
