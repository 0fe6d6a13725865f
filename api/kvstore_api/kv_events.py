"""Format of KV events: the one of vLLM's `EventBatch` since 0.24, so that its subscribers can read them.

A message has three parts: topic, sequence number (u64, big-endian), and a msgpack array of time, events and rank. Each
event is a map; docs/kv-events.md lists the fields.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import msgpack  # type: ignore[import-untyped]

MEMORY, DISK = "CPU", "STORAGE"
"""Names of the tiers in events: those that vLLM gives to host memory and to what is behind it."""
END = (1 << 64) - 1
"""Sequence number of the message that ends the answer to a replay request."""
BLOCK_TOKENS = 256
"""Tokens of a block."""
OWNERSHIP = "kvstore"
MOST_PAYLOAD_BYTES = 16 << 20
_FEWEST_BYTES = 16
"""An array or map in an event takes more bytes on average."""
_SEQUENCE = struct.Struct(">Q")
_TOPIC = "kv@kvstore@{}@"


@dataclass(frozen=True, slots=True)
class Stored:
    """These blocks, named by prefix id, are in a tier of the cluster."""

    blocks: Sequence[bytes]
    medium: str


@dataclass(frozen=True, slots=True)
class Removed:
    """These blocks are no longer in a tier of the cluster."""

    blocks: Sequence[bytes]
    medium: str


@dataclass(frozen=True, slots=True)
class Cleared:
    """No block is stored, except those that later events name."""


Event = Stored | Removed | Cleared


def topic_of(tenant: str) -> bytes:
    """Topic of a tenant's events. No topic is the beginning of another one, because subscribers get every topic that
    begins with what they subscribe to."""
    return _TOPIC.format(quote(tenant, safe="")).encode()


def tenant_of(topic: bytes) -> str | None:
    """The tenant whose topic this is. None for other text."""
    before, after = _TOPIC.split("{}")
    text = topic.decode(errors="replace")
    if not (text.startswith(before) and text.endswith(after) and len(text) >= len(before) + len(after)):
        return None
    tenant = unquote(text[len(before) : len(text) - len(after)])
    return tenant if topic_of(tenant) == topic else None


def encode_sequence(sequence: int) -> bytes:
    return _SEQUENCE.pack(sequence)


def decode_sequence(data: bytes) -> int:
    """Raises ValueError."""
    try:
        (sequence,) = _SEQUENCE.unpack(data)
    except struct.error as error:
        raise ValueError(f"a sequence number has {_SEQUENCE.size} bytes, not {len(data)}") from error
    return int(sequence)


def encode_batch(time_unix_s: float, events: Sequence[Event]) -> bytes:
    batch: bytes = msgpack.packb([time_unix_s, list(map(_map_of, events)), 0])
    return batch


def decode_batch(payload: bytes) -> tuple[float, list[Event]]:
    """Time and events of a batch. Ignores events of other kinds. Raises ValueError for bytes that are no batch."""
    if len(payload) > MOST_PAYLOAD_BYTES:
        raise ValueError(f"a batch of events has {len(payload)} bytes; at most {MOST_PAYLOAD_BYTES}")
    try:
        found, maps, *_ = _unpacked(payload)
        time_unix_s, events = float(found), [event for event in map(_event_of, maps) if event is not None]
    except (TypeError, KeyError, ValueError, AttributeError, msgpack.UnpackException) as error:
        raise ValueError(f"not a batch of KV events: {error}") from error
    if not math.isfinite(time_unix_s):
        raise ValueError(f"a batch of KV events at the time {time_unix_s}")
    return time_unix_s, events


def _unpacked(payload: bytes) -> Any:
    """Parses msgpack. Raises ValueError for more arrays and maps than a batch of that size has: an empty map is one
    byte, and takes 64 in memory."""
    left = len(payload) // _FEWEST_BYTES + 2

    def counted(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("too many arrays and maps")
        return container

    return msgpack.unpackb(payload, object_hook=counted, list_hook=counted, ext_hook=_refused)


def _refused(code: int, _: bytes) -> None:
    raise ValueError(f"an extension of type {code}")


def _map_of(event: Event) -> dict[str, Any]:
    match event:
        case Cleared():
            return {"type": "AllBlocksCleared"}
        case Removed():
            return {
                "type": "BlockRemoved",
                "block_hashes": list(event.blocks),
                "medium": event.medium,
                "locality": "REMOTE",
                "ownership": OWNERSHIP,
            }
        case Stored():
            return {
                "type": "BlockStored",
                "block_hashes": list(event.blocks),
                "parent_block_hash": None,
                "token_ids": [],
                "block_size": BLOCK_TOKENS,
                "lora_id": None,
                "medium": event.medium,
                "lora_name": None,
                "locality": "REMOTE",
                "ownership": OWNERSHIP,
            }


def _event_of(fields: dict[str, Any]) -> Event | None:
    kind = fields["type"]
    if kind == "AllBlocksCleared":
        return Cleared()
    if kind not in ("BlockStored", "BlockRemoved"):
        return None
    blocks, medium = fields["block_hashes"], fields["medium"]
    if not all(isinstance(block, bytes) for block in blocks) or not isinstance(medium, str):
        raise ValueError("block_hashes are byte strings, and medium is text")
    return Stored(blocks, medium) if kind == "BlockStored" else Removed(blocks, medium)
