"""Names of what vLLM computes: the model that it serves, and the chunks of its requests."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]

from kvstore_client.engines.checkpoint import spec_of_checkpoint
from kvstore_client.engines.vllm.kinds import KeyKind, spec_of_kind
from kvstore_codec.errors import UnsupportedEngineError
from kvstore_codec.identity import CHUNK_TOKENS, ROOT_PREFIX, ChunkId, PrefixId
from kvstore_codec.model_spec import KVDtype, ModelSpec

MAX_QUALIFIER_BYTES = 64 << 10

_HASH = re.compile("[0-9a-f]{64}")

NextChunkId = Callable[[PrefixId, Sequence[int], bytes], ChunkId]
"""Names the chunk of these tokens behind a parent, with what else its KV depends on."""


def served_spec(model_config: Any, cache_dir: Path, kind: KeyKind = KeyKind.AFTER_ROPE) -> ModelSpec:
    """The ModelSpec that names KV of this kind of the model that vLLM serves, from the checkpoint that it loaded.
    Raises UnsupportedModelError and UnsupportedEngineError."""
    folder = checkpoint_folder(model_config.model, model_config.revision)
    plain = spec_of_checkpoint(
        folder, model_config.hf_config.to_dict(), KVDtype.of(model_config.dtype), cache_dir=cache_dir
    )
    return spec_of_kind(plain, kind)


def checkpoint_folder(model: str, revision: str | None) -> Path:
    """Where the model's files are. Raises UnsupportedEngineError when they are not on this machine."""
    if os.path.isdir(model):  # noqa: PTH112  # `model` may be the name of a repository
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise UnsupportedEngineError(f"the files of {model} are not on this machine: {error}") from error


@dataclass(slots=True)
class RequestText:
    """The chunks of one request's tokens, named as the tokens become known."""

    request: Any
    """vLLM's Request."""
    adapter: bytes | None = None
    """Digest of the request's LoRA adapter, if it has one. To be set before anything is named."""
    ids: list[ChunkId] = field(default_factory=list)
    next_feature: int = 0
    """Where vLLM goes on looking through the request's images."""

    @property
    def known_tokens(self) -> int:
        """Tokens of the prompt, and those that were generated so far."""
        return int(self.request.num_tokens)

    def name(self, tokens: int, next_id: NextChunkId) -> list[ChunkId]:
        """Ids of the full chunks of the first `tokens` tokens, which are known. Each chunk is named once. Raises
        UnsupportedEngineError where vLLM's own keys of the tokens cannot be interpreted."""
        while (end := (len(self.ids) + 1) * CHUNK_TOKENS) <= min(tokens, self.known_tokens):
            first = end - CHUNK_TOKENS
            qualifier = self._qualifier(first, end)
            parent = self.ids[-1].prefix_id if self.ids else ROOT_PREFIX
            self.ids.append(next_id(parent, self.request.all_token_ids[first:end], qualifier))
        return self.ids[: tokens // CHUNK_TOKENS]

    def _qualifier(self, first: int, end: int) -> bytes:
        """What the KV of these tokens depends on besides model and tokens: adapter, images, prompt embeddings and the
        request's salt, as vLLM itself tells its blocks apart."""
        from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

        keys, self.next_feature = generate_block_hash_extra_keys(self.request, first, end, self.next_feature)
        told = [] if self.request.lora_request is None else [self._adapter_key(keys)]
        told += [_tagged(key) for key in (keys or ())[len(told) :]]
        if not told:
            return b""
        try:
            packed: bytes = msgpack.packb(told)
        except (TypeError, ValueError, OverflowError) as error:
            raise UnsupportedEngineError(f"vLLM's keys of a block cannot be interpreted: {error}") from error
        if len(packed) > MAX_QUALIFIER_BYTES:
            raise UnsupportedEngineError(f"vLLM's keys of a block take {len(packed)} bytes")
        return packed

    def _adapter_key(self, keys: Sequence[Any] | None) -> tuple[str, bytes]:
        """The adapter, in place of the first one of vLLM's keys, which names it by name and path. Raises
        UnsupportedEngineError for another key, as that of vLLM 0.30, by which the engine itself reuses KV of one
        adapter for another one of its name."""
        adapter = self.request.lora_request
        if not keys or keys[0] != ("lora", adapter.lora_name, adapter.lora_path):
            raise UnsupportedEngineError(
                "this release of vLLM tells LoRA adapters apart by their names only; 0.31 and later do by path, too"
            )
        if self.adapter is None:
            raise UnsupportedEngineError("its LoRA adapter is not known")
        return "lora", self.adapter


def _tagged(key: Any) -> Any:
    """One of vLLM's keys as vLLM 0.31 and later give it, so that all releases give a chunk the same name. Raises
    UnsupportedEngineError for an image that the caller has named, as vLLM allows: other images may have its name
    elsewhere, where vLLM's own names are hashes of what is in the image. Raises it for an unknown key, too."""
    match key:
        case str():
            key = ("cache_salt", key)
        case bytes():
            key = ("prompt_embeds", key)
        case (str(), int()):
            key = ("mm", *key)
    match key:
        case ("mm", str(name), int()):
            if not _HASH.fullmatch(name):
                raise UnsupportedEngineError(
                    "an image or a sound has a name of the caller's instead of its hash"
                )
        case ("cache_salt", str()) | ("prompt_embeds", bytes()):
            pass
        case _:
            raise UnsupportedEngineError("vLLM's keys of a block cannot be interpreted: one is not known")
    return key


def why_ineligible(request: Any) -> str | None:
    """Why nothing of a request may be reused or stored, if so."""
    if getattr(request, "resumable", False):
        return "its prompt grows while it runs"
    if request.pooling_params is not None:
        return "it generates nothing"
    return None
