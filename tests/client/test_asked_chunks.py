"""The hand-written part of a lookup request."""

from kvstore_api.chunk_refs import chunk_ref
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.replicas import asked_chunks
from tests.client.chunks import ids


def test_asked_chunks_are_serialised_as_the_generated_class_does() -> None:
    asked = ids(8)
    request = pb.LookupRequest()
    request.MergeFromString(asked_chunks(asked))
    assert request == pb.LookupRequest(chunks=map(chunk_ref, asked))
    assert asked_chunks([]) == b""
