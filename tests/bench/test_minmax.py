"""The baseline's own arithmetic: half a level of error, every byte counted, the integers back as they were."""

import pytest
import torch

from kvstore_bench.codec.fidelity import Passage
from kvstore_bench.codec.minmax import Levels, MinMax
from kvstore_bench.codec.texts import Excerpt
from kvstore_codec.errors import UnknownEncodingError
from tests.codec.chunks import make_kv, make_spec

LAYERS, HEADS, TOKENS, DIM = 2, 3, 320, 32


@pytest.fixture(scope="module")
def passage() -> Passage:
    spec = make_spec(LAYERS, HEADS, DIM)
    keys, values = make_kv(spec, TOKENS)
    keys[1, 2, :, 7] = 3.0  # a channel without a range
    ids = torch.arange(TOKENS)
    nothing = torch.empty(0)
    return Passage(spec, Excerpt("noise", ids, ids), keys, values, nothing, nothing)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_no_value_is_off_by_more_than_half_a_level(passage: Passage, bits: int) -> None:
    levels = Levels.of(passage.keys, passage.values, bits)
    assert levels.integers.max() == (1 << bits) - 1
    keys, values = torch.empty_like(passage.keys), torch.empty_like(passage.values)
    levels.restore(keys, values)
    for exact, restored in ((passage.keys.float(), keys.float()), (passage.values.float(), values.float())):
        reach = exact.amax(2) - exact.amin(2)
        # On top of half a level: the range's ends rounded to f16, the result to bf16.
        allowed = reach / ((1 << bits) - 1) / 2 + exact.abs().amax(2) * (2**-11 + 2**-8)
        assert ((exact - restored).abs().amax(2) <= allowed).all()
    assert (keys[1, 2, :, 7] == 3.0).all()


def test_both_coders_return_the_same_kv_and_count_their_tables(passage: Passage) -> None:
    (plain,) = MinMax(6, "zstd").code([passage])
    (pictures,) = MinMax(6, "hevc-cpu").code([passage])
    assert torch.equal(plain.keys, pictures.keys)
    assert torch.equal(plain.values, pictures.values)
    # A whole chunk of 256 tokens and one of 64; two f16 a channel in each.
    tables = 2 * 2 * 2 * (2 * LAYERS * HEADS * DIM)
    values = 2 * passage.keys.numel()
    for coded in (plain, pictures):
        assert list(coded.timed_bytes) == [2 * values * 256 // TOKENS, 2 * values * 64 // TOKENS]
        assert tables + values * 4 / 8 < coded.stored_bytes < tables + values * 7.5 / 8
        assert len(coded.encode_s) == len(coded.decode_s) == len(coded.restore_s) == 2
        assert min(*coded.encode_s, *coded.decode_s, *coded.restore_s) > 0


@pytest.mark.parametrize(("bits", "coder"), [(9, "zstd"), (8, "pco"), (0, "zstd")])
def test_what_is_not_measured_is_refused(bits: int, coder: str) -> None:
    with pytest.raises(UnknownEncodingError, match="min/max"):
        MinMax(bits, coder)
