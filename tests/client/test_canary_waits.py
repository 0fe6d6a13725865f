"""How long calls wait for a comparison: once at most, and never again for a coordinator that does not answer."""

import threading
from collections.abc import Iterator

import pytest

from kvstore_client.canaries import Canaries, KeptCanary
from kvstore_codec.errors import NodeUnavailableError
from kvstore_codec.model_spec import ModelSpec
from tests.client.conftest import ServedCluster
from tests.client.test_canary import GREEDY, PROMPT, answer, replace_canary, worker

pytestmark = pytest.mark.usefixtures("one_thread")


class Coordinator:
    """Asked for a canary it answers at once, not at all, or once `go` is set."""

    def __init__(self) -> None:
        self.hangs = self.fails = False
        self.asked, self.go, self.answered = (threading.Event() for _ in range(3))

    def get(self, canaries: Canaries, spec: ModelSpec) -> KeptCanary:
        if self.fails:
            raise NodeUnavailableError("the coordinator did not answer in time")
        if self.hangs:
            self.asked.set()
            self.go.wait(20)
            self.answered.set()
        return PLAIN_GET(canaries, spec)


PLAIN_GET = Canaries.get


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    found = Coordinator()
    monkeypatch.setattr(Canaries, "get", lambda *arguments: found.get(*arguments))
    yield found
    found.go.set()


def test_a_comparison_that_failed_is_repeated_without_being_waited_for(
    cluster: ServedCluster, coordinator: Coordinator
) -> None:
    coordinator.fails = True
    with worker(cluster, retry_after_s=0.0) as cached:
        assert answer(cached) == 0
        assert str(cached.last_report.why_not).startswith("unreachable: ")
        coordinator.fails, coordinator.hangs = False, True
        for _ in range(3):
            cached.generate(PROMPT, **GREEDY)
            assert str(cached.last_report.why_not).startswith("unreachable: ")
        assert coordinator.asked.wait(20)
        assert not coordinator.answered.is_set()
        coordinator.go.set()
        assert cached.canary.refusal(cached.spec, wait_s=0) in ("unreachable", None)


def test_all_comparisons_of_a_model_together_are_waited_for_no_longer_than_the_setting(
    cluster: ServedCluster, coordinator: Coordinator
) -> None:
    coordinator.hangs = True
    with worker(cluster, canary_timeout_s=0.05) as cached:
        assert answer(cached) == 0
        assert str(cached.last_report.why_not).startswith("canary_pending: ")
        coordinator.go.set()
        assert cached.canary.refusal(cached.spec, wait_s=30) is None
        assert answer(cached) == 0
        assert answer(cached) == 512
        for event in (coordinator.asked, coordinator.go, coordinator.answered):
            event.clear()
        replace_canary(cluster)
        cached.client._view._ask(1.0)
        cached.generate(PROMPT, **GREEDY)
        assert str(cached.last_report.why_not).startswith("canary_pending: ")
        assert not coordinator.answered.is_set()
