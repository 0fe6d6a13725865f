"""The canary registry on disk: first wins, survives restarts, is replaced for good, stays within its bounds."""

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import msgpack
import pytest
import xxhash

from kvstore_cluster.canaries import CanaryRegistry, Origin
from kvstore_cluster.canaries.document import read_document
from kvstore_codec.canary.probe import Probe
from kvstore_codec.canary.sketch import SketchHeader, write_sketch
from kvstore_codec.errors import CanaryError, CatalogueError, UnknownModelError
from kvstore_codec.model_spec import KVDtype

MODEL, OTHER = b"m" * 32, b"n" * 32
RIGHT = Origin("SmolLM2", "host-a", 7, "torch 2.13.0", "cpu", "float32")
WRONG = Origin("SmolLM2", "host-b", 8, "torch 2.13.0", "cpu", "float32")


def sketch(fill: int = 0, model: bytes = MODEL, tokens: int = 4) -> bytes:
    header = SketchHeader(model, Probe(100, 512), KVDtype.FLOAT32, (2, 1, tokens, 8))
    return write_sketch(header, bytes([fill]) * header.body_bytes)


@pytest.fixture
def registry(tmp_path: Path) -> CanaryRegistry:
    return CanaryRegistry(tmp_path)


def test_the_first_one_wins(registry: CanaryRegistry) -> None:
    assert registry.get(MODEL)[0].size_bytes == 0
    first, kept = registry.put(MODEL, 0, RIGHT, sketch(1))
    assert (first.origin, kept) == (RIGHT, sketch(1))
    second, kept = registry.put(MODEL, 0, WRONG, sketch(2))
    assert (second, kept) == (first, sketch(1))


def test_of_many_at_once_one_wins(registry: CanaryRegistry) -> None:
    with ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(lambda fill: registry.put(MODEL, 0, RIGHT, sketch(fill))[1], range(24)))
    assert len(set(kept)) == 1
    assert registry.get(MODEL)[1] == kept[0]


def test_it_survives_a_restart(registry: CanaryRegistry, tmp_path: Path) -> None:
    made = registry.put(MODEL, 0, RIGHT, sketch(1))
    (tmp_path / ".unfinished-x").write_bytes(b"half")
    again = CanaryRegistry(tmp_path)
    assert again.get(MODEL) == made
    assert again.records() == registry.records()
    assert [path.suffix for path in tmp_path.iterdir()] == [".kvcanary"]


def test_a_replaced_one_is_made_anew_under_another_generation(
    registry: CanaryRegistry, tmp_path: Path
) -> None:
    registry.put(MODEL, 0, WRONG, sketch(2))
    assert registry.changes_of() == 0
    assert registry.replace(MODEL) == 1
    for known in (registry, CanaryRegistry(tmp_path)):
        record, kept = known.get(MODEL)
        assert (record.generation, record.size_bytes, kept, known.changes_of()) == (1, 0, b"", 1)
    # A worker that compared before the replacement is told of it.
    record, kept = registry.put(MODEL, 0, WRONG, sketch(2))
    assert (record.generation, kept) == (1, b"")
    record, kept = registry.put(MODEL, 1, RIGHT, sketch(1))
    assert (record.generation, record.origin, kept) == (1, RIGHT, sketch(1))
    assert registry.replace(MODEL) == 2
    assert CanaryRegistry(tmp_path).changes_of() == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_only_what_is_kept_can_be_replaced(registry: CanaryRegistry) -> None:
    with pytest.raises(UnknownModelError, match="no canary"):
        registry.replace(MODEL)


@pytest.mark.parametrize("wrong", [b"", b"x" * 100, sketch(model=OTHER), sketch()[:-1], sketch() + b"x"])
def test_what_is_no_canary_of_the_model_is_refused(
    registry: CanaryRegistry, wrong: bytes, tmp_path: Path
) -> None:
    with pytest.raises(CanaryError):
        registry.put(MODEL, 0, RIGHT, wrong)
    assert list(tmp_path.iterdir()) == []


