"""What the scheduler's half of the connector tells the worker's half, step by step."""

from dataclasses import dataclass

from vllm.distributed.kv_events import BlockStored
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from kvstore_client.engines.adapter import AdapterFiles
from kvstore_client.engines.vllm.worker_news import News
from kvstore_client.planning import PrefillCost
from kvstore_client.planning.leading import UNKNOWN_PREFILL
from kvstore_codec.identity import CHUNK_TOKENS, ChunkId


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """The LoRA adapter that a request's chunks are named by."""

    lora_id: int
    """vLLM's number of it."""
    files: AdapterFiles
    """What its digest is of."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """KV that a request waits for."""

    request_id: str
    chunk_ids: tuple[ChunkId, ...]
    """Chunks of the prompt, from its beginning to the end of the load."""
    first_token: int
    """First position to load; the KV before it is in the engine's blocks already, which other requests may use."""
    end_token: int
    block_ids: tuple[int, ...]
    """The request's blocks, from the beginning of the prompt."""
    rest_tokens: int = 1
    """Tokens of the request behind the load, which the engine computes."""
    prefill: PrefillCost = UNKNOWN_PREFILL
    """What computing costs the engine, as far as it is known."""
    token_ids: tuple[int, ...] = ()
    """Tokens of the chunks from `first_chunk` on, from which lossy KV is predicted; empty where all KV is exact."""
    adapter: AdapterUse | None = None

    @property
    def first_chunk(self) -> int:
        """Index of the chunk that the load begins in."""
        return self.first_token // CHUNK_TOKENS

    def blocks_from(self, token: int, block_tokens: int) -> tuple[int, ...]:
        """The blocks that this position and later ones lie in."""
        return self.block_ids[token // block_tokens :]


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """Chunks whose KV is in the engine's blocks when the step's forward pass has ended."""

    text: tuple[ChunkId, ...]
    """Chunks of the request from its chunk `text_begins` on. The last ones are saved; those before them tell storage
    nodes the place of these in the text. A request of 100,000 tokens must not name all of them with every new one."""
    text_begins: int
    first_chunk: int
    """Index in the request of the first chunk that is saved."""
    block_ids: tuple[int, ...]
    """Blocks of the chunks that are saved."""
    token_ids: tuple[int, ...] = ()
    """Tokens of the chunks that are saved, from which lossy KV is predicted; empty where all KV is exact."""
    events: tuple[BlockStored, ...] = ()
    """What is published when the chunks that are saved are stored, one event for each; empty where nobody wants it."""
    adapter: AdapterUse | None = None
    request_id: str = ""

    @property
    def chunks(self) -> int:
        """Number of chunks that are saved."""
        return self.text_begins + len(self.text) - self.first_chunk

    def chunk_id(self, index: int) -> ChunkId:
        """Id of the request's chunk `index`."""
        return self.text[index - self.text_begins]


class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vLLM has no types here
    """Everything to begin in one step of the engine."""

    def __init__(
        self,
        loads: tuple[LoadRequest, ...] = (),
        saves: tuple[SaveRequest, ...] = (),
        *,
        probe_blocks: tuple[int, ...] = (),
        generation: int = 0,
        step: int = 0,
        computes: bool = False,
    ) -> None:
        """`probe_blocks` hold the KV of the canary's probe when the step's forward pass has ended; `generation` is that
        of the canary. `step` is the number of the step; `computes`: whether the engine computes anything in it."""
        self.loads = loads
        self.saves = saves
        self.probe_blocks = probe_blocks
        self.generation = generation
        self.step = step
        self.computes = computes


class WorkerMetadata(KVConnectorWorkerMetadata):  # type: ignore[misc]  # vLLM has no types here
    """What the worker's half tells the scheduler's half after a step."""

    def __init__(self, news: News) -> None:
        self.news = news

    def aggregate(self, other: "WorkerMetadata") -> "WorkerMetadata":
        """The later news: one rank is supported, so there is one worker."""
        return other
