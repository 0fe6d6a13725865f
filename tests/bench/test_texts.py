"""What is measured on is never what was calibrated on."""

import pytest

from kvstore_bench.codec.texts import (
    Document,
    Source,
    csv_table,
    default_sources,
    require_unseen,
    split,
)
from kvstore_codec.errors import ConfigurationError


@pytest.fixture(scope="module")
def sources() -> list[Source]:
    return default_sources()


def test_the_default_texts_are_split_into_whole_documents_that_differ(sources: list[Source]) -> None:
    assert len(sources) == 2
    for source in sources:
        measured, learnt = split(source)
        digests = [{document.digest for document in half.documents} for half in (measured, learnt)]
        assert not digests[0] & digests[1]
        assert digests[0] | digests[1] == {document.digest for document in source.documents}
        # At four characters a token: two passages of 2,432 tokens, and half of 24,576.
        measured_size, learnt_size = (
            sum(len(document.text) for document in half.documents) for half in (measured, learnt)
        )
        assert measured_size > 4 * 2 * 2432
        assert learnt_size > 4 * 24_576 / 2


def test_a_document_that_stands_twice_goes_to_one_side() -> None:
    texts = [f"text {number}" for number in range(9)] * 2
    source = Source("many", tuple(Document(str(place), text) for place, text in enumerate(texts)))
    measured, learnt = split(source)
    assert len(measured.documents) == 3
    assert not {d.text for d in measured.documents} & {d.text for d in learnt.documents}


def test_text_that_the_calibration_has_seen_is_refused(sources: list[Source]) -> None:
    measured, learnt = split(sources[0])
    seen = {document.digest for document in learnt.documents}
    require_unseen([measured], seen)
    with pytest.raises(ConfigurationError, match="results on it would be too good"):
        require_unseen([measured, learnt], seen)


def test_the_table_is_always_the_same_and_rectangular() -> None:
    table = csv_table(50)
    assert table == csv_table(50)
    assert {line.count(",") for line in table.splitlines()} == {6}
    assert len(set(table.splitlines())) == 51
