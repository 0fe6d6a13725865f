"""Rows that compare a measured figure with its target: {target, where, figure, wanted, met}."""

from typing import Any


def at_most(target: str, where: str, figure: float, limit: float) -> dict[str, Any]:
    return _target(target, where, figure, f"<= {limit:g}", met=figure <= limit)


def below(target: str, where: str, figure: float, limit: float) -> dict[str, Any]:
    return _target(target, where, figure, f"< {limit:g}", met=figure < limit)


def at_least(target: str, where: str, figure: float, limit: float) -> dict[str, Any]:
    return _target(target, where, figure, f">= {limit:g}", met=figure >= limit)


def _target(target: str, where: str, figure: float, wanted: str, *, met: bool) -> dict[str, Any]:
    verdict = "met" if met else "missed"
    return {"target": target, "where": where, "figure": figure, "wanted": wanted, "met": verdict}
