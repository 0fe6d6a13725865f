"""Hostile chunks, and whether the fuzzer would notice what it looks for."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstore_bench.fuzz import judge, worker
from kvstore_bench.fuzz.judge import BATCH, Judgement, Verdict, judge_batch
from kvstore_bench.fuzz.mutants import Kind, mutant
from kvstore_bench.fuzz.run import FAULTS, Tally, fuzz
from kvstore_bench.fuzz.seeds import seeds
from kvstore_codec import codec
from kvstore_codec.chunk import ChunkHeader
from kvstore_codec.whole_chunk import verify_chunk

Begins = Callable[[int], None]


def judged(run_seed: int, mutants: int) -> list[Judgement]:
    begun: list[int] = []
    return [
        judgement
        for batch in range(-(-mutants // BATCH))
        for judgement in judge_batch(run_seed, batch, begun.append)
    ]


def check(judgements: list[Judgement]) -> None:
    faults = [
        (j.mutant.number, j.mutant.kind, j.mutant.seed.name, j.verdict, j.detail)
        for j in judgements
        if j.verdict in FAULTS
    ]
    assert not faults
    verdicts = Counter((j.mutant.kind, j.verdict) for j in judgements)
    for kind in Kind:
        assert verdicts[kind, Verdict.REFUSED], f"mutants of the kind {kind} are refused"
    assert verdicts[Kind.RESIGNED, Verdict.OTHER], "who signs what a decoder makes of a chunk is believed"
    assert not verdicts[Kind.VIDEO, Verdict.OTHER], "samples that nobody signed reach nobody"
    assert {j.mutant.seed.name for j in judgements} == {seed.name for seed in seeds()}


def test_3_000_mutants_are_refused_or_decode_the_same_every_time(one_thread: None) -> None:
    check(judged(1, 3_000))


@pytest.mark.slow
def test_15_000_mutants_are_refused_or_decode_the_same_every_time(one_thread: None) -> None:
    check(judged(2, 15_000))


def test_mutants_come_back_by_number_and_their_checksums_are_right() -> None:
    for number in range(300):
        found = mutant(7, number)
        assert found == mutant(7, number)
        if found.kind not in (Kind.RAW, Kind.HEADER_BYTES, Kind.HEADER_FIELD):
            assert len(verify_chunk(found.data, len(found.data)).frame_lengths) == len(found.seed.frames)
    assert [mutant(7, number).data for number in range(9)] != [mutant(8, number).data for number in range(9)]


def test_tensors_that_a_decoder_does_not_fill_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "_EXPECTED", {})
    monkeypatch.setattr(judge, "decode_frames", lambda *_, **__: None)
    verdicts = Counter(judgement.verdict for judgement in judged(1, BATCH))
    assert verdicts[Verdict.DIFFERENT] > BATCH / 2


def test_exceptions_that_are_not_the_project_s_own_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = {checksum for seed in seeds() for checksum in seed.header.frame_checksums}

    def fail_for_mutants(header: ChunkHeader, *arguments: Any, **more: Any) -> None:
        if not sound.issuperset(header.frame_checksums):
            raise ZeroDivisionError("in a decoder")
        codec.decode_frames(header, *arguments, **more)

    monkeypatch.setattr(judge, "decode_frames", fail_for_mutants)
    # Whoever signs a mutant decodes it first, and is not looked after.
    monkeypatch.setattr(judge, "with_writers_checksum", lambda found: found)
    details = [j.detail for j in judged(1, BATCH) if j.verdict is Verdict.FOREIGN]
    assert len(details) > BATCH / 2
    assert set(details) == {"ZeroDivisionError: in a decoder"}


def dies_or_hangs(run_seed: int, batch: int, begins: Begins) -> list[Judgement]:
    begins(batch * BATCH + 5)
    if batch == 1:
        os._exit(7)
    if batch == 2:
        time.sleep(3600)
    return judge_batch(run_seed, batch, begins)


@pytest.mark.slow
def test_a_worker_that_dies_or_hangs_is_reported_with_its_mutant_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "HANG_S", 20.0)
    tally = Tally()
    for part in fuzz(3, 5 * BATCH, processes=1, saved=tmp_path, judge=dies_or_hangs):
        tally.merge(part)
    assert [(fault.what, fault.number) for fault in tally.faults] == [
        ("crash", BATCH + 5),
        ("hang", 2 * BATCH + 5),
    ]
    assert tally.mutants == 3 * BATCH
    assert tally.unjudged == 2 * BATCH
    assert tally.rss_peak_bytes < 2 * tally.rss_start_bytes
    for fault in tally.faults:
        assert (tmp_path / f"3-{fault.number}.kvc").read_bytes() == mutant(3, fault.number).data
