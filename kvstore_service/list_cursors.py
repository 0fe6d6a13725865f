"""Cursors of listings for callers of one tenant."""

import hashlib
import secrets
from collections.abc import Iterable

from kvstore_codec.errors import MalformedRequestError

_HALF_BITS = 32
_HALF = (1 << _HALF_BITS) - 1
_ROUNDS = 4


class ListCursors:
    """Encrypts the cursors of a node's listings. A plain cursor counts the chunks of all tenants, so it tells a tenant
    how much others store. The key is made anew in each process: a cursor of an earlier one is refused."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def sealed(self, cursor: int, tenant: str | None) -> int:
        """What a caller of `tenant` gets for a cursor below 2**32: 64 bits, and 0 for 0 only. Callers of every tenant
        (None) get the cursor itself."""
        if not cursor or tenant is None:
            return cursor
        while True:  # 0 means the end of a list
            cursor = self._permuted(cursor, tenant, range(_ROUNDS))
            if cursor:
                return cursor

    def opened(self, sealed: int, tenant: str | None) -> int:
        """Inverse of `sealed`. Raises MalformedRequestError for a number that is not a cursor of this process."""
        if not sealed or tenant is None:
            return sealed
        cursor = 0
        while not cursor:
            cursor = sealed = self._permuted(sealed, tenant, reversed(range(_ROUNDS)))
        if cursor > _HALF:
            raise MalformedRequestError(
                "this cursor is not from a listing of this node since its last start; list from the beginning"
            )
        return cursor

    def _permuted(self, number: int, tenant: str, rounds: Iterable[int]) -> int:
        """A Feistel network of 64 bits. Its inverse is the one with the rounds in reverse order."""
        left, right = number >> _HALF_BITS, number & _HALF
        for step in rounds:
            left, right = right, left ^ self._hash(right, step, tenant)
        return right << _HALF_BITS | left

    def _hash(self, half: int, step: int, tenant: str) -> int:
        text = half.to_bytes(4, "big") + bytes([step]) + tenant.encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=4, key=self._key).digest(), "big")
