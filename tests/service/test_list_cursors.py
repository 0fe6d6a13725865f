"""Cursors of listings tell a tenant nothing about the chunks of others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_codec.errors import MalformedRequestError
from kvstore_service.list_cursors import ListCursors

CURSORS = ListCursors()


@given(st.integers(0, (1 << 32) - 1), st.text(max_size=64))
def test_a_cursor_comes_back(cursor: int, tenant: str) -> None:
    sealed = CURSORS.sealed(cursor, tenant)
    assert sealed < 1 << 64
    assert (sealed == 0) == (cursor == 0)
    assert CURSORS.opened(sealed, tenant) == cursor


def test_cursors_are_in_no_order_and_of_one_tenant() -> None:
    sealed = [CURSORS.sealed(cursor, "acme") for cursor in range(1, 100)]
    assert min(sealed) > 1 << 40
    assert sorted(sealed) != sealed
    assert sealed[0] != CURSORS.sealed(1, "rival")


def test_a_cursor_of_an_earlier_process_is_refused() -> None:
    with pytest.raises(MalformedRequestError, match="list from the beginning"):
        ListCursors().opened(CURSORS.sealed(7, "acme"), "acme")


def test_callers_of_every_tenant_get_plain_cursors() -> None:
    assert CURSORS.sealed(7, None) == CURSORS.opened(7, None) == 7
