"""Which canaries make room for a new one."""

from collections import defaultdict, deque
from collections.abc import Iterable

from kvstore_cluster.canaries.base import CanaryRecord

OWN_SHARE = 1 / 8
"""Of the models or the bytes: a client that holds more makes room for its canaries with its own."""


def making_room(
    kept: Iterable[CanaryRecord], new: CanaryRecord, max_models: int, max_bytes: int
) -> list[CanaryRecord]:
    """The records of `kept`, which stand in the order of their last use, that are to go so that `new` fits beside the
    rest: those that were used longest ago, of the client that holds most, or of the new one's client if that holds its
    share already. So no client can push out what others made, however much it makes."""
    held: defaultdict[str, deque[CanaryRecord]] = defaultdict(deque)
    models: defaultdict[str, int] = defaultdict(int)
    size_bytes: defaultdict[str, int] = defaultdict(int)
    for record in (*kept, new):
        if record is not new:
            held[record.client].append(record)
        models[record.client] += 1
        size_bytes[record.client] += record.size_bytes

    def share(client: str) -> float:
        return max(models[client] / max_models, size_bytes[client] / max_bytes)

    going = []
    while sum(models.values()) > max_models or sum(size_bytes.values()) > max_bytes:
        holders = [client for client, records in held.items() if records]
        if not holders:
            break
        most = max(holders, key=share)
        client = new.client if new.client in holders and share(new.client) > OWN_SHARE else most
        record = held[client].popleft()
        models[client] -= 1
        size_bytes[client] -= record.size_bytes
        going.append(record)
    return going
