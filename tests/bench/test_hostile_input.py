"""Hostile input with right checksums: what every parser does with it, and what each was once broken by."""

from __future__ import annotations

import json
import logging
import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest

from kvstore_bench.hostile.chunks import sealed_header
from kvstore_bench.hostile.memory import PeakMemory
from kvstore_bench.hostile.models import sealed_canary
from kvstore_bench.hostile.parser import MEMORY, READ, Parser, limit_bytes, outcome_of, random_of
from kvstore_bench.hostile.run import BATCH, _judge, _Prepared, judged
from kvstore_bench.hostile.stores import sealed_json
from kvstore_bench.hostile.table import PARSERS
from kvstore_bench.hostile.values import edit_value, json_like_copy
from kvstore_codec.chunk import FIXED_PREFIX_BYTES

MUTANTS = 80
INFINITY = float("inf")
DEEP = 900
MIB = 1 << 20


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Readers of unusable files log why, once for each."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def memory() -> Iterator[PeakMemory]:
    with PeakMemory() as found:
        yield found


@pytest.mark.parametrize("name", PARSERS)
def test_mutants_are_read_or_refused(name: str, one_thread: None, memory: PeakMemory) -> None:
    parser = PARSERS[name]
    for data in parser.honest():
        parser.read(data)
    found = [
        outcome_of(parser, parser.mutant(random_of(1, name, number)), memory, INFINITY)
        for number in range(MUTANTS)
    ]
    assert not [(number, outcome) for number, outcome in enumerate(found) if outcome.is_fault]
    outcomes = Counter(outcome.what for outcome in found)
    assert outcomes[READ] > 0
    if name != "disk-tier":  # a recovery drops what it cannot use
        assert outcomes.total() - outcomes[READ] > MUTANTS / 10


@pytest.mark.parametrize("name", PARSERS)
def test_mutants_come_back_by_number(name: str) -> None:
    made = [PARSERS[name].mutant(random_of(3, name, number)) for number in range(20)]
    assert made == [PARSERS[name].mutant(random_of(3, name, number)) for number in range(20)]
    assert len(set(made)) > 10


def nested(depth: int, opening: str, closing: str) -> str:
    return opening * depth + closing * depth


def header(**changed: Any) -> bytes:
    fields = msgpack.unpackb(PARSERS["chunk-header"].honest()[0][FIXED_PREFIX_BYTES:-8])
    return sealed_header(msgpack.packb(fields | changed))


def header_with(value: bytes) -> bytes:
    """A header whose encoding is this encoded value."""
    fields = msgpack.unpackb(PARSERS["chunk-header"].honest()[0][FIXED_PREFIX_BYTES:-8])
    return sealed_header(msgpack.packb(fields | {"encoding": "<>"}).replace(b"\xa2<>", value))


def catalogue(field: str, value: str) -> bytes:
    """A catalogue in whose state a field has this JSON."""
    document = json.loads(PARSERS["catalogue"].honest()[0])
    state = json.dumps(document["state"] | {field: "<>"})
    return sealed_json(document, "state", state.replace('"<>"', value).encode())


def catalogue_of_member(**changed: Any) -> bytes:
    nodes = json.loads(PARSERS["catalogue"].honest()[0])["state"]["nodes"]
    nodes[0]["member"] |= changed
    return catalogue("nodes", json.dumps(nodes))


def catalogue_of_version(version: str) -> bytes:
    document = json.loads(PARSERS["catalogue"].honest()[0])
    return json.dumps(document | {"version": "<>"}).replace('"<>"', version).encode()


def forgotten(**changed: Any) -> bytes:
    document = json.loads(PARSERS["forgotten-tenants"].honest()[0])
    return sealed_json(document, "content", json.dumps(document["content"] | changed).encode())


def canary(**changed: Any) -> bytes:
    content = PARSERS["canary-registry"].honest()[0]
    (length,) = struct.unpack_from("<I", content, 8)
    facts = msgpack.unpackb(content[12 : 12 + length])
    packed = msgpack.packb({**facts, **changed, "origin": facts["origin"] | changed.get("origin", {})})
    return sealed_canary(packed, len(packed), content[12 + length :])


def deep_canary() -> bytes:
    packed = b"\x81\xa6client" + b"\x91" * DEEP + b"\xc0"
    return sealed_canary(packed, len(packed), b"")


def kept(name: str, **changed: Any) -> bytes:
    return json.dumps(json.loads(PARSERS[name].honest()[0]) | changed).encode()


def batch(time_unix_s: float) -> bytes:
    return msgpack.packb([time_unix_s, [], 0])


def summary(scale: float) -> bytes:
    return struct.pack("<f", scale) + PARSERS["key-summary"].honest()[0][4:]


