"""The frames of a prefix, and the encoding that each chunk is read in."""

from dataclasses import replace

from kvstore_client.contiguous.grid import FrameGrid
from kvstore_client.match import Match, Variant
from kvstore_codec.codec import encode_chunk
from kvstore_codec.encoding import Encoding
from tests.client.chunks import SPEC, ids, random_kv, stored_chunks


def variant(index: int, name: str) -> Variant:
    keys, values = random_kv(index)
    encoded = encode_chunk(keys, values, spec=SPEC, chunk_id=ids(2)[index], encoding=Encoding.parse(name))
    return Variant(encoded.header, encoded.parts[0])


def match_of(*names: tuple[str, ...]) -> Match:
    return Match(
        tuple(
            replace(chunk, variants=tuple(variant(index, name) for name in names[index]))
            for index, chunk in enumerate(stored_chunks(2))
        )
    )


def test_frames_are_numbered_along_the_prefix() -> None:
    grid = FrameGrid.of(Match(tuple(stored_chunks(3))))
    assert grid is not None
    assert (grid.frames, grid.periods, grid.tokens, grid.frame_tokens) == (12, 2, 768, 64)
    assert grid.place_of(1, 6) == (1, 6)
    assert grid.place_of(0, 11) == (2, 3)
    assert grid.tokens_of(6) == slice(384, 448)
    header = grid.variants[1].header
    assert grid.size_bytes(1, [6, 7]) == sum(header.frame_lengths[6:8])


def test_a_key_names_the_bytes_of_a_frame() -> None:
    grid = FrameGrid.of(Match(tuple(stored_chunks(2))))
    assert grid is not None
    keys = {grid.key_of(period, index) for period in range(2) for index in range(8)}
    assert len(keys) == 16
    assert grid.key_of(1, 5).checksum == grid.variants[1].header.frame_checksums[5]


def test_the_most_faithful_common_geometry_is_read() -> None:
    both = ("exact-zstd", "exact-zstd@32")
    for names, frame_tokens in (((both, both), 64), ((both, both[1:]), 32), ((both[1:], both), 32)):
        grid = FrameGrid.of(match_of(*names))
        assert grid is not None
        assert grid.frame_tokens == frame_tokens
        assert {v.header.geometry.frame_tokens for v in grid.variants} == {frame_tokens}


def test_without_a_common_geometry_there_is_no_grid() -> None:
    assert FrameGrid.of(match_of(("exact-zstd",), ("exact-zstd@32",))) is None


def test_frames_that_do_not_divide_a_chunk_are_refused() -> None:
    assert FrameGrid.of(match_of(("exact-zstd@96",), ("exact-zstd@96",))) is None


def test_each_encoding_that_all_chunks_have_has_its_grid() -> None:
    both, third = ("exact-zstd", "low-zstd"), ("exact-zstd", "medium-zstd", "low-zstd")
    grids = FrameGrid.each_of(match_of(both, third))
    assert [{v.header.encoding.name for v in grid.variants} for grid in grids] == [
        {"exact-zstd"},
        {"low-zstd"},
    ]
    assert all(len(chunk.variants) == 1 for grid in grids for chunk in grid.chunks)


def test_without_a_common_encoding_each_chunk_is_read_in_its_most_faithful_one() -> None:
    (grid,) = FrameGrid.each_of(match_of(("exact-zstd", "low-zstd"), ("medium-zstd",)))
    assert [v.header.encoding.name for v in grid.variants] == ["exact-zstd", "medium-zstd"]
    assert FrameGrid.each_of(Match()) == []
