"""Follows the KV events of a cluster, for routers: which blocks the cluster stores, in which tier (docs/kv-events.md).
Needs pyzmq, the extra `events`."""

import time
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import grpc
import zmq
import zmq.utils.z85

from kvstore_api.kv_events import (
    END,
    Cleared,
    Event,
    Removed,
    Stored,
    decode_batch,
    decode_sequence,
    encode_sequence,
)
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.connector import Connector
from kvstore_client.grpc_failure import predicate_of
from kvstore_codec.errors import NodeUnavailableError

SILENCE_S = 15.0
"""A publisher that sends nothing for so long, not even an empty batch, is asked again where it is."""
_ASK_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 5.0
_MOST_WAITING = 1 << 16
"""Batches that are kept while missed ones are awaited."""
_MOST_MESSAGE_BYTES = 16 << 20


class StoredBlocks:
    """Blocks by prefix id, each with the tiers of the cluster that have it: "CPU" and "STORAGE"."""

    def __init__(self) -> None:
        self.tiers: dict[bytes, frozenset[str]] = {}

    def apply(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Cleared():
                    self.tiers.clear()
                case Stored(blocks, medium):
                    for block in blocks:
                        self.tiers[block] = self.tiers.get(block, frozenset()) | {medium}
                case Removed(blocks, medium):
                    for block in blocks:
                        left = self.tiers.get(block, frozenset()) - {medium}
                        if left:
                            self.tiers[block] = left
                        else:
                            self.tiers.pop(block, None)


class EventSubscriber:
    """Keeps `blocks` equal to what the cluster stores of one tenant, while `poll` is called. It asks for batches that
    it missed; what the publisher no longer keeps comes as a snapshot. Used by one thread. A context manager.

    The constructor asks the coordinator at `address` (host:port) where the events are published. It raises
    NodeUnavailableError if the coordinator does not answer, or publishes none."""

    def __init__(
        self,
        address: str,
        *,
        tenant: str = "",
        connector: Connector | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.blocks = StoredBlocks()
        self.snapshots = 0
        """How often all blocks were received, at first and after a long gap."""
        self._address, self._tenant, self._silence_s = address, tenant, silence_s
        self._connector = connector or Connector()
        self._context = zmq.Context()
        self._keys: tuple[bytes, bytes] = zmq.curve_keypair()
        self._last = 0  # sequence number of the last batch that was applied
        self._waiting: deque[tuple[int, list[Event]]] = deque()
        self._asked_s: float | None = None  # when missed batches were asked for
        self._events: Any = None
        self._replay: Any = None
        try:
            self._connect()
        except NodeUnavailableError:
            self._context.destroy(0)
            raise

    @property
    def is_current(self) -> bool:
        """Whether no missed batch is awaited."""
        return self._asked_s is None

    def poll(self, timeout_s: float) -> list[Event]:
        """Waits up to `timeout_s` for events. Returns those that were applied to `blocks`, possibly none. Never raises
        for what a publisher sends, or does not send."""
        applied: list[Event] = []
        poller = zmq.Poller()
        for of in (self._events, self._replay):
            poller.register(of, zmq.POLLIN)
        ready = dict(poller.poll(round(1000 * timeout_s)))
        if ready:
            self._heard_s = time.monotonic()
        if self._replay in ready:
            self._take_answers(applied)
        if self._events in ready:
            self._take_batches(applied)
        self._look_after()
        return applied

    def close(self) -> None:
        self._context.destroy(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self) -> None:
        """Connects to where the coordinator says, and asks for all that was missed. Raises NodeUnavailableError."""
        public, _ = self._keys
        request = pb.EventsRequest(tenant=self._tenant, curve_key=zmq.utils.z85.decode(public))
        with self._connector.channel(self._address) as channel:
            try:
                self._where = rpc.CoordinatorStub(channel).Events(request, timeout=_ASK_TIMEOUT_S)
            except grpc.RpcError as error:
                raise NodeUnavailableError(
                    f"no KV events: the coordinator at {self._address} {predicate_of(error)}"
                ) from error
        if self._events is not None:
            self._events.close(0)
        self._events = self._socket(zmq.SUB)
        self._events.setsockopt(zmq.SUBSCRIBE, self._where.topic)
        self._events.connect(f"tcp://{self._where.endpoint}")
        self._heard_s = time.monotonic()
        self._ask()

    def _socket(self, kind: int) -> Any:
        made = self._context.socket(kind)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.MAXMSGSIZE, _MOST_MESSAGE_BYTES)
        made.setsockopt(zmq.IPV6, 1)
        # No heartbeats of ZeroMQ: one that ends a connection whose messages wait for `poll` aborts the process once
        # they are read (libzmq issue 3937). A dead publisher is noticed by its silence.
        made.setsockopt(zmq.TCP_KEEPALIVE, 1)
        if self._where.server_key:
            made.setsockopt(zmq.CURVE_SERVERKEY, zmq.utils.z85.encode(self._where.server_key))
            public, secret = self._keys
            made.setsockopt(zmq.CURVE_PUBLICKEY, public)
            made.setsockopt(zmq.CURVE_SECRETKEY, secret)
        return made

    def _ask(self) -> None:
        """Asks for the batches after the last one, on a new socket: answers to earlier questions are lost with the old
        one."""
        if self._replay is not None:
            self._replay.close(0)
        self._replay = self._socket(zmq.DEALER)
        self._replay.connect(f"tcp://{self._where.replay_endpoint}")
        after = encode_sequence(self._last + 1 if self._last else 0)
        self._replay.send_multipart([b"", after, self._where.topic])
        self._asked_s = time.monotonic()

    def _look_after(self) -> None:
        now_s = time.monotonic()
        if now_s - self._heard_s > self._silence_s:
            self._heard_s = now_s
            try:
                self._connect()
            except NodeUnavailableError:
                return
        elif self._asked_s is not None and now_s - max(self._asked_s, self._heard_s) > _ANSWER_TIMEOUT_S:
            self._ask()

    def _take_answers(self, applied: list[Event]) -> None:
        while self._asked_s is not None:
            try:
                frames = self._replay.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                _, _, number, payload = frames
                sequence = decode_sequence(number)
                if sequence == END:
                    self._asked_s = None
                    self._take_waiting(applied)
                    return
                _, events = decode_batch(payload)
            except ValueError:
                continue
            if events[:1] == [Cleared()]:
                self.snapshots += 1
            self._last = sequence
            self._apply(events, applied)

    def _take_batches(self, applied: list[Event]) -> None:
        while True:
            try:
                frames = self._events.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                _, number, payload = frames
                batch = decode_sequence(number), decode_batch(payload)[1]
            except ValueError:
                continue
            self._waiting.append(batch)
            if len(self._waiting) > _MOST_WAITING:
                self._waiting.popleft()
            if self._asked_s is None:
                self._take_waiting(applied)

    def _take_waiting(self, applied: list[Event]) -> None:
        """Applies the batches that follow the last one, and asks for those that are missing between."""
        while self._waiting:
            sequence, events = self._waiting[0]
            if sequence > self._last + 1:
                self._ask()
                return
            self._waiting.popleft()
            if sequence == self._last + 1:
                self._last = sequence
                self._apply(events, applied)

    def _apply(self, events: list[Event], applied: list[Event]) -> None:
        self.blocks.apply(events)
        applied += events
