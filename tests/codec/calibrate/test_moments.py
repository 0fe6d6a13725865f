from pathlib import Path

import pytest
import torch

from kvstore_codec.calibrate import Moments
from kvstore_codec.errors import CalibrationError
from kvstore_codec.klt import token_vectors
from tests.codec.calibrate.texts import DIM, FEATURES, HEADS, LAYERS, PERIOD, Text, text


def empty(period: int = PERIOD) -> Moments:
    return Moments.empty(layers=LAYERS, period_layers=period, kv_heads=HEADS, head_dim=DIM, features=FEATURES)


def gathered(*texts: Text) -> Moments:
    moments = empty()
    for one in texts:
        moments.add_kv(one.keys, one.values, one.features)
    return moments


def test_a_token_vector_is_ordered_layer_kv_head_dim() -> None:
    one = text(5, 0)
    vectors = token_vectors(one.keys, one.values).reshape(5, LAYERS, 2, HEADS, DIM)
    assert torch.equal(vectors[3, 2, 0, 1], one.keys[2, 1, 3])
    assert torch.equal(vectors[4, 1, 1, 0], one.values[1, 0, 4])


def test_moments_are_those_of_all_texts_together() -> None:
    texts = [text(tokens, seed) for seed, tokens in enumerate((40, 1, 70))]
    moments = gathered(*texts)
    features = torch.cat([one.features for one in texts]).double()
    assert moments.tokens == 111
    assert moments.periods == 2
    mean, covariance = moments.feature_moments()
    torch.testing.assert_close(mean, features.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(covariance, features.T.cov(correction=0), rtol=1e-5, atol=1e-6)
    for period, layers in enumerate((slice(0, 2), slice(2, 3))):
        vectors = torch.cat([token_vectors(one.keys[layers], one.values[layers]) for one in texts]).double()
        mean, covariance, cross = moments.period_moments(period)
        torch.testing.assert_close(mean, vectors.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(covariance, vectors.T.cov(correction=0), rtol=1e-4, atol=1e-4)
        direct = (features - features.mean(0)).T @ (vectors - vectors.mean(0)) / 111
        torch.testing.assert_close(cross, direct, rtol=1e-4, atol=1e-4)


def test_a_large_bias_does_not_drown_the_variance() -> None:
    one = text(500, 1, bias=3000.0)
    _, covariance, _ = gathered(one).period_moments(0)
    exact = token_vectors(one.keys[:PERIOD], one.values[:PERIOD]).double().T.cov(correction=0)
    torch.testing.assert_close(covariance, exact, rtol=1e-3, atol=1e-3)


def test_queries_are_summed_over_the_heads_that_share_a_kv_head() -> None:
    queries = torch.randn(LAYERS, 3 * HEADS, 20, DIM, generator=torch.Generator().manual_seed(5))
    moments = empty()
    moments.add_queries(queries[:, :, :8])
    moments.add_queries(queries[:, :, 8:])
    second = queries[2, 3:6].double()
    expected = sum(head.T @ head for head in second) / 20
    torch.testing.assert_close(moments.query_covariance()[2, 1], expected, rtol=1e-5, atol=1e-6)


def test_merging_is_gathering_together() -> None:
    texts = [text(30, seed) for seed in range(3)]
    left, right, both = gathered(texts[0]), gathered(*texts[1:]), gathered(*texts)
    left.merge(right)
    assert left.tokens == both.tokens
    for ours, theirs in zip(left.period_moments(1), both.period_moments(1), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_saved_moments_go_on_where_they_stopped(tmp_path: Path) -> None:
    texts = [text(30, seed) for seed in range(2)]
    stopped = gathered(texts[0])
    stopped.add_fisher(torch.ones(LAYERS, 2))
    stopped.save(tmp_path / "state", "a key")
    resumed, key = Moments.load(tmp_path / "state")
    resumed.add_kv(texts[1].keys, texts[1].values, texts[1].features)
    assert key == "a key"
    assert resumed.texts == 1
    for ours, theirs in zip(resumed.period_moments(0), gathered(*texts).period_moments(0), strict=True):
        assert torch.equal(ours, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(CalibrationError, match="does not hold"):
        Moments.load(path)
    gathered(text(9, 0)).save(path, "key")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CalibrationError, match="does not hold"):
        Moments.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(CalibrationError, match="does not hold"):
        Moments.load(path)


def test_what_does_not_fit_is_refused() -> None:
    one = text(8, 0)
    with pytest.raises(CalibrationError, match="must be positive"):
        empty(period=0)
    with pytest.raises(CalibrationError, match="does not fit moments"):
        empty().add_kv(one.keys[:2], one.values, one.features)
    with pytest.raises(CalibrationError, match="without tokens"):
        empty().add_kv(one.keys[:, :, :0], one.values[:, :, :0], one.features[:0])
    broken = one.keys.clone()
    broken[1, 1, 3, 2] = torch.nan
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        empty().add_kv(broken, one.values, one.features)
    with pytest.raises(CalibrationError, match="KV heads"):
        empty().add_queries(torch.zeros(LAYERS, HEADS + 1, 5, DIM))
    with pytest.raises(CalibrationError, match="Fisher"):
        empty().add_fisher(torch.full((LAYERS, 2), torch.inf))
    with pytest.raises(CalibrationError, match="cannot be merged"):
        empty().merge(empty(period=3))
    for read in (empty().query_covariance, empty().fisher, empty().feature_moments):
        with pytest.raises(CalibrationError, match="text is empty"):
            read()
