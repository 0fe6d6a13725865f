"""What is said about a link that was cut in the middle of a load."""

import pytest

from kvstore_bench.vllm.completions import Answer
from kvstore_bench.vllm.link_cut import CutRun, Unrelated, cut_row


def test_others_are_told_apart_by_what_the_engine_did() -> None:
    run = CutRun(
        hit=Answer(0.5, 0.5, (1,), 1792),
        hit_bytes=1000,
        before_s=[1.0, 0.9, 1.1],
        cut_after_s=0.2,
        answer=Answer(8.0, 8.0, (1,), 0),
        unrelated=[
            Unrelated(0.3, 1.0),  # while the cut request waits
            Unrelated(1.5, 1.2),
            Unrelated(4.5, 5.0),  # beside its computation
            Unrelated(9.0, 1.1),
            Unrelated(11.0, None),
        ],
        reuse_back_after_s=1.0,
    )
    row = cut_row("adaptive", run, cold_ttft_s=2.0)
    assert (row["unrelated_waiting"], row["unrelated_waiting_ttft_s"]) == (2, pytest.approx(1.1))
    assert (row["unrelated_beside_compute"], row["unrelated_beside_compute_ttft_max_s"]) == (1, 5.0)
    assert (row["unrelated_after"], row["unrelated_after_ttft_s"]) == (2, 1.1)
    assert row["unrelated_failed"] == 1
    assert row["unrelated_over_before"] == pytest.approx(1.1)
    assert row["cut_request_ttft_s"] == 8.0


def test_a_request_that_never_ends_is_said() -> None:
    run = CutRun(Answer(0.5, 0.5, (1,), 1792), 1000, [1.0], 0.2, failure="nothing arrived for 400 s")
    row = cut_row("lmcache-raw", run, cold_ttft_s=2.0)
    assert row["cut_request_ttft_s"] is None
    assert row["failure"] == "nothing arrived for 400 s"
    assert row["unrelated_over_before"] is None
