"""Nothing fails in silence: a report says why nothing was reused, and the log says it once per cause and minute."""

import ast
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kvstore_client
from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.failure_log import INTERVAL_S, FailureLog
from kvstore_client.miss_reason import MissReason
from tests.client.conftest import ServedCluster
from tests.client.models import random_prompt, tiny_model

GREEDY = {"max_new_tokens": 1, "do_sample": False}

# Reasons of normal work, some that follow from one that was logged, and some that are logged where they are counted.
EXPECTED = {
    MissReason.CLOSED, MissReason.PAUSED, MissReason.CALIBRATION_LOADING, MissReason.STORE_BEHIND_LOSSY,
    MissReason.STORE_PAUSED, MissReason.CALIBRATION_INTERNAL_ERROR, MissReason.STORE_INTERNAL_ERROR,
    MissReason.STORE_NO_CALIBRATION, MissReason.CALIBRATION_UNUSABLE, MissReason.STORE_TEXT_CUT,
    MissReason.STORE_CANCELLED, MissReason.STORE_BEHIND_PART, MissReason.ADAPTER_PENDING,
}  # fmt: skip


@pytest.fixture
def closed_port() -> Iterator[str]:
    """An address at which nobody listens, kept from others."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("kvstore_client")]


def test_a_wrong_port_does_not_look_like_a_cold_cache(
    closed_port: str, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = random_prompt(600, seed=1)
    with caplog.at_level(logging.WARNING), connect(closed_port, retry_after_s=0.0) as client:
        cached = CachedModel(tiny_model("llama"), client)
        for _ in range(10):
            cached.generate(prompt, **GREEDY)
            assert cached.last_report.why_not is not None
            assert cached.last_report.why_not.startswith("unreachable: ")
            assert f"{closed_port} refused the connection" in cached.last_report.why_not
        client.store.flush()
    (line,) = warnings_of(caplog)
    assert f"{closed_port} refused the connection" in line
    assert "KVSTORE_ADDRESS" in line


def test_a_dead_storage_node_is_named(cluster: ServedCluster, caplog: pytest.LogCaptureFixture) -> None:
    prompt, endpoint = random_prompt(600, seed=1), cluster.servers[0].address
    with caplog.at_level(logging.WARNING), connect(cluster.address) as client:
        cached = CachedModel(tiny_model("llama"), client)
        cached.generate(prompt, **GREEDY)
        client.store.flush()
        cluster.stop_storage()
        for _ in range(3):
            cached.generate(prompt, **GREEDY)
            assert endpoint in str(cached.last_report.why_not)
    assert len([line for line in warnings_of(caplog) if "; its chunks are computed" in line]) == 1


def test_a_report_says_why_nothing_was_reused(cluster: ServedCluster) -> None:
    prompt = random_prompt(600, seed=1)
    with connect(cluster.address) as client:
        cached = CachedModel(tiny_model("llama"), client)
        cached.generate(prompt, **GREEDY)
        assert cached.last_report.why_not == "not stored"
        client.store.flush()
        cached.generate(prompt, **GREEDY)
        assert cached.last_report.reused_tokens == 512
        assert cached.last_report.why_not is None
        cached.generate(torch.cat([prompt, prompt]), **GREEDY)
        assert cached.last_report.why_not == "bypassed: batch"
        cached.generate(prompt[:, :100], **GREEDY)
        assert str(cached.last_report.why_not).startswith("too_short: ")
        cached.generate(prompt, segments=[256, 300, 44], **GREEDY)
        assert cached.last_report.why_not is None
        cached.generate(random_prompt(600, seed=2), segments=[256, 300, 44], **GREEDY)
        assert cached.last_report.why_not == "not stored"
    cached.generate(prompt, **GREEDY)
    assert str(cached.last_report.why_not).startswith("closed: ")


def test_a_cause_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now_s = 0.0
    failures = FailureLog(lambda: now_s)
    threads = [
        threading.Thread(target=lambda: [failures.warn("a", "a failed") for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failures.warn("b", "b failed")
    assert warnings_of(caplog) == ["a failed", "b failed"]
    now_s = INTERVAL_S
    failures.warn("a", "a failed again")
    assert warnings_of(caplog)[2] == "a failed again (199 more times since the last such line)"


def test_causes_do_not_pile_up() -> None:
    failures = FailureLog()
    logging.disable(logging.WARNING)
    try:
        for number in range(10_000):
            failures.warn(str(number), "failed")
    finally:
        logging.disable(logging.NOTSET)
    assert len(failures._causes) == 256


def test_every_failure_that_is_counted_is_logged() -> None:
    """Each `missed(...)` of the client gives a `detail`, or counts what is no failure."""
    silent: list[str] = []
    for path in Path(kvstore_client.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "missed"):
                continue
            reason = node.args[0]
            expected = ast.unparse(reason) in {f"MissReason.{one.name}" for one in EXPECTED}
            bypass = ast.unparse(reason).startswith("MissReason.of_bypass(")
            if not (expected or bypass or any(keyword.arg == "detail" for keyword in node.keywords)):
                silent.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert silent == []
