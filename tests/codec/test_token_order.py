"""The order of tokens in a chunk's header."""

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore_codec.chunk import FIXED_PREFIX_BYTES, read_header
from kvstore_codec.codec import encode_chunk
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import ChunkFormatError
from kvstore_codec.token_order import TokenOrder
from kvstore_codec.whole_chunk import verify_chunk
from tests.codec.chunks import CHUNK_ID, make_kv, make_spec
from tests.codec.test_chunk import reseal

SPEC = make_spec(layers=2, kv_heads=1, head_dim=8)
ENCODING = Encoding.parse("exact-zstd")


def encoded(tokens: int, order: TokenOrder | None) -> list[bytes]:
    kv = make_kv(SPEC, tokens)
    return encode_chunk(*kv, spec=SPEC, chunk_id=CHUNK_ID, encoding=ENCODING, token_order=order).parts


def fields_of(header: bytes) -> dict[str, object]:
    fields: dict[str, object] = msgpack.unpackb(header[FIXED_PREFIX_BYTES:-8])
    return fields


@st.composite
def orders(draw: st.DrawFn) -> tuple[int, TokenOrder]:
    tokens = draw(st.sampled_from([1, 2, 64, 255, 256, 257, 300, 1024]))
    random = draw(st.randoms(use_true_random=False))
    prefixes = (tuple(random.sample(range(tokens), draw(st.integers(0, tokens)))) for _ in ("low", "high"))
    return tokens, TokenOrder(*prefixes)


@settings(deadline=None)
@given(orders())
def test_what_is_written_is_read(case: tuple[int, TokenOrder]) -> None:
    tokens, order = case
    packed = msgpack.unpackb(msgpack.packb(order.pack(tokens)))
    assert TokenOrder.unpack(packed, tokens) == order
    width = 1 if tokens <= 256 else 2
    assert [len(part) for part in packed] == [width * len(order.low), width * len(order.high)]


@pytest.mark.parametrize("tokens", [70, 256, 300])
def test_a_header_tells_it(tokens: int) -> None:
    low = tuple(np.random.default_rng(0).permutation(tokens).tolist())
    order = TokenOrder(low, low[::-1])
    parts = encoded(tokens, order)
    header = read_header(parts[0])
    assert header.token_order == order
    data = b"".join(parts)
    assert verify_chunk(data, len(data)) == header
    packed = fields_of(parts[0])["token_order"]
    assert packed == [np.array(o, "<u1" if tokens <= 256 else "<u2").tobytes() for o in (low, low[::-1])]


def test_without_one_the_header_is_as_it_was() -> None:
    parts = encoded(70, None)
    assert "token_order" not in fields_of(parts[0])
    assert read_header(parts[0]).token_order is None


def test_frames_do_not_depend_on_it() -> None:
    assert encoded(70, TokenOrder((3, 1), ()))[1:] == encoded(70, None)[1:]


@pytest.mark.parametrize(
    "hostile",
    [
        [b"\x00\x00", b""],  # twice
        [b"", bytes([5, 4, 5])],
        [bytes([70]), b""],  # a token that it does not have
        [bytes(range(70)) * 1000, b""],
        [b""],
        [b"", b"", b""],
        b"\x00\x01",
        "order",
        ["a", "b"],
        [1, 2],
        [None, b""],
        7,
        True,
        {},
    ],
)
def test_what_is_no_order_is_refused(hostile: object) -> None:
    fields = fields_of(encoded(70, None)[0]) | {"token_order": hostile}
    with pytest.raises(ChunkFormatError):
        read_header(reseal(msgpack.packb(fields)))


def test_half_an_index_is_refused() -> None:
    fields = fields_of(encoded(300, None)[0]) | {"token_order": [b"\x01\x00\x02", b""]}
    with pytest.raises(ChunkFormatError):
        read_header(reseal(msgpack.packb(fields)))


@pytest.mark.parametrize("low", [(1, 1), (-1, 0)])
def test_an_order_names_tokens_once(low: tuple[int, ...]) -> None:
    with pytest.raises(ChunkFormatError, match="low"):
        TokenOrder(low, ())


def test_an_order_of_more_tokens_is_not_written() -> None:
    kv = tuple(torch.zeros(2, 1, 70, 8, dtype=torch.bfloat16) for _ in range(2))
    with pytest.raises(ChunkFormatError, match="70 tokens"):
        encode_chunk(*kv, spec=SPEC, chunk_id=CHUNK_ID, encoding=ENCODING, token_order=TokenOrder((), (70,)))