BROKEN: dict[str, tuple[str, Callable[[], bytes]]] = {
    "encoding nested deeply": ("chunk-header", lambda: header_with(b"\x91" * DEEP + b"\xc0")),
    "origin with an infinite pid": ("canary-registry", lambda: canary(origin={"pid": INFINITY})),
    "canary made at no time": ("canary-registry", lambda: canary(created=float("nan"))),
    "client nested deeply": ("canary-registry", deep_canary),
    "endpoint that is a list": ("catalogue", lambda: catalogue_of_member(endpoint=[1])),
    "name that cannot be encoded": ("catalogue", lambda: catalogue_of_member(node_id="\ud800")),
    "weight beyond all numbers": ("catalogue", lambda: catalogue_of_member(weight=10**400)),
    "draining node that is a number": ("catalogue", lambda: catalogue("draining", '["a", 5]')),
    "quota below zero": ("catalogue", lambda: catalogue("quotas", '{"acme": -1}')),
    "epoch of more than 64 bits": ("catalogue", lambda: catalogue("epoch", str(1 << 64))),
    "version nested deeply": ("catalogue", lambda: catalogue_of_version(nested(DEEP, "[", "]"))),
    "negative revision": ("redis-catalogue", lambda: b"-1 token\n" + PARSERS["catalogue"].honest()[0]),
    "revision in Arabic digits": (
        "redis-catalogue",
        lambda: "٣ token\n".encode() + PARSERS["catalogue"].honest()[0],
    ),
    "infinite generation": ("forgotten-tenants", lambda: forgotten(floor=INFINITY)),
    "sequence of more than 64 bits": ("forgotten-tenants", lambda: forgotten(floor_sequence=1 << 64)),
    "tenant that cannot be encoded": ("forgotten-tenants", lambda: forgotten(tenants=[["\ud800", 2, 3]])),
    "prefill that never ends": (
        "profile",
        lambda: kept("profile", prefill={"fixed_s": 1e308, "per_token_s": 1e308, "per_pair_s": 1}),
    ),
    "line nested deeply": ("trace", lambda: nested(100_000, "[", "]").encode()),
    "bandwidths without a mean": ("link-trace", lambda: b"0 1e308\n1e308 1e308\n"),
    "event at no time": ("kv-events", lambda: batch(float("nan"))),
    "keys beyond all numbers": ("key-summary", lambda: summary(3e38)),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_input_that_broke_a_parser_is_refused(fault: str, memory: PeakMemory) -> None:
    name, make = BROKEN[fault]
    parser = PARSERS[name]
    parser.read(parser.honest()[0])
    found = outcome_of(parser, make(), memory, INFINITY)
    assert found.what in [error.__name__ for refusal in parser.refusals for error in _tree(refusal)]


def _tree(error: type[Exception]) -> list[type[Exception]]:
    return [error, *(child for direct in error.__subclasses__() for child in _tree(direct))]


def json_bomb(name: str, field: str) -> bytes:
    content = json.dumps(json.loads(PARSERS[name].honest()[0]) | {field: "<>"})
    return content.replace('"<>"', "[{}" + ",{}" * (MIB // 3) + "]").encode()


BOMBS: dict[str, Callable[[], bytes]] = {
    "chunk-header": lambda: header_with(b"\xdd" + (MIB // 2).to_bytes(4, "big") + b"\x80" * (MIB // 2)),
    "kv-events": lambda: b"\x92\x00\xdd" + MIB.to_bytes(4, "big") + b"\x80" * MIB,
    "forgotten-tenants": lambda: json_bomb("forgotten-tenants", "content"),
    "profile": lambda: json_bomb("profile", "provenance"),
    "losses": lambda: json_bomb("losses", "provenance"),
    "ratios": lambda: json_bomb("ratios", "tiers"),
    "credentials": lambda: json_bomb("credentials", "credentials"),
    "token order": lambda: header(token_order=[bytes(MIB // 2), b""]),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_short_values_cannot_multiply_their_memory(bomb: str) -> None:
    parser, data = PARSERS.get(bomb, PARSERS["chunk-header"]), BOMBS[bomb]()
    parser.read(parser.honest()[0])
    tracemalloc.start()
    parser.read(parser.honest()[0])
    buffers_bytes = tracemalloc.get_traced_memory()[1]
    with pytest.raises(parser.refusals):
        parser.read(data)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < buffers_bytes + 8 * len(data), "an empty map of a byte takes 72"


@pytest.mark.parametrize("empty", [[], {}], ids=["list", "dict"])
def test_a_value_without_parts_is_edited(empty: Any) -> None:
    for seed in range(200):
        edit_value(random.Random(seed), json_like_copy(empty), ())


def test_memory_that_is_taken_once_is_no_fault(monkeypatch: pytest.MonkeyPatch, memory: PeakMemory) -> None:
    """The kernel takes pages away, and counts them when it gives them back."""
    kept: list[bytearray] = []

    def takes_once(data: bytes) -> None:
        if not kept:
            kept.append(bytearray(b"\1") * (64 << 20))

    parser = Parser("once", lambda: (b"",), lambda _: b"", takes_once, (ValueError,))
    monkeypatch.setitem(PARSERS, "once", parser)
    prepared = _Prepared("once", memory, 0)
    tally = _judge(1, prepared, 0, lambda _: None)
    assert kept
    assert not tally.faults
    assert tally.mutants == BATCH


def test_what_a_parser_does_wrong_is_noticed(memory: PeakMemory) -> None:
    def takes_memory(data: bytes) -> None:
        bytearray(b"\1") * (64 << 20)

    def fails(data: bytes) -> None:
        raise ZeroDivisionError("in a parser")

    for read, what in ((takes_memory, MEMORY), (fails, "ZeroDivisionError")):
        parser = Parser("wrong", lambda: (b"",), lambda _: b"", read, (ValueError,))
        found = outcome_of(parser, b"", memory, limit_bytes(0))
        assert (found.what, found.is_fault) == (what, True)


@pytest.mark.slow
def test_a_run_counts_every_mutant() -> None:
    tallies = list(judged("link-trace", 5, range(2 * BATCH), processes=2))
    assert sum(tally.mutants for tally in tallies) == 2 * BATCH
    assert not [fault for tally in tallies for fault in tally.faults]
