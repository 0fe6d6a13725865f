"""How much faster than others the connector has to be, and whether it was."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvstore_bench.vllm.links import UNSHAPED

Row = Mapping[str, Any]

_OURS = ("exact", "exact-raw", "adaptive", "adaptive-both")
_SLOWER_THAN_COLD = 1.02
_FASTER: Mapping[str, Sequence[tuple[str, float]]] = {
    "100mbit": (("lmcache-fp8", 3.0), ("lmcache-raw", 5.0), ("cold", 2.5)),
    "50mbit": (("cold", 2.0),),
}
"""By link: how many times sooner than which policy `adaptive` has to be."""
_UNSHAPED_OVER_RAW = 1.1


def targets(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows {target, where, figure, wanted, met}. Targets whose policies or links were not measured are left out."""
    cells: dict[tuple[int, str], dict[str, Row]] = {}
    for row in rows:
        if row.get("ttft_s") is not None:
            cells.setdefault((row["prompt_tokens"], row["link"]), {})[row["policy"]] = row
    return [target for where, cell in cells.items() for target in _of_cell(*where, cell)]


def _of_cell(tokens: int, link: str, cell: Mapping[str, Row]) -> Iterator[dict[str, Any]]:
    where = f"{tokens} tokens, {link}"
    for name in _OURS:
        if name in cell and "cold" in cell:
            yield _at_most(f"{name} / cold", where, _ratio(cell, name, "cold"), _SLOWER_THAN_COLD)
    if link == UNSHAPED and "lmcache-raw" in cell:
        for name in ("adaptive", "adaptive-both", "exact-raw"):
            if name in cell:
                over = _ratio(cell, name, "lmcache-raw")
                yield _at_most(f"{name} / lmcache-raw", where, over, _UNSHAPED_OVER_RAW)
    if "adaptive" not in cell:
        return
    for other, factor in _FASTER.get(link, ()):
        if other in cell:
            yield _at_least(f"{other} / adaptive", where, _ratio(cell, other, "adaptive"), factor)


def _ratio(cell: Mapping[str, Row], name: str, over: str) -> float:
    return float(cell[name]["ttft_s"] / cell[over]["ttft_s"])


def _at_most(target: str, where: str, figure: float, limit: float) -> dict[str, Any]:
    return _target(target, where, figure, f"<= {limit:g}", met=figure <= limit)


def _at_least(target: str, where: str, figure: float, limit: float) -> dict[str, Any]:
    return _target(target, where, figure, f">= {limit:g}", met=figure >= limit)


def _target(target: str, where: str, figure: float, wanted: str, *, met: bool) -> dict[str, Any]:
    said = "met" if met else "missed"
    return {"target": target, "where": where, "figure": figure, "wanted": wanted, "met": said}
