"""Results of the checks of `kvstore doctor`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of a check. `detail` says what is available, or why it is missing; `remedy` says how to get it."""

    available: bool
    detail: str
    remedy: str | None = None


def present(detail: str) -> Finding:
    return Finding(available=True, detail=detail)


def missing(reason: str, remedy: str) -> Finding:
    return Finding(available=False, detail=reason, remedy=remedy)


@dataclass(frozen=True, slots=True)
class Check:
    """A finding and the name of its check. The service does not work if an essential check fails."""

    name: str
    available: bool
    detail: str
    remedy: str | None
    essential: bool
