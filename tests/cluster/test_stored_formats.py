"""Data folders that earlier releases wrote: everything in them is read, and nothing that was deleted comes back.

`tests/data/stored/write.py` wrote the archives, with the code of those releases."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from kvstore_cluster.arena import Arena
from kvstore_cluster.calibrations import CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry
from kvstore_cluster.catalogue import FileCatalogue
from kvstore_cluster.disk import RecordMeta, SegmentStore
from kvstore_cluster.lookup import LookupRequest
from kvstore_cluster.node import StorageNode
from kvstore_codec.calibration import Calibration
from kvstore_codec.chunk import read_header
from kvstore_codec.codec import EncodedChunk
from kvstore_codec.identity import ChunkId, ContentId, PrefixId
from kvstore_codec.klt_frames import KLT
from kvstore_codec.whole_chunk import verify_chunk
from tests.codec.chunks import decode, make_kv
from tests.data.stored import write

ARCHIVES = sorted(Path(write.__file__).parent.glob("formats-*.tar.xz"))


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def expected(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text())


def id_of(hexadecimal: str) -> ChunkId:
    both = bytes.fromhex(hexadecimal)
    return ChunkId(ContentId(both[:32]), PrefixId(both[32:]))


def chunk_id(entry: dict[str, Any]) -> ChunkId:
    return id_of(entry["content_id"] + entry["prefix_id"])


def described(entry: dict[str, Any]) -> tuple[object, ...]:
    behind = entry["behind"]
    return (
        chunk_id(entry),
        entry["encoding"],
        entry["size_bytes"],
        entry["expires_at_s"],
        entry["number"],
        behind and id_of(behind),
    )


def described_record(meta: RecordMeta) -> tuple[object, ...]:
    assert meta.tenant == "blue"
    return (meta.chunk_id, meta.encoding, meta.size_bytes, meta.expires_at_s, meta.number, meta.behind)


def test_the_disk_tier_finds_all_chunks_and_what_is_known_of_them(folder: Path) -> None:
    store = SegmentStore(folder / "node", 1 << 20, segment_bytes=128 << 10, direct=False)
    recovery = store.recover()
    found = {described_record(meta) for meta, _ in recovery.records}
    assert found == {described(entry) for entry in expected(folder)["chunks"]}
    assert len(found) == 8  # six encodings of the first chunk, and two more chunks
    assert recovery.dropped == ()
    store.close()


def stored_calibration(folder: Path) -> Calibration:
    registry = CalibrationRegistry(folder / "calibrations")
    (record,) = registry.records()
    return Calibration.from_bytes(b"".join(registry.pieces(record.digest)))


def test_a_node_serves_the_bytes_and_they_decode_to_the_kv_that_was_stored(folder: Path) -> None:
    store = SegmentStore(folder / "node", 1 << 20, segment_bytes=128 << 10, direct=False)
    node = StorageNode("node-0", Arena(1 << 20, 4096), store=store)
    # Not computed again: other processors round a decomposition otherwise.
    klt = KLT(stored_calibration(folder))
    texts: list[ChunkId] = []
    for entry in expected(folder)["chunks"]:
        name = entry["encoding"]
        assert node.lookup(LookupRequest([chunk_id(entry)], [name])).answers[0].encoding == name
        with node.open(chunk_id(entry), name) as reader:
            data = b"".join(view for piece in reader.pieces(0, 0, 1 << 20) for view in piece)
        assert blake3(data).hexdigest() == entry["blake3"]
        verify_chunk(data, len(data))
        header = read_header(data)
        bounds = [header.range_bytes(frame, 1) for frame in range(header.geometry.frame_count)]
        frames = [data[offset : offset + length] for offset, length in bounds]
        kv = decode(EncodedChunk(header, [data[: header.header_bytes], *frames], {}), klt)
        texts += [chunk_id(entry)] * (chunk_id(entry) not in texts)
        wanted = make_kv(write.SPEC, write.TOKENS, seed=len(texts) - 1)
        error = (torch.stack(kv).float() - torch.stack(wanted).float()).pow(2).mean().sqrt()
        assert float(error) == pytest.approx(entry["rms_error"], rel=0.01)
    assert len(texts) == 3
    store.close()


def test_the_calibration_and_the_canary_are_there(folder: Path) -> None:
    known = expected(folder)
    calibration = stored_calibration(folder)
    assert calibration.digest.hex() == known["calibration"]["digest"]
    assert calibration.model_digest.hex() == known["spec_digest"]
    canary, sketch = CanaryRegistry(folder / "canaries").get(bytes.fromhex(known["spec_digest"]))
    assert canary.origin == write.ORIGIN
    assert blake3(sketch).hexdigest() == known["canary"]["blake3"]


def test_the_catalogue_says_what_it_said(folder: Path) -> None:
    catalogue = FileCatalogue(folder)
    assert catalogue.load() == write.STATE
    catalogue.close()
