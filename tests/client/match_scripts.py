"""What the processes do that pass a match on to each other. Each one is spawned: it shares nothing but bytes."""

from multiprocessing.connection import Connection
from pathlib import Path

import torch

from kvstore_client import connect
from kvstore_client.client import KVStoreClient
from kvstore_codec.errors import MatchFormatError
from tests.client.chunks import SPEC, ids, random_kv
from tests.codec.chunks import features_of

CHUNKS = 3


def _client(address: str, cache_dir: Path, encoding: str) -> KVStoreClient:
    client = connect(address, cache_dir=cache_dir, encoding=encoding, fetch_policy="fixed")
    client.prepare(SPEC).result(20)
    return client


def find(address: str, cache_dir: Path, encoding: str, pipe: Connection) -> None:
    """The scheduler: looks up, passes the match on, and at the end releases it if it is told to."""
    with _client(address, cache_dir, encoding) as client:
        match = client.match(SPEC, ids(CHUNKS))
        pipe.send_bytes(match.to_bytes())
        if pipe.recv() == "release":
            client.release(match)


def bring(address: str, cache_dir: Path, encoding: str, pipe: Connection) -> None:
    """The worker: fetches what it is given, and says how that went and how far the KV is from what was stored."""
    with _client(address, cache_dir, encoding) as client:
        try:
            match = client.match_from_bytes(SPEC, pipe.recv_bytes())
        except MatchFormatError as error:
            pipe.send(("refused", str(error)))
            return
        buffers = client.buffers.acquire(SPEC, match.tokens)
        fetch = client.fetch(match, buffers, None, features=lambda _: features_of(256))
        report = fetch.wait()
        wrong = 0.0
        for index in range(CHUNKS):
            at = slice(256 * index, 256 * (index + 1))
            for found, stored in zip((buffers.keys, buffers.values), random_kv(index), strict=True):
                wrong = max(
                    wrong, float(torch.linalg.norm(found[:, :, at] - stored) / torch.linalg.norm(stored))
                )
        pipe.send((report.complete, wrong))
