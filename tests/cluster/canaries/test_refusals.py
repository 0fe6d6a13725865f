"""Refusals are remembered within bounds, one for each worker that is alike."""

from kvstore_cluster.canaries import Origin, Refusals
from kvstore_cluster.canaries.refusals import MAX_MESSAGE_BYTES, MAX_MODELS, MAX_OF_A_MODEL

MODEL = b"m" * 32


def test_a_worker_that_was_started_again_counts_again() -> None:
    refusals = Refusals()
    for pid in (1, 2, 3):
        refusals.add(MODEL, 0, Origin("model", "host", pid), f"differs {pid}")
    (refusal,) = refusals.of(MODEL)
    assert (refusal.times, refusal.origin.pid, refusal.message) == (3, 3, "differs 3")


def test_a_tenant_with_many_models_keeps_the_refusals_of_others() -> None:
    refusals = Refusals()
    refusals.add(MODEL, 0, Origin(), "differs", "small")
    for number in range(2 * MAX_MODELS):
        refusals.add(number.to_bytes(32, "little"), 0, Origin(), "differs", "greedy")
    assert len(refusals.of(MODEL, "small")) == 1
    assert refusals.of(MODEL) == ()
    assert not refusals.of((MAX_MODELS).to_bytes(32, "little"), "greedy")
    assert refusals.of((2 * MAX_MODELS - 1).to_bytes(32, "little"), "greedy")


def test_they_are_bounded() -> None:
    refusals = Refusals()
    for number in range(2 * MAX_OF_A_MODEL):
        refusals.add(MODEL, 0, Origin("model", f"host-{number}"), "x" * 10_000)
    found = refusals.of(MODEL)
    assert [refusal.origin.host for refusal in found][-1] == f"host-{2 * MAX_OF_A_MODEL - 1}"
    assert len(found) == MAX_OF_A_MODEL
    assert {len(refusal.message) for refusal in found} == {MAX_MESSAGE_BYTES}
    for number in range(MAX_MODELS):
        refusals.add(number.to_bytes(32, "little"), 0, Origin(), "differs")
    assert refusals.of(MODEL) == ()
    refusals.forget(bytes(32))
    assert refusals.of(bytes(32)) == ()
