"""One question over a part of its prefix: reads frames, computes the question, and leaves KV for the answer."""

from __future__ import annotations

from functools import partial

import torch

from kvstore_client.buffers import KVBuffers
from kvstore_client.client import KVStoreClient
from kvstore_client.contiguous.decoder import FrameDecoder
from kvstore_client.contiguous.executor import Reprefill, attention_of
from kvstore_client.contiguous.loader import FrameLoader
from kvstore_client.contiguous.plan import ReprefillPlan
from kvstore_client.contiguous.report import ReprefillReport
from kvstore_client.fetch.decode import ChunkFeatures
from kvstore_client.miss_reason import MissReason
from kvstore_client.reuse.engine import DecoderLayers
from kvstore_client.timeline import Timeline
from kvstore_codec.errors import CodecError, FetchIncompleteError
from kvstore_codec.identity import ChunkId
from kvstore_codec.model_spec import ModelSpec
from kvstore_codec.rope import RotaryTable


class PartialPrefix:
    """Computes one question over the frames that it chooses. Holds buffers and threads until `close`. Use it from one
    thread."""

    def __init__(
        self,
        plan: ReprefillPlan,
        tokens: torch.Tensor,
        spec: ModelSpec,
        client: KVStoreClient,
        decoder: DecoderLayers,
        rotary: tuple[RotaryTable, ...],
        features: ChunkFeatures,
        timeline: Timeline,
    ) -> None:
        """`tokens` is the whole prompt, i64 `[tokens]`; `rotary` has its positions. Raises RuntimeError or MemoryError
        when this process has no memory or thread left."""
        grid = plan.grid
        self._plan, self._client, self._decoder, self._timeline = plan, client, decoder, timeline
        self.question = tokens[grid.tokens :]
        self.report = ReprefillReport(
            plan.budget,
            grid.tokens,
            encoding=grid.variants[0].header.encoding.name,
            summary_bytes=plan.summary_bytes,
        )
        self.report.bytes_read = plan.summary_bytes
        self._pooled: KVBuffers | None = None
        self.kv = self._buffers(spec, plan.count * grid.frame_tokens + len(self.question))
        """KV of the frames of each period's set, and behind them the question's."""
        timeouts = client.settings.timeouts
        self._loader = FrameLoader(
            grid,
            partial(client.read_frames, timeline=timeline),
            FrameDecoder(grid, rotary, features, self._unusable),
            client.frame_cache,
            self.report,
            deadline_s=timeouts.fetch_s,
            stall_s=timeouts.fetch_stall_s,
            device=decoder.device if client.settings.reprefill.device_cache_bytes else torch.device("cpu"),
        )
        question_rotary = rotary[0].at(slice(grid.tokens, len(tokens)))
        self._reprefill = Reprefill(
            decoder, self.question, grid, plan.count, plan.scorer, self._loader, self.kv, question_rotary,
            read_ahead=client.settings.reprefill.read_ahead,
        )  # fmt: skip

    def compute(self) -> tuple[int, torch.Tensor] | None:
        """Compute the question's tokens into `kv`. Returns the number of prefix tokens there, and the hidden state of
        the last token that leaves the last layer, `[1, 1, hidden]`; None when too much of a set did not arrive, or this
        process has no memory left."""
        try:
            with torch.inference_mode(), self._timeline.span("compute", "question over a part of the prefix"):
                state = self._reprefill.compute()
                held = self._reprefill.align()
        except FetchIncompleteError as error:
            self._client.metrics.missed(
                MissReason.REPREFILL_INCOMPLETE, detail=f"a re-prefill failed: {error}"
            )
            return None
        except (RuntimeError, MemoryError) as error:  # an out-of-memory device raises RuntimeError
            self._client.metrics.missed(
                MissReason.NO_RESOURCES,
                detail=f"a question cannot be computed over a part of its prefix: {error}",
            )
            return None
        self._attended(held)
        return held, state

    @torch.inference_mode()
    def question_states(self) -> torch.Tensor:
        """Hidden states that leave the last layer for the question's tokens, `[1, tokens, hidden]`. Raises
        FetchIncompleteError when too much of a set did not arrive."""
        states = self._reprefill.compute(states=True)
        self._attended(self._reprefill.align())
        return states

    @property
    def attention(self) -> dict[ChunkId, float]:
        """Share of the question's attention that each chunk of the prefix received, 0 to 1."""
        grid = self._plan.grid
        shares = attention_of(self._reprefill.sets, grid)
        return {chunk.chunk_id: min(1.0, share) for chunk, share in zip(grid.chunks, shares, strict=True)}

    def close(self) -> None:
        """End all reads and release the buffers. May be called repeatedly."""
        self._loader.close()
        pooled, self._pooled = self._pooled, None
        if pooled is not None:
            self._client.buffers.release(pooled)

    def _attended(self, tokens: int) -> None:
        self.report.attended_tokens = tokens
        self.report.sets = [chosen.frames for chosen in self._reprefill.sets]

    def _buffers(self, spec: ModelSpec, tokens: int) -> KVBuffers:
        device = self._decoder.device
        if device.type == "cpu":
            self._pooled = self._client.buffers.acquire(spec, tokens)
            return self._pooled
        shape = (spec.layers, spec.kv_heads, tokens, spec.head_dim)
        keys, values = (torch.empty(shape, dtype=self._decoder.dtype, device=device) for _ in range(2))
        return KVBuffers(keys, values, keys)

    def _unusable(self, index: int, error: CodecError) -> None:
        chunk = self._plan.grid.chunks[index // self._plan.grid.frames_per_chunk]
        what = f"a frame of chunk {chunk.chunk_id.short} from {chunk.member.endpoint} cannot be used: {error}"
        self._client.metrics.failures.warn(MissReason.UNDECODABLE, what)
