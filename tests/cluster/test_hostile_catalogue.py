"""Whatever a catalogue document holds, in a file or in Redis, it is read or refused in a short sentence."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvstore_cluster.catalogue import ClusterState, FileCatalogue, RedisCatalogue, document
from kvstore_cluster.catalogue.document import write_document
from kvstore_cluster.coordinator import MAX_QUOTAS, Coordinator
from kvstore_codec.errors import CatalogueError, TooManyQuotasError
from tests.cluster.test_catalogue import STATE
from tests.redis_server import RedisServer

DEEP = 100_000


def changed(**fields: Any) -> str:
    """A document with a right checksum, and these fields of its state."""
    content = json.loads(write_document(STATE))["state"] | fields
    return json.dumps(
        {
            "format": "kvstore-catalogue",
            "version": 2,
            "state": content,
            "checksum": document._checksum(content),
        }
    )


HOSTILE = {
    "deep list": "[" * DEEP,
    "deep table": '{"a":' * DEEP,
    "deep state": '{"format": "kvstore-catalogue", "version": 2, "checksum": "", "state": ' + "[" * DEEP,
    "a list": "[]",
    "a number": "1" * 3000,
    "long number": '{"format": ' + "1" * 6000,
    "long format": json.dumps(json.loads(changed()) | {"format": "x" * 1_000_000}),
    "long version": json.dumps(json.loads(changed()) | {"version": "x" * 1_000_000}),
    "nodes of text": changed(nodes=["x" * 1_000_000]),
    "nodes of numbers": changed(nodes=[1]),
    "unknown fields": changed(nodes=[{"member": {"x" * 1_000_000: 1}}]),
    "quotas as a list": changed(quotas=[1]),
    "quotas of text": changed(quotas={"a": "x" * 1_000_000}),
    "a true epoch": changed(epoch=True),
    "an epoch of text": changed(epoch="7"),
    "a round of a fraction": changed(repair_round=1.5),
    "short pins": changed(pins=["00"]),
    "pins of numbers": changed(pins=[1]),
    "no pins": changed(pins=None),
    "pins of no tenant": changed(tenant_pins=[]),
    "a tenant without pins": changed(tenant_pins={"acme": None}),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_file_is_refused_in_a_short_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "catalogue.json").write_text(text)
    catalogue = FileCatalogue(tmp_path)
    with pytest.raises(CatalogueError, match=r"catalogue\.json is ") as refusal:
        catalogue.load()
    assert len(str(refusal.value)) < 1000
    catalogue.close()


def test_a_value_in_redis_is_refused_in_a_short_sentence() -> None:
    with RedisServer() as server, server.client() as client:
        catalogue = RedisCatalogue(server.url)
        catalogue.save(ClusterState(1))
        for text in HOSTILE.values():
            client.set("kvstore:catalogue:document", text)
            with pytest.raises(CatalogueError, match=r"kvstore:catalogue:document in Redis") as refusal:
                catalogue.load()
            assert len(str(refusal.value)) < 1000
        catalogue.close()


def test_a_document_of_any_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = len(write_document(STATE))
    monkeypatch.setattr(document, "MAX_DOCUMENT_BYTES", limit)
    monkeypatch.setattr("kvstore_cluster.catalogue.file.MAX_DOCUMENT_BYTES", limit)
    catalogue = FileCatalogue(tmp_path)
    catalogue.save(STATE)
    assert catalogue.load() == STATE
    (tmp_path / "catalogue.json").write_text(write_document(STATE) + " ")
    with pytest.raises(CatalogueError, match="at most"):
        catalogue.load()
    catalogue.close()


def test_quotas_are_bounded(tmp_path: Path) -> None:
    catalogue = FileCatalogue(tmp_path)
    catalogue.save(ClusterState(quotas={str(number): 1 for number in range(MAX_QUOTAS)}))
    coordinator = Coordinator(catalogue)
    with pytest.raises(TooManyQuotasError, match="remove one by setting it to 0 bytes"):
        coordinator.set_quota("one more", 1)
    coordinator.set_quota("0", 0)
    coordinator.set_quota("one more", 1)
    coordinator.close()
    catalogue.close()
