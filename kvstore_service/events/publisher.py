"""Sends the events of a hub to its subscribers."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.utils.z85

from kvstore_api.kv_events import END, decode_sequence, encode_sequence, tenant_of, topic_of
from kvstore_cluster.background import BackgroundLoop
from kvstore_cluster.events.hub import EventHub
from kvstore_service.events.keys import SubscriberKeys
from kvstore_service.events.sockets import EventSockets, user_of
from kvstore_service.identity.caller import ALL_TENANTS
from kvstore_service.listen import Address

log = logging.getLogger(__name__)

_MEMBERS_PERIOD_S = 0.2
_REPLAY_PERIOD_S = 0.002
_CREDENTIALS_PERIOD_S = 1.0
MARK_PERIOD_S = 5.0
"""A quiet topic gets an empty batch this often, by which subscribers notice that they missed the last ones."""
_MOST_AT_ONCE = 256  # batches and requests in one turn of the loop
_MOST_TOPICS = 1024  # subscribed topics that get empty batches
MAX_REPLAYS = 64
"""Requests for missed batches that are answered at a time."""


@dataclass(slots=True)
class _Replay:
    """An answer to a request for missed batches, of which `next_message` could not be sent yet."""

    peer: bytes
    topic: bytes
    batches: Iterator[tuple[int, bytes]]
    next_message: list[bytes] | None = None


class EventPublisher:
    """Publishes from construction until `stop`. `members` returns the live members, as `EventHub.keep` takes them. With
    `keys` it sends a topic only to subscribers that may read it. Raises AddressInUseError."""

    def __init__(
        self,
        hub: EventHub,
        members: Callable[[], Collection[tuple[str, int]]],
        address: Address,
        keys: SubscriberKeys | None = None,
        *,
        mark_period_s: float = MARK_PERIOD_S,
    ) -> None:
        self._hub, self._members, self._keys, self._mark_period_s = hub, members, keys, mark_period_s
        self._sockets = EventSockets(address, keys)
        self.public_key = zmq.utils.z85.decode(self._sockets.public_key) if keys is not None else b""
        """Public CURVE key of the publisher. Empty without `keys`."""
        self._topics: Counter[bytes] = Counter()  # subscriptions
        self._sent_s: dict[bytes, float] = {}  # by topic
        self._replays: list[_Replay] = []
        self._due_s = dict.fromkeys((self._keep_members, self._keep_subscribers, self._mark), 0.0)
        hub.wake = self._sockets.wake
        self._loop = BackgroundLoop("kvstore-event-publisher", self._step, wake=self._sockets.wake)
        self._loop.start()

    @property
    def addresses(self) -> tuple[str, str]:
        """Addresses for subscribers: of the publisher, and of requests for missed batches."""
        first, second = (Address(of.reachable_host, of.port) for of in self._sockets.addresses)
        return str(first), str(second)

    def stats(self) -> dict[str, int]:
        return self._hub.stats() | {"subscriptions": self._topics.total()}

    def stop(self) -> None:
        self._loop.stop()
        self._hub.wake = lambda: None
        self._sockets.close()

    def _step(self) -> None:
        self._sockets.open()
        ready = self._sockets.wait(_REPLAY_PERIOD_S if self._replays else _MEMBERS_PERIOD_S)
        if self._sockets.publishing in ready:
            self._take_subscriptions()
        now_s = time.monotonic()
        for due, period_s in (
            (self._keep_members, _MEMBERS_PERIOD_S),
            (self._keep_subscribers, _CREDENTIALS_PERIOD_S),
            (self._mark, self._mark_period_s / 4),
        ):
            if now_s >= self._due_s[due]:
                self._due_s[due] = now_s + period_s
                due()
        self._send()
        if self._sockets.replaying in ready:
            self._take_requests()
        self._replays = [replay for replay in self._replays if self._goes_on(replay)]

    def _keep_members(self) -> None:
        self._hub.keep(self._members())

    def _keep_subscribers(self) -> None:
        if self._keys is not None and self._keys.forget_revoked():
            log.info("a credential of a subscriber of KV events has ended: all subscribers connect again")
            self._replays.clear()
            self._topics.clear()
            self._sockets.disconnect()
            self._sockets.open()

    def _mark(self) -> None:
        """Adds empty batches to subscribed topics that were quiet."""
        now_s = time.monotonic()
        exact = [tenant for topic in self._topics if (tenant := tenant_of(topic)) is not None]
        others = [topic for topic in self._topics if tenant_of(topic) is None]
        begun = [t for t in self._hub.tenants() if any(map(topic_of(t).startswith, others))] if others else []
        for tenant in list(dict.fromkeys([*exact, *begun]))[:_MOST_TOPICS]:
            if now_s - self._sent_s.get(topic_of(tenant), 0.0) >= self._mark_period_s:
                self._hub.mark_time(tenant)

    def _send(self) -> None:
        batches = self._hub.take_unsent(_MOST_AT_ONCE)
        for batch in batches:
            topic = topic_of(batch.tenant)
            self._sockets.publishing.send_multipart(
                [topic, encode_sequence(batch.sequence), batch.payload], zmq.NOBLOCK
            )
            self._sent_s[topic] = time.monotonic()
        if len(batches) == _MOST_AT_ONCE:
            self._sockets.wake()

    def _take_subscriptions(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                frame = self._sockets.publishing.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            kind, topic = frame.bytes[:1], frame.bytes[1:]
            if kind == b"\1" and self._may_read(frame, topic):
                self._sockets.publishing.setsockopt(zmq.SUBSCRIBE, topic)
                if topic in self._topics or len(self._topics) < _MOST_TOPICS:
                    self._topics[topic] += 1
            elif kind == b"\0":
                self._sockets.publishing.setsockopt(zmq.UNSUBSCRIBE, topic)
                if self._topics[topic] > 1:
                    self._topics[topic] -= 1
                else:
                    del self._topics[topic]

    def _may_read(self, frame: Any, topic: bytes) -> bool:
        return self._keys is None or user_of(frame) in (ALL_TENANTS, topic.decode(errors="replace"))

    def _take_requests(self) -> None:
        """Takes requests for missed batches: the first sequence number, and the topic; without a topic that of the
        default tenant."""
        for _ in range(_MOST_AT_ONCE):
            if len(self._replays) >= MAX_REPLAYS:
                return
            try:
                frames = self._sockets.replaying.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            topic = frames[3].bytes if len(frames) == 4 else topic_of("")
            tenant = tenant_of(topic)
            try:
                sequence = decode_sequence(frames[2].bytes if len(frames) in (3, 4) else b"")
            except ValueError:
                continue
            if tenant is not None and self._may_read(frames[2], topic):
                batches = self._hub.since(tenant, sequence)
                self._replays.append(_Replay(frames[0].bytes, topic, batches))

    def _goes_on(self, replay: _Replay) -> bool:
        """Sends a part of an answer. False once it has ended, or its subscriber is gone."""
        for _ in range(_MOST_AT_ONCE // 16):
            if replay.next_message is None:
                sequence, payload = next(replay.batches, (END, b""))
                replay.next_message = [
                    replay.peer,
                    b"",
                    replay.topic if sequence != END else b"",
                    encode_sequence(sequence),
                    payload,
                ]
            try:
                self._sockets.replaying.send_multipart(replay.next_message, zmq.NOBLOCK)
            except zmq.Again:
                return True
            except zmq.ZMQError:
                return False
            if replay.next_message[3] == encode_sequence(END):
                return False
            replay.next_message = None
        return True
