"""New chunks of a segmented prompt to store: those of its documents that were not stored anywhere."""

from collections.abc import Sequence

from kvstore_client.new_chunk import NewChunk
from kvstore_client.reuse.blend.plan import SegmentPlan, chunk_tokens
from kvstore_client.reuse.blend.request import BlendedPrompt
from kvstore_client.reuse.engine import TokenEmbeddings
from kvstore_client.reuse.features import features_of
from kvstore_client.reuse.generated import Gather, GenerationResult
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId, PlacedChunk, behind_approximate, prefix_id


def prefilled_chunks(
    embed: TokenEmbeddings,
    tokens: Sequence[int],
    plan: SegmentPlan,
    generated: GenerationResult,
    *,
    features: bool,
) -> list[NewChunk]:
    """New chunks of a prompt that was computed in full, or behind a reused prefix, or until an exception ended the
    call."""
    first_token = generated.capture.first_token
    return [
        NewChunk(
            chunk.chunk_id,
            Gather(generated.capture, generated.values, chunk.first_token, first_token),
            features_of(embed, tokens, chunk.first_token) if features else None,
            begins_text=not chunk.first_token,
            document=plan.document(chunk.first_token),
        )
        for chunk in plan.unstored
        if first_token <= chunk.first_token <= generated.tokens - CHUNK_TOKENS
    ]


def blended_chunks(
    embed: TokenEmbeddings, tokens: Sequence[int], blended: BlendedPrompt, *, features: bool
) -> list[NewChunk]:
    """New chunks of a partly computed prompt. Chunks behind one that was reused in another context get approximate ids,
    because their KV differs from that of a plain prefill."""
    approximate = [chunk.first_token for chunk in blended.plan.match.chunks if not chunk.exact]
    new: list[NewChunk] = []
    for chunk in blended.plan.unstored:
        place = chunk_tokens(chunk)
        keys = blended.blend.unrotated_keys(place).cpu()
        values = blended.blend.kv.values[:, :, place.start : place.stop].to("cpu", copy=True)
        new.append(
            NewChunk(
                _approximate_id(chunk)
                if min(approximate, default=place.stop) < place.start
                else chunk.chunk_id,
                lambda keys=keys, values=values: (keys, values),  # type: ignore[misc]
                features_of(embed, tokens, place.start) if features else None,
                begins_text=not place.start,
                document=blended.plan.document(place.start),
            )
        )
    return new


def _approximate_id(chunk: PlacedChunk) -> ChunkId:
    content = chunk.chunk_id.content_id
    return ChunkId(content, prefix_id(behind_approximate(chunk.parent), content))
