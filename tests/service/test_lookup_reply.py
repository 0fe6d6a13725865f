"""A LookupReply that is written by hand has the bytes of the generated class."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.leases import LeaseId
from kvstore_cluster.lookup import FoundVariant, LookupAnswer, LookupResult
from kvstore_codec.errors import MalformedRequestError
from kvstore_service.lookup_reply import lookup_reply

REF = pb.ChunkRef(content_id=bytes(32), prefix_id=bytes(32))
sizes = st.integers(1, (1 << 32) - 1)
headers = st.binary(max_size=300)
encodings = st.sampled_from(["exact-raw", "step0.5-zstd", "größe"])
others = st.builds(FoundVariant, encodings, sizes, headers, st.booleans())
found = st.builds(
    LookupAnswer,
    encodings,
    sizes,
    headers,
    st.integers(0, 1 << 20),
    st.booleans(),
    st.lists(others, max_size=3),
    st.sampled_from([b"", bytes(range(32))]),
)
missed = st.builds(lambda contexts: LookupAnswer(None, 0, b"", contexts), st.integers(0, 300))


@given(st.lists(found | missed, max_size=20), st.none() | st.binary(min_size=16, max_size=16))
def test_a_reply_has_the_bytes_of_the_generated_class(
    answers: list[LookupAnswer], lease: bytes | None
) -> None:
    result = LookupResult(answers, None if lease is None else LeaseId(lease))
    expected = pb.LookupReply(
        answers=[
            pb.LookupAnswer(
                encoding=answer.encoding or "",
                size_bytes=answer.size_bytes,
                header=answer.header,
                other_contexts=answer.other_contexts,
                on_disk=answer.on_disk,
                others=[pb.OtherEncoding(**other._asdict()) for other in answer.others],
                prefix_id=answer.prefix_id,
            )
            for answer in answers
        ],
        lease_id=lease or b"",
        bulk_endpoint="127.0.0.1:1",
    )
    written = lookup_reply([REF] * len(answers), result, "127.0.0.1:1")
    assert pb.LookupReply.FromString(written) == expected
    assert written == expected.SerializeToString()


def test_a_missed_chunk_needs_a_sound_reference() -> None:
    missing = LookupResult([LookupAnswer(None, 0, b"", 0)], None)
    with pytest.raises(MalformedRequestError, match="32 bytes each"):
        lookup_reply([pb.ChunkRef(content_id=bytes(3), prefix_id=bytes(32))], missing, "")
