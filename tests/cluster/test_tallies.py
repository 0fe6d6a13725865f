"""What a node counts: few numbers, whatever clients do."""

from kvstore_cluster.tallies import MOST_TENANTS, OTHER_TENANTS, Sample, Tallies


def asked(tallies: Tallies) -> dict[str, int]:
    samples: list[Sample] = [*tallies.samples({}, {})]
    return {sample.labels[0]: sample.value for sample in samples if sample.name == "tenant_requested_chunks"}


def test_the_tenants_above_the_limit_are_added_up() -> None:
    tallies = Tallies()
    for number in range(1000):
        for _ in range(2):
            tallies.asked(f"tenant-{number}", chunks=3, hits=1, hit_tokens=256)
    found = asked(tallies)
    assert len(found) == MOST_TENANTS + 1
    assert found["tenant-0"] == 6
    assert found[OTHER_TENANTS] == 6 * (1000 - MOST_TENANTS)


def test_a_forgotten_tenant_makes_room_for_another() -> None:
    tallies = Tallies()
    for number in range(MOST_TENANTS + 1):
        tallies.asked(f"tenant-{number}", chunks=1)
    tallies.forget("tenant-3".__eq__)
    tallies.asked("late", chunks=5)
    tallies.asked("later", chunks=7)
    found = asked(tallies)
    assert "tenant-3" not in found
    assert found["late"] == 5
    assert found[OTHER_TENANTS] == 1 + 7
