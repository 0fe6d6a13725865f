"""What an engine has handed over counts as stored for as long as it may take."""

from kvstore_client.engines.vllm.stored_names import StoredNames
from tests.client.chunks import ids


def test_chunks_count_as_stored_for_a_while_and_longer_where_they_wait() -> None:
    now_s = 0.0
    (chunk,) = ids(1)
    at_once, waiting = StoredNames(clock=lambda: now_s), StoredNames(30.0, clock=lambda: now_s)
    for names in (at_once, waiting):
        assert chunk not in names
        names.add([chunk])
    now_s = 9.0
    assert chunk in at_once
    now_s = 39.0
    assert chunk not in at_once
    assert chunk in waiting
    now_s = 41.0
    assert chunk not in waiting