def test_damage_on_disk_is_noticed_and_the_generation_kept(
    registry: CanaryRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry.put(MODEL, 0, WRONG, sketch(2))
    registry.replace(MODEL)
    registry.put(MODEL, 1, RIGHT, sketch(1))
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)
    for known in (registry, CanaryRegistry(tmp_path)):
        assert known.get(MODEL)[0].generation == 1
        assert known.get(MODEL)[1] == b""
    assert "is damaged" in caplog.text
    assert registry.put(MODEL, 1, RIGHT, sketch(3))[1] == sketch(3)
    assert CanaryRegistry(tmp_path).get(MODEL)[1] == sketch(3)


def test_files_that_are_none_of_its_own_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.kvcanary").write_bytes(b"x")
    assert CanaryRegistry(tmp_path).records() == ()
    assert (tmp_path / "notes.kvcanary").exists()


def test_the_one_asked_for_longest_ago_makes_room(tmp_path: Path) -> None:
    registry = CanaryRegistry(tmp_path, max_models=3)
    models = [bytes([number]) * 32 for number in range(4)]
    for model in models[:3]:
        registry.put(model, 0, RIGHT, sketch(1, model))
    registry.get(models[0])
    registry.put(models[3], 0, RIGHT, sketch(1, models[3]))
    left = {models[0], models[2], models[3]}
    assert {record.model_digest for record in registry.records()} == left
    assert len(list(tmp_path.iterdir())) == 3 + 1  # and one that stands for all that are forgotten
    assert {record.model_digest for record in CanaryRegistry(tmp_path, max_models=3).records()} == left


@pytest.mark.parametrize("restarted", [False, True])
def test_a_forgotten_model_begins_at_a_generation_that_it_never_had(tmp_path: Path, restarted: bool) -> None:
    registry = CanaryRegistry(tmp_path, max_models=2, max_bytes=2 * len(sketch()))

    def known() -> CanaryRegistry:
        return CanaryRegistry(tmp_path, max_models=2) if restarted else registry

    made = registry.put(MODEL, 0, RIGHT, sketch(1))[0]
    for number in range(2):
        junk = bytes([number]) * 32
        registry.put(junk, 0, WRONG, sketch(1, junk))
    record, kept = known().get(MODEL)
    assert (record.generation, kept) == (made.generation + 1, b"")
    again = known().put(MODEL, 0, WRONG, sketch(2))[0]
    assert again.generation == record.generation
    assert known().changes_of() == registry.changes_of() or restarted


def test_however_many_canaries_are_made_and_replaced_the_next_one_is_taken(tmp_path: Path) -> None:
    registry = CanaryRegistry(tmp_path, max_models=8)
    seen = set()
    for number in range(40):
        junk = bytes([number]) * 32
        for _ in range(2):
            seen.add(
                (
                    junk,
                    registry.put(junk, registry.get(junk)[0].generation, WRONG, sketch(1, junk))[
                        0
                    ].generation,
                )
            )
            registry.replace(junk)
    for known in (registry, CanaryRegistry(tmp_path, max_models=8)):
        assert known.put(MODEL, known.get(MODEL)[0].generation, RIGHT, sketch(1))[1] == sketch(1)
        assert len(known.records()) <= 8
    assert len(list(tmp_path.iterdir())) <= 8 + 1
    for number in range(40):
        junk = bytes([number]) * 32
        assert (junk, registry.get(junk)[0].generation) not in seen


def test_bytes_are_bounded(tmp_path: Path) -> None:
    registry = CanaryRegistry(tmp_path, max_bytes=2 * len(sketch()))
    for number in range(5):
        model = bytes([number]) * 32
        registry.put(model, 0, RIGHT, sketch(1, model))
        assert sum(record.size_bytes for record in registry.records()) <= 2 * len(sketch())


