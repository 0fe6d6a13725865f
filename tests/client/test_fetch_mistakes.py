"""A mistake of ours in a stage: the engine gets its answer all the same."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.fetch.base import ReceivedFrames
from kvstore_client.fetch.decode import decode
from tests.client.conftest import served_cluster
from tests.client.models import random_prompt, tiny_model

GREEDY = {"do_sample": False, "max_new_tokens": 4}


def test_a_decoder_that_dies_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """As without memory for one frame, when the chunks behind are there already."""
    prompt = random_prompt(256 * 4 + 20)

    def run_out_of_memory(item: ReceivedFrames, *arguments: Any) -> None:
        if item.task.chunk_index == 0 and item.task.layers.start:
            time.sleep(0.3)
            raise MemoryError("no memory for a frame")
        decode(item, *arguments)

    with served_cluster(tmp_path) as cluster:
        with connect(cluster.address) as writer:
            expected = CachedModel(tiny_model(), writer).generate(prompt, **GREEDY)
            writer.store.flush()
        with connect(cluster.address, decode_threads=2) as client:
            cached = CachedModel(tiny_model(), client)
            answers: list[torch.Tensor] = []
            engine = threading.Thread(
                target=lambda: answers.append(cached.generate(prompt, **GREEDY)), daemon=True
            )
            with monkeypatch.context() as patched:
                patched.setattr("kvstore_client.fetch.restore.decode", run_out_of_memory)
                engine.start()
                engine.join(60)
            assert not engine.is_alive()
            assert torch.equal(answers[0], expected)
            assert cached.last_report.fetch is not None
            assert cached.last_report.fetch.missing[0] == "internal_error"
        cluster.check_nothing_is_held()
