"""The result of a check."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found out: `detail` says what is there, or why it is not; `remedy` what to do about it."""

    available: bool
    detail: str
    remedy: str | None = None


def present(detail: str) -> Finding:
    return Finding(available=True, detail=detail)


def missing(reason: str, remedy: str) -> Finding:
    return Finding(available=False, detail=reason, remedy=remedy)


@dataclass(frozen=True, slots=True)
class Check:
    """A finding with its name; the service works without it unless it is essential."""

    name: str
    available: bool
    detail: str
    remedy: str | None
    essential: bool
