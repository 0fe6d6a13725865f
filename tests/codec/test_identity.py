from __future__ import annotations

import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_codec.errors import CodecError, InvalidKVError, InvalidTokensError
from kvstore_codec.identity import (
    ROOT_PREFIX,
    ChunkId,
    ContentId,
    PlacedChunk,
    PrefixId,
    begins_text,
    behind_approximate,
    chunk_ids,
    content_id,
    prefix_id,
    qualified_salt,
    segment_chunks,
)

SPEC_DIGEST = bytes(range(32))
tokens_lists = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40)


def field(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def test_content_id_is_blake3_over_length_prefixed_fields() -> None:
    tokens = [1, 2, -3, 2**31 - 1]
    hashed = (
        field(b"kvstore.content.v1")
        + field(SPEC_DIGEST)
        + field(b"tenant")
        + field(struct.pack("<4i", *tokens))
    )
    assert content_id(SPEC_DIGEST, b"tenant", tokens) == blake3(hashed).digest()


def test_prefix_id_is_blake3_over_parent_and_content() -> None:
    parent, content = PrefixId(b"p" * 32), ContentId(b"c" * 32)
    hashed = field(b"kvstore.prefix.v1") + field(parent) + field(content)
    assert prefix_id(parent, content) == blake3(hashed).digest()
    assert bytes(32) == ROOT_PREFIX


def test_ids_are_known_constants() -> None:
    (chunk,) = chunk_ids(SPEC_DIGEST, b"", range(256))
    assert chunk.content_id.hex() == "69341e01104222056779420ae6fadb39b884e6c6560d98de4ac9eac20db0f766"
    assert chunk.prefix_id.hex() == "85a5ca29eb28c13684ed48e7ff2dc16e80ed68f2423770299fe8e7ceb0fd8c8c"
    assert chunk.short == "69341e01+85a5ca29"


def test_ids_are_equal_in_every_process() -> None:
    code = (
        "from kvstore_codec.identity import chunk_ids\n"
        "from kvstore_codec.model_spec import *\n"
        "rope = RopeSpec('yarn', 1e4, 64, tuple(sorted({'factor': 2.0, 'beta_fast': 32}.items())))\n"
        "spec = ModelSpec('m', bytes(32), 2, 3, 64, KVDtype.FLOAT16, rope)\n"
        "print(spec.digest.hex(), [c.prefix_id.hex() for c in chunk_ids(spec.digest, b's', range(512))])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "4242")
    }
    assert len(outputs) == 1
    assert len(outputs.pop()) > 3 * 64


@settings(deadline=None)
@given(tokens=tokens_lists, chunk_tokens=st.integers(1, 9), salt=st.binary(max_size=8))
def test_chunk_ids_chain_the_content_ids_of_full_chunks(
    tokens: list[int], chunk_tokens: int, salt: bytes
) -> None:
    ids = chunk_ids(SPEC_DIGEST, salt, tokens, chunk_tokens)
    assert len(ids) == len(tokens) // chunk_tokens
    parent = ROOT_PREFIX
    for index, chunk in enumerate(ids):
        content = content_id(SPEC_DIGEST, salt, tokens[index * chunk_tokens : (index + 1) * chunk_tokens])
        parent = prefix_id(parent, content)
        assert chunk == ChunkId(content, parent)


@settings(deadline=None)
@given(tokens=tokens_lists)
def test_containers_and_integer_types_do_not_matter(tokens: list[int]) -> None:
    wanted = content_id(SPEC_DIGEST, b"", tokens)
    assert content_id(SPEC_DIGEST, b"", tuple(tokens)) == wanted
    assert content_id(SPEC_DIGEST, b"", np.array(tokens, np.int64)) == wanted
    assert content_id(SPEC_DIGEST, b"", np.array(tokens, ">i4")) == wanted
    assert content_id(SPEC_DIGEST, b"", torch.tensor(tokens, dtype=torch.int64)) == wanted


@settings(deadline=None)
@given(left=tokens_lists, right=tokens_lists)
def test_different_tokens_have_different_ids(left: list[int], right: list[int]) -> None:
    assert (content_id(SPEC_DIGEST, b"", left) == content_id(SPEC_DIGEST, b"", right)) == (left == right)


def test_fields_cannot_run_into_each_other() -> None:
    one = content_id(SPEC_DIGEST, b"", [0x61616161])
    assert one != content_id(SPEC_DIGEST, b"aaaa", [])
    assert one != content_id(SPEC_DIGEST + b"aaaa", b"", [])


@pytest.mark.parametrize(
    "tokens",
    [
        [2**31],
        [-(2**31) - 1],
        [2**70],
        [1.5],
        ["a"],
        [[1, 2], [3, 4]],
        np.array([2**32], np.uint64),
        torch.tensor([1.0]),
    ],
)
def test_ids_that_are_not_int32_are_refused(tokens: object) -> None:
    with pytest.raises(InvalidTokensError) as caught:
        content_id(SPEC_DIGEST, b"", tokens)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, CodecError)


def test_chunks_of_no_tokens_are_refused() -> None:
    with pytest.raises(InvalidTokensError):
        chunk_ids(SPEC_DIGEST, b"", [1, 2], chunk_tokens=0)


def test_chunk_ids_hold_32_bytes() -> None:
    with pytest.raises(InvalidKVError, match="prefix_id"):
        ChunkId(ContentId(bytes(32)), PrefixId(bytes(31)))


# ---- prompts in segments

documents = st.lists(tokens_lists, max_size=6)


def segments_of(parts: list[list[int]]) -> tuple[list[int], list[int]]:
    return [token for part in parts for token in part], [len(part) for part in parts]


