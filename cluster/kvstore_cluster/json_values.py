"""Checks of the values of JSON documents, which anybody may have written: each returns the value, or raises."""


def as_whole(value: object, bits: int = 64) -> int:
    """An integer of 0 to 2^bits - 1. Raises TypeError for any other value, including booleans."""
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise TypeError(f"{_short(value)} is not a whole number of {bits} bits")
    return value


def as_text(value: object) -> str:
    """A text. Raises TypeError for any other value, and ValueError for text that cannot be encoded."""
    if not isinstance(value, str):
        raise TypeError(f"{_short(value)} is not a text")
    value.encode()
    return value


def as_truth(value: object) -> bool:
    """A boolean. Raises TypeError for any other value."""
    if not isinstance(value, bool):
        raise TypeError(f"{_short(value)} is neither true nor false")
    return value


def _short(value: object) -> str:
    return repr(value)[:200]
