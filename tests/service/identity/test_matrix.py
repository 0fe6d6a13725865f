"""Every caller with every call, and every kind of connection, against the tables of docs/security.md."""

from pathlib import Path

from kvstore_service.identity.verbs import VERBS
from tests.service.identity import connections, matrix

# What tells nothing of any tenant's chunks.
SHARED = {
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    *(
        f"/kvstore.v1.Coordinator/{name}"
        for name in (
            "Events", "Membership", "GetCalibration", "FindCalibration", "ListCalibrations", "ReportRefusal",
            "ReportFetch",
        )
    ),
}  # fmt: skip
PAGE = (Path(__file__).parents[3] / "docs" / "security.md").read_text()


def test_each_caller_gets_from_each_call_what_the_page_says(tmp_path: Path) -> None:
    assert VERBS.keys() <= matrix.CALLS.keys()
    with matrix.staged(tmp_path) as stage:
        found = matrix.results(stage)
        assert stage.said
        for text in stage.said:
            assert len(text) < 400
            for secret in (matrix.OWNER, matrix.CHUNK.chunk_id.content_id.hex()[:8], "kvs_", str(tmp_path)):
                assert secret not in text, text
    for call, (data, other, admin, other_admin, *_) in found.items():
        if call not in SHARED:
            assert matrix.YES not in (other, other_admin), (call, data, admin)
    table = matrix.calls_table(found)
    assert table in PAGE, table


def test_each_connection_is_served_or_not_as_the_page_says(tmp_path: Path) -> None:
    files = connections.Files.made_in(tmp_path / "files")
    table = connections.connections_table(connections.results(files, tmp_path))
    assert table in PAGE, table
