"""Chooses the canaries to remove for a new one."""

from collections import defaultdict, deque
from collections.abc import Iterable

from kvstore_cluster.canaries.base import CanaryRecord

OWN_SHARE = 1 / 8
"""Share of the models or bytes. A client that holds more replaces its own canaries."""


def making_room(
    kept: Iterable[CanaryRecord], new: CanaryRecord, max_models: int, max_bytes: int
) -> list[CanaryRecord]:
    """Chooses records of `kept` to remove, so that `new` and the rest fit the limits. `kept` is in the order of last
    use. Removes the least recently used records of the client that holds most, or of the client of `new` if that client
    holds more than OWN_SHARE. A client therefore cannot displace the canaries of others by storing many."""
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
