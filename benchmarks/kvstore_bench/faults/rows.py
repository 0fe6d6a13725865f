"""Makes the rows of the result from faults and events."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvstore_bench.faults.audit import Audit
from kvstore_bench.faults.documents import CHUNKS
from kvstore_bench.faults.events import Event
from kvstore_bench.faults.inflict import Fault, Kind

Row = Mapping[str, Any]

AFTERWARDS_S = 5.0
"""Time after a fault in which reads count as reads during a failover."""


def fault_rows(faults: Sequence[Fault], events: Sequence[Event]) -> list[Row]:
    """One row for reads without a fault, and one for reads during each kind of fault."""
    gets = [event for event in events if event.operation == "get"]
    rows = [_row("none", [], [get for get in gets if _fault_of(get, faults) is None], faults)]
    for kind in Kind:
        of_kind = [fault for fault in faults if fault.kind is kind]
        if of_kind:
            during = [get for get in gets if (fault := _fault_of(get, faults)) and fault.kind is kind]
            rows.append(_row(kind.value, of_kind, during, faults))
    return rows


def totals(faults: Sequence[Fault], events: Sequence[Event], audit: Audit) -> Row:
    gets = [event for event in events if event.operation == "get"]
    kills = [fault for fault in faults if fault.is_kill]
    during = [get for get in gets if _fault_of(get, faults) is not None]
    puts = [event for event in events if event.operation == "put"]
    return {
        "acknowledged_puts": sum(event.chunks for event in puts),
        "kills": len(kills),
        "partitions": len(faults) - len(kills),
        "reads": len(gets),
        "wrong_bytes": sum(get.wrong_bytes for get in gets),
        "wrong_copies": audit.wrong_copies,
        "lost_durable_chunks": audit.lost,
        "failed_reads": sum(is_failure(get, faults) for get in gets),
        "reads_without_replica": sum(get.chunks < CHUNKS and not is_failure(get, faults) for get in gets),
        "read_p99_steady_ms": _percentile([get for get in gets if _fault_of(get, faults) is None], 99),
        "read_p50_failover_ms": _percentile(during, 50),
        "read_p99_failover_ms": _percentile(during, 99),
        "read_max_ms": _percentile(gets, 100),
        "put_p50_ms": _percentile(puts, 50),
        "put_p99_ms": _percentile(puts, 99),
        "under_replicated_chunks": audit.under_replicated,
        "repair_s": audit.repair_s,
        "checked_chunks": audit.chunks,
    }


def failures(faults: Sequence[Fault], events: Sequence[Event]) -> list[Row]:
    """Reads that failed although a live node had the chunk, each with its reason, the nodes with the chunk, and the
    last fault before it."""
    found: list[Row] = []
    for get in events:
        if get.operation != "get" or not is_failure(get, faults):
            continue
        before = [fault for fault in faults if fault.at_s < get.end_s]
        found.append(
            {
                "missing": get.missing,
                "chunks_delivered": get.chunks,
                "took_s": get.seconds,
                "holders_afterwards": list(get.holders),
                "fault": before[-1].kind.value if before else None,
                "fault_nodes": list(before[-1].nodes) if before else [],
                "after_fault_s": get.begin_s - before[-1].at_s if before else None,
                "after_back_s": get.begin_s - before[-1].back_s if before else None,
            }
        )
    return found


def is_failure(get: Event, faults: Sequence[Fault]) -> bool:
    """Whether a get missed a chunk that a node had, which was available during the whole get."""
    if get.chunks == CHUNKS:
        return False
    down = {
        node
        for fault in faults
        if fault.at_s < get.end_s and get.begin_s < fault.back_s
        for node in fault.nodes
    }
    return bool(set(get.holders) - down)


def _row(name: str, of_kind: Sequence[Fault], gets: Sequence[Event], faults: Sequence[Fault]) -> Row:
    back = [fault.back_s - fault.at_s for fault in of_kind]
    return {
        "fault": name,
        "times": len(of_kind),
        "back_p50_s": float(np.median(back)) if back else None,
        "back_max_s": max(back, default=None),
        "reads": len(gets),
        "failed_reads": sum(is_failure(get, faults) for get in gets),
        "reads_without_replica": sum(get.chunks < CHUNKS and not is_failure(get, faults) for get in gets),
        "read_p50_ms": _percentile(gets, 50),
        "read_p99_ms": _percentile(gets, 99),
        "read_max_ms": _percentile(gets, 100),
    }


def _fault_of(get: Event, faults: Sequence[Fault]) -> Fault | None:
    """The latest fault that may have affected a get."""
    felt = [f for f in faults if get.end_s > f.at_s and get.begin_s < max(f.back_s, f.at_s + AFTERWARDS_S)]
    return felt[-1] if felt else None


def _percentile(events: Sequence[Event], percent: float) -> float | None:
    return float(np.percentile([event.seconds * 1e3 for event in events], percent)) if events else None
