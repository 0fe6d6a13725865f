"""Write what the service keeps on disk, with the code of the checkout that this runs in.

`python -m tests.data.stored.write FOLDER` writes `node/` (a disk tier), `calibrations/`, `canaries/` and
`catalogue.json`, and `expected.json` beside them, which says what a reader must find. The archives in this folder were
written by releases of the past. Never write one anew: add another one when a format gets a new version.
"""

import json
import sys
from pathlib import Path

import torch
from blake3 import blake3

from kvstore_api.placement import Member
from kvstore_cluster.calibrations import CalibrationRecord, CalibrationRegistry
from kvstore_cluster.canaries import CanaryRegistry, Origin
from kvstore_cluster.catalogue import ClusterState, FileCatalogue, NodeRecord
from kvstore_cluster.disk import RecordMeta, SegmentStore
from kvstore_codec.canary.probe import Probe
from kvstore_codec.canary.sketch import SketchHeader, write_sketch
from kvstore_codec.codec import encode_chunk
from kvstore_codec.encoding import Encoding
from kvstore_codec.identity import CHUNK_TOKENS, chunk_ids
from kvstore_codec.model_spec import KVDtype
from tests.codec.chunks import decode, features_of, klt_of, make_kv, make_spec

SPEC = make_spec(layers=2, kv_heads=1, head_dim=16)
ENCODINGS = ("exact-zstd", "exact-raw", "high-zstd", "high-hevc-cpu", "medium-klt-pco", "medium-klt-zstd")
TOKENS = CHUNK_TOKENS
EXPIRES_AT_S = 4e9  # in the year 2096
ORIGIN = Origin("SmolLM2", "host-a", 7, "torch 2.13.0", "cpu", "float32")

STATE = ClusterState(
    7,
    (
        NodeRecord(Member("node-0", "h:1", 2.5), 11, alive=True),
        NodeRecord(Member("b", "h:2"), 12, alive=False, error="gone"),
    ),
    pins={"": frozenset(chunk_ids(SPEC.digest, b"secret salt", list(range(2 * TOKENS))))},
    quotas={"": 5, "blue": 1 << 60},
    draining=frozenset({"b"}),
    repair_round=3,
    changes=9,
)


def write(folder: Path) -> None:
    expected = {
        "spec_digest": SPEC.digest.hex(),
        "chunks": _write_chunks(folder / "node"),
        "calibration": _write_calibration(folder / "calibrations"),
        "canary": _write_canary(folder / "canaries"),
    }
    _write_catalogue(folder)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def _write_chunks(folder: Path) -> list[dict[str, object]]:
    store = SegmentStore(folder, 1 << 20, segment_bytes=128 << 10, direct=False)
    store.recover()
    ids = chunk_ids(SPEC.digest, b"secret salt", list(range(4 * TOKENS)))
    expected, before = [], None
    for number, chunk_id in enumerate(ids):
        for name in ENCODINGS if number == 0 else ENCODINGS[:1]:
            encoding = Encoding.parse(name)
            klt, features = (
                (klt_of(SPEC), features_of(TOKENS)) if encoding.needs_calibration else (None, None)
            )
            kv = make_kv(SPEC, TOKENS, seed=number)
            encoded = encode_chunk(
                *kv,
                spec=SPEC,
                chunk_id=chunk_id,
                encoding=encoding,
                klt=klt,
                features=features,
            )
            data = b"".join(bytes(part) for part in encoded.parts)
            meta = RecordMeta(
                chunk_id,
                name,
                len(data),
                encoded.header.header_bytes,
                encoded.header.calibration,
                tenant="blue",
                cost=16.0 * (number + 1),
                expires_at_s=EXPIRES_AT_S if number == 1 else 0.0,
                number=number if before else 0,
                behind=before,
            )
            location = store.append(meta, [memoryview(data)], sync=True)
            if number == 3:
                store.delete(location)
                store.forget(meta, store.newest_sequence)
                continue
            expected.append(
                {
                    "content_id": chunk_id.content_id.hex(),
                    "prefix_id": chunk_id.prefix_id.hex(),
                    "encoding": name,
                    "size_bytes": len(data),
                    "blake3": blake3(data).hexdigest(),
                    "rms_error": _rms(torch.stack(decode(encoded)).float() - torch.stack(kv).float()),
                    "expires_at_s": meta.expires_at_s,
                    "number": meta.number,
                    "behind": None if before is None else (before.content_id + before.prefix_id).hex(),
                }
            )
        before = chunk_id
    store.close()
    return expected


def _rms(values: torch.Tensor) -> float:
    return float(values.pow(2).mean().sqrt())


def _write_calibration(folder: Path) -> dict[str, object]:
    data = klt_of(SPEC).calibration.to_bytes()
    record = CalibrationRecord(blake3(data).digest(), SPEC.digest, len(data))
    CalibrationRegistry(folder).put(record, [data])
    return {"digest": record.digest.hex(), "size_bytes": len(data)}


def _write_canary(folder: Path) -> dict[str, object]:
    header = SketchHeader(SPEC.digest, Probe(100, 512), KVDtype.FLOAT32, (2, 1, 4, 8))
    data = write_sketch(header, bytes(byte % 251 for byte in range(header.body_bytes)))
    CanaryRegistry(folder).put(SPEC.digest, 0, ORIGIN, data)
    return {"blake3": blake3(data).hexdigest()}


def _write_catalogue(folder: Path) -> None:
    catalogue = FileCatalogue(folder)
    catalogue.save(STATE)
    catalogue.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
