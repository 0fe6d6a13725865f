"""Small floods of a real service with TLS and credentials: nothing honest fails, and everything comes back."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from flood_attacks import ATTACKS
from floods import Sides, flooded, served, sides

pytestmark = pytest.mark.slow

SCALE, SECONDS = 0.05, 3.0


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[Sides, int]]:
    with (
        tempfile.TemporaryDirectory(prefix="kv") as folder,
        served(Path(folder)) as (target, pid),
        sides(target, warm_up_s=2) as both,
    ):
        yield both, pid


@pytest.mark.parametrize("name", ATTACKS)
def test_a_flood_fails_nothing_honest_and_leaves_nothing(service: tuple[Sides, int], name: str) -> None:
    both, pid = service
    rows, processes = flooded(both, pid, name, scale=SCALE, seconds=SECONDS)
    assert {row["phase"] for row in rows} == {"before", "during", "after"}
    assert [row for row in rows if row["failed"]] == []
    assert [row for row in processes if not row["back"]] == []