def test_what_one_client_makes_pushes_out_nothing_of_another_one(tmp_path: Path) -> None:
    CanaryRegistry(tmp_path, max_models=16).put(MODEL, 0, RIGHT, sketch(1), "10.0.0.1")
    registry = CanaryRegistry(tmp_path, max_models=16)  # whose they are is known after a restart
    for number in range(100):
        junk = number.to_bytes(32, "little")
        registry.put(junk, 0, WRONG, sketch(1, junk), "10.0.0.2")
    assert registry.get(MODEL)[1] == sketch(1)
    assert len(registry.records()) == 16


def test_a_comparison_counts_as_use_also_after_a_restart(tmp_path: Path) -> None:
    registry = CanaryRegistry(tmp_path, max_models=3)
    registry.put(MODEL, 0, RIGHT, sketch(1))
    registry.put(OTHER, 0, RIGHT, sketch(1, OTHER))
    registry.count_use(MODEL)
    assert [record.model_digest for record in registry.records()] == [OTHER, MODEL]
    registry.get(OTHER)
    for path in tmp_path.iterdir():
        if path.name.startswith(MODEL.hex()):
            os.utime(path, (1, 1))
    assert [record.model_digest for record in CanaryRegistry(tmp_path).records()] == [MODEL, OTHER]


def test_a_replacement_of_what_was_not_made_again_changes_nothing(registry: CanaryRegistry) -> None:
    registry.put(MODEL, 0, WRONG, sketch(2))
    assert [registry.replace(MODEL) for _ in range(3)] == [1, 1, 1]
    assert registry.changes_of() == 1


def test_the_digest_that_stands_for_forgotten_models_is_no_model(registry: CanaryRegistry) -> None:
    none = b"\xff" * 32
    with pytest.raises(CanaryError):
        registry.put(none, 0, WRONG, sketch(1, none))
    with pytest.raises(UnknownModelError):
        registry.replace(none)


def test_a_folder_that_cannot_be_used_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CatalogueError, match="canary folder"):
        CanaryRegistry(tmp_path / "file")


def test_long_texts_of_an_origin_are_cut(registry: CanaryRegistry, tmp_path: Path) -> None:
    registry.put(MODEL, 0, Origin("ü" * 5000, "h" * 5000, 1 << 40), sketch())
    origin = CanaryRegistry(tmp_path).get(MODEL)[0].origin
    assert (len(origin.model_id.encode()), len(origin.host), origin.pid) == (256, 256, 0)


def test_a_number_in_place_of_a_model_takes_no_memory() -> None:
    facts = msgpack.packb({"created": 0.0, "origin": asdict(RIGHT), "tenant": "acme", "model": 1 << 48})
    signed = struct.pack("<I", len(facts)) + facts
    content = struct.pack("<Q", xxhash.xxh3_64_intdigest(signed)) + signed
    with pytest.raises(CanaryError, match="facts cannot be read"):
        read_document(content, bytes(33), 1)


def test_a_damaged_one_of_a_tenant_is_not_shown_as_another_ones(tmp_path: Path) -> None:
    registry = CanaryRegistry(tmp_path)
    registry.put(MODEL, 0, RIGHT, sketch(1), tenant="acme")
    (path,) = tmp_path.glob("*.kvcanary")
    path.write_bytes(b"damaged")
    known = CanaryRegistry(tmp_path)
    assert known.records() == ()
    known.put(MODEL, 0, RIGHT, sketch(1), tenant="acme")
    assert [(record.tenant, record.model_digest) for record in known.records()] == [("acme", MODEL)]


def test_the_number_of_changes_of_a_tenant_tells_nothing_of_others(tmp_path: Path) -> None:
    registry = CanaryRegistry(tmp_path)
    for tenant in ("acme", "rival"):
        registry.put(MODEL, 0, RIGHT, sketch(1), tenant=tenant)
    registry.replace(MODEL, "rival")
    for known in (registry, CanaryRegistry(tmp_path)):
        assert [known.changes_of(tenant) for tenant in ("acme", "rival", None)] == [0, 1, 1]
