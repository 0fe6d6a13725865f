"""The client's view of the cluster, kept whatever goes wrong."""

import time
from pathlib import Path

import pytest

from kvstore_api.placement import Member, Membership
from kvstore_client import connect
from tests.client.conftest import served_cluster


def test_the_membership_is_asked_for_again_whatever_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with served_cluster(tmp_path) as cluster, connect(cluster.address, membership_ttl_s=0.01) as client:
        view = client._view
        assert len(view.membership().members) == 1
        ask, failures = view._ask, 3

        def fail_at_first(timeout_s: float) -> Membership:
            nonlocal failures
            if failures:
                failures -= 1
                raise TypeError("a mistake")
            return ask(timeout_s)

        monkeypatch.setattr(view, "_ask", fail_at_first)
        cluster.books.join(Member("another", "127.0.0.1:1"), 1)
        patience = time.monotonic() + 30
        while len(view.membership().members) == 1 and time.monotonic() < patience:
            time.sleep(0.01)
        assert len(view.membership().members) == 2
        assert client.metrics.snapshot()["miss_membership_internal_error"] == 3
    (record,) = [record for record in caplog.records if "a mistake" in record.getMessage()]
    assert record.exc_info is not None
