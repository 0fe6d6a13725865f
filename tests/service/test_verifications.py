"""Verifications of tenants run side by side, and of one tenant one at a time."""

import contextlib

import pytest

from kvstore_codec.errors import BusyError
from kvstore_service.verifications import MAX_VERIFICATIONS, Verifications


def test_one_tenant_verifies_once_at_a_time() -> None:
    verifications = Verifications()
    with verifications.admitted("acme"):
        with verifications.admitted("rival"), verifications.admitted(None):
            pass
        with pytest.raises(BusyError, match="already being verified"), verifications.admitted("acme"):
            pass
    with verifications.admitted("acme"):
        pass


def test_there_are_not_too_many() -> None:
    verifications = Verifications()
    with contextlib.ExitStack() as running:
        for number in range(MAX_VERIFICATIONS):
            running.enter_context(verifications.admitted(str(number)))
        with pytest.raises(BusyError, match="try again later"), verifications.admitted("one more"):
            pass


def test_a_caller_that_waits_holds_no_turn() -> None:
    verifications = Verifications()
    slow, quick = verifications.in_turns(iter([1, 2])), verifications.in_turns(iter([3, 4]))
    assert next(slow) == 1
    assert list(quick) == [3, 4]
    assert list(slow) == [2]
