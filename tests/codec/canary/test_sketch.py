"""The kept KV as bytes: read back as it was, or refused with a CanaryError."""

import math
import struct
from dataclasses import replace

import msgpack
import pytest
import torch
import xxhash

from kvstore_codec.canary import MAX_SKETCH_BYTES, read_sketch_header
from kvstore_codec.canary.compare import ProbeKV, read_probe_kv
from kvstore_codec.canary.probe import Probe, Sample
from kvstore_codec.errors import CanaryError
from kvstore_codec.model_spec import KVDtype, ModelSpec
from tests.codec.chunks import make_kv, make_spec
from tests.codec.fuzzing import bounded_memory, mutate

PROBE = Probe(512, 8192)


def sample_kv(spec: ModelSpec, seed: int = 0) -> ProbeKV:
    sample = Sample.of(spec)
    return ProbeKV(*make_kv(replace(spec, layers=len(sample.layers)), len(sample.tokens), seed))


@pytest.mark.parametrize("dtype", list(KVDtype))
def test_it_is_read_back_bit_by_bit(dtype: KVDtype) -> None:
    spec = make_spec(dtype=dtype)
    own = sample_kv(spec)
    probe, read = read_probe_kv(own.to_bytes(spec, PROBE), spec)
    assert probe == PROBE
    assert torch.equal(read.keys, own.keys)
    assert torch.equal(read.values, own.values)


def test_the_largest_one_fits() -> None:
    spec = replace(make_spec(), layers=80, kv_heads=8, head_dim=128)
    data = sample_kv(spec).to_bytes(spec, PROBE)
    assert 3 << 20 < len(data) <= MAX_SKETCH_BYTES
    assert read_sketch_header(data).shape == (80, 8, 12, 128)


@pytest.mark.parametrize("changed", [{"model_id": "other"}, {"kv_heads": 1}, {"dtype": KVDtype.FLOAT16}])
def test_that_of_another_model_is_refused(changed: dict[str, object]) -> None:
    spec = make_spec()
    with pytest.raises(CanaryError, match="the canary is of model"):
        read_probe_kv(sample_kv(spec).to_bytes(spec, PROBE), replace(spec, **changed))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_kv_that_is_not_finite_becomes_no_canary(value: float) -> None:
    spec = make_spec()
    own = sample_kv(spec)
    own.values[1, 0, 3, 2] = value
    with pytest.raises(CanaryError, match="NaN or infinity"):
        own.to_bytes(spec, PROBE)


@pytest.mark.parametrize("dtype", list(KVDtype))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e18, -1e18, 2.0**21])
def test_numbers_that_are_no_kv_are_refused_under_a_right_checksum(dtype: KVDtype, value: float) -> None:
    spec = make_spec(dtype=dtype)
    data = bytearray(sample_kv(spec).to_bytes(spec, PROBE))
    data[-8 - dtype.itemsize : -8] = (
        torch.tensor([value], dtype=dtype.torch).view(torch.uint8).numpy().tobytes()
    )
    data[-8:] = struct.pack("<Q", xxhash.xxh3_64_intdigest(data[:-8]))
    for read in (read_sketch_header, lambda data: read_probe_kv(data, spec)):
        with pytest.raises(CanaryError, match="which no model computes"):
            read(bytes(data))


def test_large_numbers_become_no_canary_but_all_of_float16_may() -> None:
    for dtype, accepted in (
        (KVDtype.FLOAT32, 2.0**20),
        (KVDtype.BFLOAT16, -(2.0**20)),
        (KVDtype.FLOAT16, -65504.0),
    ):
        spec = make_spec(dtype=dtype)
        own = sample_kv(spec)
        own.values[0, 0, 0, 0] = accepted
        own.to_bytes(spec, PROBE)
        own.values[0, 0, 0, 0] = 2.0**20 + 2**13
        with pytest.raises(CanaryError):
            own.to_bytes(spec, PROBE)


def test_kv_of_another_shape_becomes_no_canary() -> None:
    with pytest.raises(CanaryError, match="not a sample"):
        sample_kv(make_spec(layers=4)).to_bytes(make_spec(), PROBE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shape": [1 << 19, 2, 16, 32]}, "does not have"),
        ({"shape": [5, 2, 16]}, "four dimensions"),
        ({"shape": [5, 2, 16, -32]}, "four dimensions"),
        ({"shape": [5, 2, 16, True]}, "four dimensions"),
        ({"shape": "5216"}, "four dimensions"),
        ({"vocabulary": 0}, "cannot be drawn"),
        ({"length": 1 << 60}, "cannot be spread"),
        ({"dtype": "int8"}, "cannot be read"),
        ({"model": b"short"}, "cannot be read"),
        ({"model": None}, "cannot be read"),
    ],
)
def test_a_header_that_lies_under_a_right_checksum_is_refused(
    changed: dict[str, object], message: str
) -> None:
    data = sample_kv(make_spec()).to_bytes(make_spec(), PROBE)
    (length,) = struct.unpack_from("<I", data, 6)
    fields = msgpack.packb(msgpack.unpackb(data[10 : 10 + length]) | changed)
    signed = data[:6] + struct.pack("<I", len(fields)) + fields + data[10 + length : -8]
    with pytest.raises(CanaryError, match=message):
        read_sketch_header(signed + struct.pack("<Q", xxhash.xxh3_64_intdigest(signed)))


@pytest.mark.parametrize("size", [0, 1, 17, MAX_SKETCH_BYTES + 1])
def test_bytes_of_a_wrong_size_are_refused(size: int) -> None:
    with pytest.raises(CanaryError):
        read_sketch_header(bytes(size))


def test_mutants_are_refused_whether_their_checksum_is_right_or_not() -> None:
    spec = make_spec()
    data = sample_kv(spec).to_bytes(spec, PROBE)
    head = data[:200]
    with bounded_memory():
        for _ in range(1000):
            mutant = bytes(mutate(head)) + data[200:]
            for candidate in (mutant, mutant[:-8] + struct.pack("<Q", xxhash.xxh3_64_intdigest(mutant[:-8]))):
                try:
                    _, read = read_probe_kv(candidate, spec)
                except CanaryError:
                    continue
                assert read.keys.shape == read.values.shape  # a mutant of the KV alone is KV
