"""Log lines as JSON, and the ids of requests in them."""

import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from kvstore_client import connect, request_scope
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.logs import JsonFormatter, LogFormat, LogLevel, RecentLines, as_text, install
from kvstore_client.request_id import current_request_id, in_request, plain_id
from tests.client.models import random_prompt, tiny_model
from tests.service.secured import SecuredCluster

SALT = "a-secret-salt"
GREEDY = {"do_sample": False, "max_new_tokens": 2}
log = logging.getLogger("kvstore_client.test")


@contextmanager
def captured(level: LogLevel, log_format: LogFormat = LogFormat.JSON) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    undo = install(log_format, level, "test", stream)
    try:
        yield stream
    finally:
        undo()


def lines(stream: io.StringIO) -> list[dict[str, str]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SecuredCluster]:
    made = SecuredCluster(tmp_path)
    yield made
    made.close()


@contextmanager
def worker(cluster: SecuredCluster, token: str, folder: Path) -> Iterator[CachedModel]:
    with connect(cluster.front.address, token=token, tenant_salt=SALT, cache_dir=folder) as client:
        cached = CachedModel(tiny_model(), client)
        yield cached
        cached.close()


def put_and_get(cached: CachedModel, chunks: int, seed: int) -> list[int]:
    """Returns the prompt's tokens."""
    prompt = random_prompt(256 * chunks + 20, seed=seed)
    for request_id in ("put-1", "get-1"):
        with request_scope(request_id):
            cached.generate(prompt, **GREEDY)
        cached.client.store.flush()
    assert cached.last_report.reused_tokens == 256 * chunks
    return prompt[0].tolist()


def test_a_whole_put_and_get_can_be_followed_and_tells_no_secret(
    cluster: SecuredCluster, tmp_path: Path
) -> None:
    token = cluster.token("acme")
    with worker(cluster, token, tmp_path) as cached, captured(LogLevel.DEBUG) as stream:
        tokens = put_and_get(cached, chunks=3, seed=1)
        few = lines(stream)
        more_tokens = put_and_get(cached, chunks=9, seed=2)
        many = lines(stream)[len(few) :]
    of_requests = [line for line in few if line.get("request_id") in ("put-1", "get-1")]
    loggers = {(line["request_id"], line["logger"]) for line in of_requests}
    for logger in ("kvstore_client.client", "kvstore_service.request_log"):
        assert ("get-1", logger) in loggers, "the same id on both sides of the network"
    reads = [line for line in of_requests if line["message"].startswith("Read served in ")]
    assert {line["request_id"] for line in reads} == {"get-1"}, "the bulk port, too"
    assert ("put-1", "kvstore_client.store") in loggers
    assert ("put-1", "kvstore_service.request_log") in loggers

    def about_requests(told: list[dict[str, str]]) -> int:
        return sum(line.get("request_id") in ("put-1", "get-1") for line in told)

    assert abs(about_requests(many) - about_requests(few)) <= 3, "no line for each chunk"
    text = stream.getvalue()
    assert token not in text
    assert SALT not in text
    assert "earer" not in text
    for prompt in (tokens, more_tokens):
        numbers = re.compile(r"\D+".join(map(str, prompt[:4])))
        assert not numbers.search(text)


def test_at_info_no_request_is_logged(cluster: SecuredCluster, tmp_path: Path) -> None:
    with worker(cluster, cluster.token("acme"), tmp_path) as cached:
        put_and_get(cached, chunks=1, seed=1)  # the canary is compared
        with captured(LogLevel.INFO) as stream:
            put_and_get(cached, chunks=3, seed=2)
    slow = re.compile(r" in \d{4,}\.\d ms")
    told = [line for line in lines(stream) if "request_id" in line and not slow.search(line["message"])]
    assert told == []


def test_a_request_without_an_id_gets_one(cluster: SecuredCluster, tmp_path: Path) -> None:
    with worker(cluster, cluster.token("acme"), tmp_path) as cached, captured(LogLevel.DEBUG) as stream:
        cached.generate(random_prompt(600, seed=1), **GREEDY)
    about = [line for line in lines(stream) if line["logger"] == "kvstore_client.client"]
    made = {line["request_id"] for line in about if "request_id" in line}
    assert len(made) == 1
    assert re.fullmatch("[0-9a-f]{16}", made.pop())


def test_a_line_of_json_has_all_that_is_known() -> None:
    with captured(LogLevel.INFO) as stream, request_scope("r-1"):
        try:
            int("no")
        except ValueError:
            log.exception("it is %s", "broken\n\x1b[31m")
        log.debug("not written")
    (line,) = lines(stream)
    assert line["level"] == "error"
    assert line["component"] == "test"
    assert line["message"] == "it is broken\n\x1b[31m"
    assert line["request_id"] == "r-1"
    assert line["exception"].endswith("'no'")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


def test_text_has_no_control_characters() -> None:
    with captured(LogLevel.INFO, LogFormat.TEXT) as stream:
        log.warning("red \x1b[31m")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(r"WARNING test: red \x1b[31m")


def test_a_long_message_is_cut() -> None:
    with captured(LogLevel.INFO) as stream:
        log.info("x" * 100_000)
    assert len(stream.getvalue()) < 5000


def test_only_the_last_lines_are_kept_and_each_is_read_once() -> None:
    kept = RecentLines("node-0", most=3)
    assert kept.after(0)[0] == []
    for number in range(5):
        kept.handle(logging.makeLogRecord({"msg": f"line {number}", "levelname": "INFO"}))
    found, last = kept.after(0)
    assert [json.loads(line)["message"] for line in found] == ["line 2", "line 3", "line 4"]
    assert kept.after(last) == ([], last)
    assert len(kept.after(0, most=2)[0]) == 2
    kept.handle(logging.makeLogRecord({"msg": "new", "levelname": "INFO"}))
    assert [as_text(line).rpartition(": ")[2] for line in kept.after(last)[0]] == ["new"]


def test_the_id_follows_into_a_thread() -> None:
    found: list[str] = []
    with request_scope("outer"):
        thread = Thread(target=in_request(lambda: found.append(current_request_id())))
        with request_scope() as inner:
            assert inner == "outer"
    thread.start()
    thread.join()
    assert found == ["outer"]
    assert current_request_id() == ""


@pytest.mark.parametrize(
    ("given", "plain"), [("cmpl-1/x", "cmpl-1/x"), ("a b\n\x00é", "a_b___"), ("x" * 1000, "x" * 128)]
)
def test_ids_are_made_fit_for_metadata(given: str, plain: str) -> None:
    assert plain_id(given) == plain


def test_the_formatter_needs_no_request() -> None:
    told = json.loads(JsonFormatter("").format(logging.makeLogRecord({"msg": "m", "levelname": "INFO"})))
    assert "request_id" not in told
    assert "component" not in told