@settings(deadline=None)
@given(parts=documents, chunk_tokens=st.integers(1, 9), salt=st.binary(max_size=8))
def test_segments_are_cut_from_their_own_start_and_chained_with_their_tails(
    parts: list[list[int]], chunk_tokens: int, salt: bytes
) -> None:
    wanted: list[PlacedChunk] = []
    parent, first = ROOT_PREFIX, 0
    for part in parts:
        for start in range(0, len(part), chunk_tokens):
            piece = part[start : start + chunk_tokens]
            content = content_id(SPEC_DIGEST, salt, piece)
            context = prefix_id(parent, content)
            if len(piece) == chunk_tokens:
                wanted.append(PlacedChunk(ChunkId(content, context), parent, first + start))
            parent = context
        first += len(part)
    assert segment_chunks(SPEC_DIGEST, salt, *segments_of(parts), chunk_tokens) == wanted


@settings(deadline=None)
@given(tokens=tokens_lists, chunk_tokens=st.integers(1, 9))
def test_one_segment_is_a_text(tokens: list[int], chunk_tokens: int) -> None:
    placed = segment_chunks(SPEC_DIGEST, b"", tokens, [len(tokens)], chunk_tokens)
    assert [chunk.chunk_id for chunk in placed] == chunk_ids(SPEC_DIGEST, b"", tokens, chunk_tokens)
    assert [chunk.first_token for chunk in placed] == [
        chunk_tokens * index for index in range(len(tokens) // chunk_tokens)
    ]


@settings(deadline=None)
@given(parts=documents, document=tokens_lists, data=st.data(), chunk_tokens=st.integers(1, 9))
def test_a_document_has_the_same_contents_wherever_it_stands(
    parts: list[list[int]], document: list[int], data: st.DataObject, chunk_tokens: int
) -> None:
    place = data.draw(st.integers(0, len(parts)))
    together = [*parts[:place], document, *parts[place:]]
    first = sum(map(len, parts[:place]))
    there = [
        chunk
        for chunk in segment_chunks(SPEC_DIGEST, b"", *segments_of(together), chunk_tokens)
        if first <= chunk.first_token < first + len(document)
    ]
    alone = chunk_ids(SPEC_DIGEST, b"", document, chunk_tokens)
    assert [chunk.chunk_id.content_id for chunk in there] == [chunk.content_id for chunk in alone]
    assert [chunk.first_token - first for chunk in there] == [chunk_tokens * i for i in range(len(alone))]
    if not first:
        assert [chunk.chunk_id for chunk in there] == alone


@settings(deadline=None)
@given(parts=documents, place=st.integers(0, 6), chunk_tokens=st.integers(1, 9))
def test_empty_segments_change_nothing(parts: list[list[int]], place: int, chunk_tokens: int) -> None:
    with_empty = [*parts[:place], [], *parts[place:]]
    assert segment_chunks(SPEC_DIGEST, b"", *segments_of(with_empty), chunk_tokens) == segment_chunks(
        SPEC_DIGEST, b"", *segments_of(parts), chunk_tokens
    )


@settings(deadline=None)
@given(tail=st.lists(st.integers(0, 9), max_size=3), other=st.lists(st.integers(0, 9), max_size=3))
def test_a_tail_is_part_of_the_context_of_what_follows(tail: list[int], other: list[int]) -> None:
    document = [1, 2, 3, 4]
    behind = [segment_chunks(SPEC_DIGEST, b"", [*t, *document], [len(t), 4], 4)[0] for t in (tail, other)]
    assert behind[0].chunk_id.content_id == behind[1].chunk_id.content_id
    assert (behind[0].chunk_id.prefix_id == behind[1].chunk_id.prefix_id) == (tail == other)
    assert begins_text(behind[0].chunk_id) == (not tail)


def test_other_salts_and_models_have_other_contents() -> None:
    prompt, segments = list(range(12)), [5, 7]
    named = [
        segment_chunks(spec, salt, prompt, segments, 2)
        for spec, salt in ((SPEC_DIGEST, b""), (SPEC_DIGEST, b"other"), (bytes(32), b""))
    ]
    contents = [chunk.chunk_id.content_id for chunks in named for chunk in chunks]
    assert len(contents) == len(set(contents)) == 15


@pytest.mark.parametrize("segments", [[], [3], [5], [2, 3], [-1, 5], [5, -1], [4, -4, 4, 1]])
def test_segments_that_are_not_the_prompt_are_refused(segments: list[int]) -> None:
    with pytest.raises(InvalidTokensError, match="segments"):
        segment_chunks(SPEC_DIGEST, b"", [1, 2, 3, 4], segments, 2)


def test_what_is_behind_approximate_kv_is_behind_no_exact_text() -> None:
    chunk, follower = chunk_ids(SPEC_DIGEST, b"", range(8), 4)
    approximate = behind_approximate(chunk.prefix_id)
    hashed = field(b"kvstore.behind-approximate.v1") + field(chunk.prefix_id)
    assert approximate == blake3(hashed).digest()
    assert len({approximate, chunk.prefix_id, follower.prefix_id, behind_approximate(approximate)}) == 4
    assert begins_text(chunk)
    assert not begins_text(follower)
    assert not begins_text(ChunkId(chunk.content_id, prefix_id(approximate, chunk.content_id)))


def test_a_qualifier_names_other_content_and_none_names_the_same() -> None:
    salts = {qualified_salt(b"tenant", qualifier) for qualifier in (b"", b"adapter a", b"adapter b")}
    assert len(salts | {qualified_salt(b"", b"adapter a")}) == 4
    assert qualified_salt(b"tenant", b"") == b"tenant"
