"""An encoding as the benchmark drives it."""

import pytest
import torch

from kvstore_bench.codec.fidelity import Passage
from kvstore_bench.codec.ours import Ours
from kvstore_bench.codec.texts import Excerpt
from kvstore_codec.coders import coder
from kvstore_codec.encoding import Encoding
from tests.codec.chunks import FEATURES, klt_of, make_kv, make_spec

TOKENS = 512


@pytest.fixture(scope="module")
def passage() -> Passage:
    spec = make_spec(layers=6)
    ids = torch.arange(TOKENS)
    embeddings = torch.randn(TOKENS, FEATURES // 2, generator=torch.Generator().manual_seed(3))
    return Passage(spec, Excerpt("noise", ids, ids), *make_kv(spec, TOKENS), embeddings, torch.empty(0))


def test_exact_kv_comes_back_in_one_step(passage: Passage) -> None:
    (coded,) = Ours(Encoding.parse("exact-zstd"), None).code([passage])
    assert torch.equal(coded.keys, passage.keys)
    assert torch.equal(coded.values, passage.values)
    assert len(coded.encode_s) == len(coded.decode_s) == 2
    assert not coded.restore_s
    assert 0 < coded.stored_bytes < 2 * passage.keys.nbytes


@pytest.mark.parametrize("name", ["medium-klt-pco", "high-klt-hevc-cpu@256", "medium-hevc-cpu", "low-zstd"])
def test_decoding_and_restoring_are_told_apart(passage: Passage, name: str) -> None:
    encoding = Encoding.parse(name)
    (coded,) = Ours(encoding, klt_of(passage.spec)).code([passage])
    assert len(coded.encode_s) == len(coded.decode_s) == len(coded.restore_s) == 2
    assert min(*coded.decode_s, *coded.restore_s) > 0
    error = (coded.values.float() - passage.values.float()).square().mean()
    assert 0 < error < passage.values.float().var()
    assert (
        not {"decode", "decode_pictures"} & vars(coder(encoding.coder)).keys()
    )  # nothing is watched any more
    assert set(coded.guarded) == ({"finer", "exact"} if encoding.needs_calibration else set())


def test_the_stored_bytes_are_those_of_the_chunks(passage: Passage) -> None:
    stored = {}
    for name in ("medium-klt-pco", "medium-klt-pco@256"):
        (coded,) = Ours(Encoding.parse(name), klt_of(passage.spec)).code([passage])
        stored[name] = coded.stored_bytes
    assert stored["medium-klt-pco@256"] < stored["medium-klt-pco"]
