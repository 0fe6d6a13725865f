"""Names of what vLLM's own requests compute."""

from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
import torch
import vllm
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core import kv_cache_utils
from vllm.v1.request import Request

from kvstore_client.client import KVStoreClient, connect
from kvstore_client.engines.vllm.naming import RequestText
from kvstore_codec.errors import UnsupportedEngineError
from kvstore_codec.identity import ChunkId, PrefixId
from kvstore_codec.model_spec import KVDtype, ModelSpec
from tests.vllm.processes import free_port, prompt

pytestmark = pytest.mark.vllm

SPEC = ModelSpec("tiny", bytes(32), 2, 2, 16, KVDtype.FLOAT32, None, numerics=(("keys", "after RoPE"),))
TOKENS = prompt(768, seed=9)
needs_paths = pytest.mark.skipif(
    vllm.__version__.startswith("0.30"), reason="vLLM 0.30 tells adapters apart by their names only"
)
IMAGE, OTHER_IMAGE = "a1" * 32, "b2" * 32


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> KVStoreClient:
    """Naming asks nobody."""
    return connect(f"127.0.0.1:{free_port()}", cache_dir=tmp_path_factory.mktemp("cache"))


def request(**options: Any) -> Request:
    return Request("request", TOKENS, SamplingParams(max_tokens=8), None, **options)


def image(identifier: str, offset: int, length: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(None, "image", identifier, PlaceholderRange(offset=offset, length=length))


def with_adapter(name: str, path: str, **options: Any) -> Request:
    return request(lora_request=LoRARequest(name, 1, path), **options)


def names(client: KVStoreClient, asked: Request, adapter: bytes | None = None) -> list[bytes]:
    """`adapter` is the digest of the request's adapter."""
    ids = RequestText(asked, adapter).name(
        asked.num_tokens, lambda parent, tokens, more: client.next_chunk_id(SPEC, parent, tokens, more)
    )
    return [chunk_id.prefix_id for chunk_id in ids]


def test_a_plain_request_has_the_names_of_every_engine(client: KVStoreClient) -> None:
    assert names(client, request()) == [chunk_id.prefix_id for chunk_id in client.chunk_ids(SPEC, TOKENS)]


def test_requests_that_differ_in_more_than_tokens_never_meet(client: KVStoreClient) -> None:
    found = [
        names(client, asked)
        for asked in (
            request(),
            request(cache_salt="a"),
            request(cache_salt="b"),
            request(cache_salt=IMAGE),
            request(prompt_embeds=torch.ones(768, 8)),
            request(prompt_embeds=torch.zeros(768, 8)),
            request(mm_features=[image(IMAGE, 0, 100)]),
            request(mm_features=[image(IMAGE, 1, 100)]),
            request(mm_features=[image(OTHER_IMAGE, 0, 100)]),
            request(mm_features=[image(IMAGE, 0, 100), image(OTHER_IMAGE, 100, 100)]),
            request(mm_features=[image(OTHER_IMAGE, 0, 100), image(IMAGE, 100, 100)]),
            request(mm_features=[image(IMAGE, 0, 100)], cache_salt="a"),
        )
    ]
    assert len({name for row in found for name in row}) == 3 * len(found)


@needs_paths
def test_an_adapter_is_named_by_what_it_computes(client: KVStoreClient) -> None:
    first, second = b"1" * 32, b"2" * 32
    found = [
        names(client, request()),
        names(client, request(cache_salt="a")),
        names(client, request(cache_salt=first.decode())),
        names(client, with_adapter("a", "/a"), first),
        names(client, with_adapter("a", "/a"), second),
        names(client, with_adapter("a", "/a", cache_salt="a"), first),
        names(client, with_adapter("a", "/a", mm_features=[image(IMAGE, 0, 100)]), first),
        names(client, with_adapter("a", "/a", prompt_embeds=torch.ones(768, 8)), first),
    ]
    assert len({name for row in found for name in row}) == 3 * len(found)
    assert names(client, with_adapter("b", "/elsewhere"), first) == found[3]


@needs_paths
def test_nothing_is_named_before_the_adapter_is_known(client: KVStoreClient) -> None:
    with pytest.raises(UnsupportedEngineError, match="not known"):
        names(client, with_adapter("a", "/a"))


def test_an_adapter_that_vllm_tells_apart_by_its_name_only_is_refused(
    client: KVStoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM 0.30 does, whose own prefix cache gives one adapter the KV of another one of its name."""
    monkeypatch.setattr(
        kv_cache_utils, "_gen_lora_extra_hash_keys", lambda asked: [asked.lora_request.lora_name]
    )
    with pytest.raises(UnsupportedEngineError, match="by their names only"):
        names(client, with_adapter("a", "/a"), bytes(32))


def test_a_key_of_a_block_that_is_not_known_is_not_left_out(
    client: KVStoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in [("new", "a"), ("mm", IMAGE), ("lora", "a", "/a"), None]:
        monkeypatch.setattr(kv_cache_utils, "_gen_lora_extra_hash_keys", lambda _, key=key: [key])
        with pytest.raises(UnsupportedEngineError, match="cannot be interpreted"):
            names(client, request())


def test_what_is_before_an_image_is_shared_and_what_is_behind_it_is_not(client: KVStoreClient) -> None:
    plain, first, second = (
        names(client, request(mm_features=features))
        for features in ([], [image(IMAGE, 250, 300)], [image(OTHER_IMAGE, 300, 300)])
    )
    assert first[0] != plain[0] == second[0]
    assert len({plain[1], first[1], second[1], plain[2], first[2], second[2]}) == 6


def test_an_image_over_many_chunks_is_in_the_name_of_each(client: KVStoreClient) -> None:
    qualifiers: list[bytes] = []

    def next_id(parent: PrefixId, tokens: Any, qualifier: bytes) -> ChunkId:
        qualifiers.append(qualifier)
        return client.next_chunk_id(SPEC, parent, tokens, qualifier)

    RequestText(request(mm_features=[image(IMAGE, 200, 400)], cache_salt="a")).name(768, next_id)
    told = [msgpack.unpackb(qualifier) for qualifier in qualifiers]
    assert told == [
        [["mm", IMAGE, 200], ["cache_salt", "a"]],
        [["mm", IMAGE, -56]],
        [["mm", IMAGE, -312]],
    ], "all releases of vLLM give the same names"


def test_an_image_that_the_caller_has_named_is_neither_read_nor_stored(client: KVStoreClient) -> None:
    with pytest.raises(UnsupportedEngineError, match="name of the caller's"):
        names(client, request(mm_features=[image("picture 1", 300, 100)]))
