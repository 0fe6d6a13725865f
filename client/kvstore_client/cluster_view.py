"""A client's view of the cluster: its members, and a channel to each."""

import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc

from kvstore_api.placement import Member, Membership, Placement
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_client.channels import Channels
from kvstore_client.connector import Connector
from kvstore_client.grpc_failure import predicate_of
from kvstore_client.metrics import ClientMetrics
from kvstore_client.miss_reason import MissReason
from kvstore_client.settings import ClientSettings
from kvstore_client.signatures import Signatures
from kvstore_client.transport import Transport, Transports
from kvstore_codec.errors import ConfigurationError, NodeUnavailableError

_LONGEST_PAUSE_S = 30.0
_FORGET_PAUSE_S = 300.0
"""Time after the end of a pause until it is forgotten, seconds; the next failure then pauses briefly."""
_PROBE_TIMEOUT_S = 0.25
_LAST_CALLS_S = 1.0
"""How long `close` waits for calls that no other code waits for."""
_UNREST_S = 10.0
_UNREST_TTL_S = 0.5
_RENEW_TIMEOUT_S = 0.2
"""While something fails, the membership is refreshed every `_UNREST_TTL_S` for `_UNREST_S`. A caller that needs it
at once waits for `_RENEW_TIMEOUT_S`."""
_MAX_MEMBERS = 4096
_MAX_REPLICAS = 16
_CHANGE_S = 10.0
"""How long the former owners of chunks are still asked after a change of membership, seconds."""


@dataclass(frozen=True, slots=True)
class _Pause:
    until_s: float
    length_s: float
    until_it_answers: bool
    why: str


