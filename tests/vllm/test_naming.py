"""Names of what vLLM's own requests compute."""

from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
import torch
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
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
IMAGE, OTHER_IMAGE = "a1" * 32, "b2" * 32


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> KVStoreClient:
    """Naming asks nobody."""
    return connect(f"127.0.0.1:{free_port()}", cache_dir=tmp_path_factory.mktemp("cache"))


def request(**options: Any) -> Request:
    return Request("request", TOKENS, SamplingParams(max_tokens=8), None, **options)


def image(identifier: str, offset: int, length: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(None, "image", identifier, PlaceholderRange(offset=offset, length=length))


def names(client: KVStoreClient, asked: Request) -> list[bytes]:
    ids = RequestText(asked).name(
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
