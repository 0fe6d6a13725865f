"""Chunks are stored with an order of their tokens where the selector goes by one."""

from dataclasses import replace
from functools import partial

import pytest

from kvstore_client.client import connect
from kvstore_client.new_chunk import NewChunk
from kvstore_client.recompute import ReusedChunk, select, selector, token_order
from kvstore_client.settings import ClientSettings, SelectorName
from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.identity import chunk_ids
from kvstore_codec.model_spec import ModelSpec
from tests.client.chunks import SPEC, random_kv
from tests.client.conftest import ServedCluster


def stored_headers(cluster: ServedCluster, spec: ModelSpec = SPEC, **settings: str) -> list[ChunkHeader]:
    """Of two chunks in two encodings, as another client finds them."""
    document = chunk_ids(spec.digest, b"", range(512))
    accept = ("exact-zstd", "high-zstd")
    with connect(cluster.address, encoding=",".join(accept), **settings) as client:
        new = [NewChunk(chunk_id, partial(random_kv, index)) for index, chunk_id in enumerate(document)]
        assert client.store.put(spec, new).result(20) == 2
    with connect(cluster.address, accept=accept, fetch_policy="adaptive") as client:
        match = client.match(spec, document)
        client.release(match)
    headers = [variant.header for chunk in match.chunks for variant in chunk.variants]
    assert len(headers) == 4
    return headers


@pytest.mark.parametrize("name", ["frequency", "frequency-high"])
def test_with_each_encoding(cluster: ServedCluster, name: str) -> None:
    headers = stored_headers(cluster, recompute_selector=name)
    for index, pair in enumerate((headers[:2], headers[2:])):
        expected = token_order(*random_kv(index))
        assert [header.token_order for header in pair] == [expected, expected]
        chunk = ReusedChunk(range(256), exact=False, order=pair[0].token_order)
        chosen = select(selector(name), [chunk], 256, 0.15).tolist()
        assert chosen == sorted((expected.low if name == "frequency" else expected.high)[:38])


def test_not_where_nobody_goes_by_it(cluster: ServedCluster) -> None:
    assert {header.token_order for header in stored_headers(cluster)} == {None}


def test_not_by_a_rank_that_sees_but_its_own_heads(cluster: ServedCluster) -> None:
    rank = replace(SPEC, tp_rank=1, tp_size=2)
    headers = stored_headers(cluster, rank, recompute_selector="frequency")
    assert {header.token_order for header in headers} == {None}


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ClientSettings()
    assert settings.recompute.selector == "focus"
    assert settings.recompute.ratio is None
    assert settings.recompute.floor == 0.15
    assert settings.recompute.drift
    monkeypatch.setenv("KVSTORE_RECOMPUTE_SELECTOR", "frequency-high")
    monkeypatch.setenv("KVSTORE_RECOMPUTE_RATIO", "0.3")
    monkeypatch.setenv("KVSTORE_RECOMPUTE_FLOOR", "0.05")
    monkeypatch.setenv("KVSTORE_RECOMPUTE_DRIFT", "false")
    settings = ClientSettings()
    assert settings.recompute.selector is SelectorName.FREQUENCY_HIGH
    assert settings.recompute.selector.needs_order
    assert (settings.recompute.ratio, settings.recompute.floor) == (0.3, 0.05)
    assert not settings.recompute.drift
    monkeypatch.setenv("KVSTORE_RECOMPUTE_RATIO", "")
    monkeypatch.setenv("KVSTORE_DISK_TIER", "")
    assert (ClientSettings().recompute.ratio, ClientSettings().recompute.disk_tier) == (None, None)


@pytest.mark.parametrize("zero", [0, 0.0, "0"])
def test_a_ratio_of_nothing_is_a_ratio(monkeypatch: pytest.MonkeyPatch, zero: object) -> None:
    assert ClientSettings(recompute_ratio=zero).recompute.ratio == 0  # type: ignore[arg-type]
    monkeypatch.setenv("KVSTORE_RECOMPUTE_RATIO", "0")
    assert ClientSettings().recompute.ratio == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("recompute_selector", "magic"),
        ("recompute_ratio", 1.5),
        ("recompute_ratio", -0.1),
        ("recompute_floor", 2),
    ],
)
def test_settings_that_make_no_sense(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=name):
        connect("127.0.0.1:1", **{name: value})