class ClusterView:
    """Membership cached from the coordinator, and one gRPC channel per address. Thread-safe.

    Only the first membership is waited for. Later it is refreshed in the background, and the old one is used while the
    coordinator is unreachable: losing the coordinator never stops reads.
    """

    def __init__(
        self,
        settings: ClientSettings,
        metrics: ClientMetrics | None = None,
        keep: Callable[[Collection[str]], object] = lambda _: None,
    ) -> None:
        """`metrics` count failures that no caller waits for. `keep` is called with the addresses in use whenever the
        membership is received."""
        host, _, port = settings.address.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()):
            raise ConfigurationError(
                f"address {settings.address!r} of the coordinator is not of the form host:port"
            )
        self._settings = settings
        self._metrics = metrics or ClientMetrics()
        self._keep = keep
        self._address = settings.address
        self._lock = threading.Lock()
        longest_call_s = max(settings.timeouts.fetch_s, settings.timeouts.put_s)
        connector = Connector(settings.security)
        self._channels = Channels(connector, settings.transport.routes, longest_call_s=longest_call_s)
        self._transports = Transports(settings, connector)
        self.signatures = Signatures(settings.security.signing_key_file)
        """Reads headers that nodes return, and tells which chunks are trusted."""
        self._membership: Membership | None = None
        self._placement = Placement(())  # of that membership
        self._before: Placement | None = None
        self._before_until_s = 0.0
        self._members_before: tuple[Member, ...] = ()
        self._canary_changes = 0
        self._fetched_at_s = 0.0
        self._refreshing = False
        self._unawaited: set[grpc.Future] = set()
        self._pauses: dict[str, _Pause] = {}  # by endpoint
        self._unrest_until_s = 0.0
        self._refresher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvstore-membership")

    def membership(self, timeout_s: float = math.inf) -> Membership:
        """The latest membership. Only the first call waits, for at most `timeout_s` and `lookup_timeout_s`. Raises
        NodeUnavailableError when no membership was received in time."""
        with self._lock:
            known = self._membership
            ttl_s = self._settings.transport.membership_ttl_s
            if time.monotonic() < self._unrest_until_s:
                ttl_s = min(ttl_s, _UNREST_TTL_S)
            stale = time.monotonic() - self._fetched_at_s > ttl_s
        if known is None:
            if self.is_paused(self._address):
                raise NodeUnavailableError(self.why_paused(self._address))
            return self._ask(min(self._settings.timeouts.lookup_s, timeout_s))
        if stale:
            self.refresh()
        return known

    @property
    def tenant(self) -> str:
        """The tenant that requests name. Empty: that of the client's credential."""
        return self._settings.store.tenant

    @property
    def canary_changes(self) -> int:
        """Counter that changes when a canary is replaced; as old as the membership."""
        with self._lock:
            return self._canary_changes

    def heard_canary_changes(self, changes: int) -> None:
        """Record the counter from another answer of the coordinator."""
        with self._lock:
            self._canary_changes = changes

    def readers(self, content_ids: Sequence[bytes], timeout_s: float = math.inf) -> list[tuple[Member, ...]]:
        """Members that may hold each content, best first, followed by those that owned it before a recent change:
        chunks move later, and a restarted coordinator learns of its nodes one by one. Waits like
        `membership`. Raises NodeUnavailableError when the cluster has no node."""
        membership = self.membership(timeout_s)
        with self._lock:
            placement, before = self._placement, self._before
            if time.monotonic() > self._before_until_s:
                before = self._before = None
        if before is None:
            self._require_members(membership)
            return placement.readers(content_ids)
        current = {member.node_id: member for member in membership.members}
        joined: dict[tuple[tuple[Member, ...], tuple[Member, ...]], tuple[Member, ...]] = {}
        rows = list(zip(placement.readers(content_ids), before.owners(content_ids), strict=True))
        for now, once in set(rows):
            again = (current.get(member.node_id, member) for member in once)
            joined[now, once] = tuple(dict.fromkeys((*now, *again)))
        return [joined[row] for row in rows]

    def writers(self, content_ids: Sequence[bytes], timeout_s: float = math.inf) -> list[tuple[Member, ...]]:
        """Members to store each content on now: its owners, with the next reader in place of one that is paused or
        unknown. Fewer than the number of replicas when there are not enough such members. Waits like `membership`.
        Raises NodeUnavailableError when the cluster has no node."""
        rows = self.readers(content_ids, timeout_s)
        with self._lock:
            replicas = self._membership.replicas if self._membership is not None else 1
        unlike = {id(row): row for row in rows}
        closed = {m for row in unlike.values() for m in row if m.draining or self.is_paused(m.endpoint)}
        chosen = {key: tuple(m for m in row if m not in closed)[:replicas] for key, row in unlike.items()}
        return [chosen[id(row)] for row in rows]

    def refresh(self) -> None:
        """Start a refresh of the membership, unless one is in progress."""
        with self._lock:
            if self._refreshing:
                return
            self._refreshing = True
        try:
            self._refresher.submit(self._refresh)
        except RuntimeError:  # the client was closed
            self._refreshing = False

    def renew(self, timeout_s: float) -> bool:
        """Ask the coordinator now and return whether the members have changed. For callers that have lost every reader
        and have nothing else to wait for."""
        with self._lock:
            known, unrest = self._membership, time.monotonic() < self._unrest_until_s
        if timeout_s <= 0 or not unrest or self.is_paused(self._address):
            return False
        try:
            renewed = self._ask(min(timeout_s, _RENEW_TIMEOUT_S))
        except NodeUnavailableError:
            return False
        return known is None or renewed.members != known.members

    def pause(self, endpoint: str, why: str = "", *, until_it_answers: bool = False) -> None:
        """Skip a failed address for a while, twice as long after each further failure; `why` is a sentence for people.
        With `until_it_answers` the pause ends as soon as the address answers: it was unreachable, rather than slow or
        wrong."""
        now_s = time.monotonic()
        with self._lock:
            known = self._pauses.get(endpoint)
            length_s = min(2 * known.length_s if known else 0.0, _LONGEST_PAUSE_S)
            length_s = max(length_s, self._settings.transport.retry_after_s)
            self._pauses = {e: p for e, p in self._pauses.items() if now_s < p.until_s + _FORGET_PAUSE_S}
            self._pauses[endpoint] = _Pause(now_s + length_s, length_s, until_it_answers, why)
            self._unrest_until_s = now_s + _UNREST_S

    def is_paused(self, endpoint: str) -> bool:
        with self._lock:
            known = self._pauses.get(endpoint)
            return known is not None and time.monotonic() < known.until_s

    def why_paused(self, endpoint: str) -> str:
        """Why an address is paused."""
        with self._lock:
            known = self._pauses.get(endpoint)
        return known.why if known is not None and known.why else f"{endpoint} failed a moment ago"

    def is_out_of_reach(self, endpoint: str) -> bool:
        """Whether the address is paused until it answers again, rather than for being slow or wrong."""
        with self._lock:
            known = self._pauses.get(endpoint)
            return known is not None and known.until_it_answers and time.monotonic() < known.until_s

    def recovered(self, endpoint: str) -> None:
        """Report that the address works again: its next failure pauses it briefly."""
        with self._lock:
            self._pauses.pop(endpoint, None)

    def coordinator(self) -> rpc.CoordinatorStub:
        return rpc.CoordinatorStub(self._channels.to(self._address))

    def storage(self, endpoint: str) -> rpc.StorageStub:
        """Stub for the calls that carry no KV bytes. Like `coordinator` and `transport` it raises NodeUnavailableError
        after `close`."""
        return rpc.StorageStub(self._channels.to(endpoint))

    def transport(self, member: Member) -> Transport:
        """The transport for this member's KV bytes."""
        return self._transports.to(member, self._channels.to(member.endpoint))

    def finish_later(self, call: grpc.Future) -> None:
        """Let a call finish that no code but `close` waits for."""
        with self._lock:
            self._unawaited.add(call)  # gRPC cancels a call whose object is collected
        call.add_done_callback(self._forget)

    def close(self) -> None:
        self._refresher.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            unawaited = list(self._unawaited)
        until_s = time.monotonic() + _LAST_CALLS_S
        for call in unawaited:
            try:
                call.exception(max(0.0, until_s - time.monotonic()))
            except grpc.FutureTimeoutError:
                call.cancel()
        self._channels.close()
        self._transports.close()

    def leave_to_parent(self) -> None:
        """In a forked child: release the parent's resources without touching its connections. Nothing else may be
        called afterwards."""
        self._transports.leave_to_parent()
        self._channels.leave_to_parent()

    def _require_members(self, membership: Membership) -> None:
        if not membership.members:
            raise NodeUnavailableError(
                f"the cluster at {self._address} has no storage node; see `kvstore status --address {self._address}`"
            )

    def _forget(self, call: grpc.Future) -> None:
        with self._lock:
            self._unawaited.discard(call)

    def _refresh(self) -> None:
        try:
            # Before the probe: a node that returned at another address must not be awaited at the old one.
            self._ask(self._settings.timeouts.lookup_s)
        except Exception as error:
            self._not_refreshed(error)
        try:
            self._probe()
        except Exception as error:
            self._not_refreshed(error)
        finally:
            with self._lock:
                self._refreshing = False

    def _not_refreshed(self, error: Exception) -> None:
        """Keep the old membership, and try again after a full interval."""
        with self._lock:
            self._fetched_at_s = time.monotonic()
        if not isinstance(error, NodeUnavailableError):
            detail = f"asking the coordinator at {self._address} for its members failed: {error}"
            self._metrics.missed(MissReason.MEMBERSHIP_INTERNAL_ERROR, detail=detail, error=error)

    def _probe(self) -> None:
        """Find out which of the paused nodes answer again."""
        with self._lock:
            members = self._membership.members if self._membership is not None else ()
            now_s = time.monotonic()
            paused = {
                e for e, pause in self._pauses.items() if pause.until_it_answers and now_s < pause.until_s
            }
        nothing = pb.LookupRequest(peek=True)
        calls = [
            (member.endpoint, self.storage(member.endpoint).Lookup.future(nothing, timeout=_PROBE_TIMEOUT_S))
            for member in members
            if member.endpoint in paused
        ]
        for endpoint, call in calls:
            if call.exception() is None:
                self.recovered(endpoint)

    def _ask(self, timeout_s: float) -> Membership:
        try:
            reply = self.coordinator().Membership(pb.MembershipRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            why = f"the coordinator at {self._address} {predicate_of(error)}"
            # A coordinator that had too little time to answer has not failed.
            timeouts = self._settings.timeouts
            hasty = timeout_s < min(timeouts.failover_s, timeouts.lookup_s)
            if not (hasty and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED):
                self.pause(self._address, why)
            raise NodeUnavailableError(why) from error
        membership = _membership(reply)
        placement = Placement(membership.members, membership.replicas)
        with self._lock:
            # Any epoch is accepted: a coordinator that lost its catalogue counts from the start.
            known = self._membership
            if known is not None and known.members != membership.members and self._before is None:
                # Of several changes, the first one counts.
                self._before, self._before_until_s = self._placement, time.monotonic() + _CHANGE_S
                self._members_before = known.members
            self._membership, self._placement = membership, placement
            self._canary_changes = reply.canary_changes
            self._fetched_at_s = time.monotonic()
            members = {*membership.members, *(self._members_before if self._before is not None else ())}
        self.recovered(self._address)
        endpoints = {member.endpoint for member in members}
        self._channels.keep(endpoints | {self._address})
        self._transports.keep({member.node_id for member in members})
        self._keep(endpoints)
        return membership


def _membership(reply: pb.MembershipReply) -> Membership:
    """Membership from a reply, without members of unusable endpoint or weight."""
    usable = (m for m in reply.members[:_MAX_MEMBERS] if m.endpoint and 0 < m.weight < math.inf)
    members = tuple(
        Member(m.node_id, m.endpoint, m.weight, m.bulk_endpoint, m.domain, m.draining) for m in usable
    )
    return Membership(reply.epoch, members, max(1, min(reply.replicas, _MAX_REPLICAS)))
