"""A node indexes a million chunks in 400 MB: measured, because nobody counts the bytes of Python objects right."""

import os
import subprocess
import sys

import pytest

MEASURE = """
import os
import psutil
from kvstore_cluster.arena import Arena
from kvstore_cluster.disk import Location, RecordMeta
from kvstore_cluster.node import StorageNode
from kvstore_codec.identity import ChunkId, ContentId, PrefixId

node = StorageNode("node-0", Arena(1 << 20))
before = psutil.Process().memory_info().rss
for number in range(1_000_000):
    chunk_id = ChunkId(ContentId(os.urandom(32)), PrefixId(os.urandom(32)))
    meta = RecordMeta(chunk_id, "medium-klt-pco", 100_000, 900, calibration=bytes(32), cost=256.0)
    node._catalog.insert(meta, extent=None, location=Location(number << 24), write_back=False)
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.slow
def test_a_million_chunks_take_less_than_400_megabytes() -> None:
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    used = subprocess.run(
        [sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True, env=environment
    )
    assert int(used.stdout) < 400e6
