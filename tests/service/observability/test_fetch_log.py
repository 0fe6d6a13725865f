"""Reports of fetches: what a worker says is checked, and no tenant hides the fetches of others."""

import math
from typing import Any, cast

import grpc
import pytest

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_codec.errors import MalformedRequestError
from kvstore_service.identity import Access
from kvstore_service.observability.fetch_log import MOST_FETCHES, FetchLog

CONTEXT = cast(grpc.ServicerContext, None)
"""Nobody is identified, so nobody looks at it."""


def report(log: FetchLog, tenant: str = "", **fetch: Any) -> None:
    log.report(pb.ReportFetchRequest(fetch=pb.FetchSummary(**fetch), tenant=tenant), CONTEXT)


def test_a_tenant_that_reports_much_replaces_its_own_reports() -> None:
    log = FetchLog(Access(), clock=lambda: 5.0)
    report(log, "quiet", request_id="only")
    for number in range(3 * MOST_FETCHES):
        report(log, "loud", request_id=f"r{number}")
    kept = log.fetches
    assert len(kept) == MOST_FETCHES
    assert [fetch.request_id for fetch in kept if fetch.tenant == "quiet"] == ["only"]
    assert kept[-1].request_id == f"r{3 * MOST_FETCHES - 1}"
    assert kept[-1].ended_unix_s == 5.0
    log.forget("loud")
    assert [fetch.tenant for fetch in log.fetches] == ["quiet"]


@pytest.mark.parametrize(
    "fetch",
    [
        {"request_id": "x" * 129},
        {"worker": "x" * 129},
        {"took_s": math.nan},
        {"predicted_s": math.inf},
        {"spans": [pb.StageSpan(stage="decode", start_s=-1.0)]},
        {"spans": [pb.StageSpan(stage="decode")] * 65},
    ],
)
def test_what_no_worker_would_report_is_refused(fetch: dict[str, Any]) -> None:
    log = FetchLog(Access())
    with pytest.raises(MalformedRequestError):
        report(log, **fetch)
    assert log.fetches == []


def test_text_is_kept_without_control_characters_and_only_known_stages() -> None:
    log = FetchLog(Access())
    report(log, worker="\x1b[31mred", spans=[pb.StageSpan(stage="decode"), pb.StageSpan(stage="evil")])
    (kept,) = log.fetches
    assert kept.worker == "\\x1b[31mred"
    assert [span.stage for span in kept.spans] == ["decode"]
