"""What `kvstore bench faults` counts, and that it runs."""

import json
from pathlib import Path

import pytest
import torch

from kvstore_bench.faults.audit import Audit
from kvstore_bench.faults.documents import CHUNKS, Document
from kvstore_bench.faults.events import Event
from kvstore_bench.faults.inflict import Fault, Kind
from kvstore_bench.faults.rows import failures, fault_rows, is_failure, totals
from tests.bench.commands import output_of

KILL = Fault(Kind.STORAGE, ("node-0",), at_s=100.0, back_s=103.0)
PARTITION = Fault(Kind.PARTITION, ("node-1",), at_s=120.0, back_s=128.0)
WELL = Audit(chunks=40, lost=0, under_replicated=0, wrong_copies=0, repair_s=2.0)


def get(begin_s: float, chunks: int = CHUNKS, holders: tuple[str, ...] = (), seconds: float = 0.02) -> Event:
    return Event("get", 7, begin_s, begin_s + seconds, chunks, holders=holders)


def test_a_read_fails_if_a_node_that_was_there_had_the_chunk() -> None:
    assert not is_failure(get(101.0), [KILL])
    assert is_failure(get(101.0, 2, ("node-0", "node-2")), [KILL])
    assert not is_failure(get(101.0, 2, ("node-0",)), [KILL]), "its node was down"
    assert not is_failure(get(101.0, 2), [KILL]), "nobody had it"
    assert is_failure(get(104.0, 2, ("node-0",)), [KILL]), "its node was back"
    assert is_failure(get(95.0, 2, ("node-0",)), [KILL]), "its node was not down yet"
    assert not is_failure(get(99.5, 2, ("node-0",), seconds=0.6), [KILL]), "its node went meanwhile"


def test_reads_belong_to_the_fault_that_they_may_have_felt() -> None:
    gets = [get(90.0), get(104.9, seconds=0.5), get(105.1), get(127.0), get(128.1)]
    rows = {row["fault"]: row for row in fault_rows([KILL, PARTITION], gets)}
    assert {name: row["reads"] for name, row in rows.items()} == {
        "none": 3,
        "storage actor": 1,
        "partition": 1,
    }
    assert rows["storage actor"]["read_p99_ms"] == pytest.approx(500)
    assert rows["partition"]["back_max_s"] == pytest.approx(8)


def test_totals() -> None:
    puts = [Event("put", number, 90.0, 90.1, CHUNKS - number % 2) for number in range(10)]
    wrong = Event("get", 3, 101.0, 101.2, CHUNKS, wrong_bytes=5)
    total = totals([KILL, PARTITION], [*puts, wrong, get(101.0, 1, ("node-2",))], WELL)
    assert total["acknowledged_puts"] == 5 * CHUNKS + 5 * (CHUNKS - 1)
    assert (total["kills"], total["partitions"]) == (1, 1)
    assert (total["wrong_bytes"], total["failed_reads"], total["reads_without_replica"]) == (5, 1, 0)


def test_failed_reads_are_told_one_by_one() -> None:
    events = [get(101.0), get(101.0, 2), get(104.0, 2, ("node-0",)), Event("put", 1, 104.0, 104.1, 0)]
    (row,) = failures([KILL, PARTITION], events)
    assert (row["chunks_delivered"], row["holders_afterwards"]) == (2, ["node-0"])
    assert (row["fault"], row["fault_nodes"]) == ("storage actor", ["node-0"])
    assert (row["after_fault_s"], row["after_back_s"]) == (4.0, 1.0)


def test_any_wrong_byte_of_a_document_is_found() -> None:
    document = Document(12)
    keys, values = (torch.cat(parts, dim=2) for parts in zip(*map(document.kv, range(CHUNKS)), strict=True))
    assert document.wrong_bytes(keys, values, CHUNKS) == 0
    values.view(torch.uint8)[1, 0, 700, 3] ^= 1
    assert document.wrong_bytes(keys, values, CHUNKS) == 1
    assert document.wrong_bytes(keys, values, 2) == 0, "not delivered"
    assert Document(13).wrong_bytes(keys, values, CHUNKS) > keys.nbytes
    assert len({id_ for number in range(5) for id_ in Document(number).ids()}) == 5 * CHUNKS


# Other tests run meanwhile. How soon a read is given up is not what is tested.
PATIENT = {"KVSTORE_LOOKUP_TIMEOUT_S": "20", "KVSTORE_STALL_TIMEOUT_S": "20"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quick_keeps_everything(tmp_path: Path) -> None:
    arguments = ("--quick", "--json", str(tmp_path / "result.json"), "--plot", str(tmp_path / "plot.png"))
    output_of("faults", *arguments, timeout_s=880, **PATIENT)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (total,) = json.loads((tmp_path / "result.json").read_text())["total"]
    assert total["acknowledged_puts"] >= 400
    assert total["kills"] == 3
    assert (total["wrong_bytes"], total["wrong_copies"], total["lost_durable_chunks"]) == (0, 0, 0)
    assert total["failed_reads"] == 0
    assert total["repair_s"] is not None
