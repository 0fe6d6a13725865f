"""What the bytes of a chunk of vLLM's offloading depend on besides its key."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import vllm
from transformers import AutoConfig

from kvstore_client.engines.checkpoint import spec_of_checkpoint
from kvstore_client.engines.vllm.versions import supported_version
from kvstore_codec.errors import UnsupportedEngineError
from kvstore_codec.model_spec import KVDtype
from kvstore_codec.page import PageNamespace


def page_namespace(
    config: Any, chunk_bytes: int, checkpoint: str | None, salt: str, cache_dir: Path
) -> PageNamespace:
    """Of the chunks that an engine with this OffloadingConfig keeps in host memory, those of all its ranks together.

    `chunk_bytes` is the size of a chunk in host memory. Raises UnsupportedEngineError and UnsupportedModelError, with
    the reason.
    """
    folder = Path(checkpoint or config.model.name)
    if not folder.is_dir():
        raise UnsupportedEngineError(
            f"{folder} is not a folder, and vLLM does not say which revision of a model it serves; add the folder of "
            'its files to the tier: "checkpoint": "..."'
        )
    dtype = next(
        (known for known in KVDtype if known.value == config.model.dtype.removeprefix("torch.")), None
    )
    if dtype is None:
        raise UnsupportedEngineError(
            f"a KV cache of {config.model.dtype} is not supported; one of {', '.join(KVDtype)} is"
        )
    spec = spec_of_checkpoint(
        folder, AutoConfig.from_pretrained(folder).to_dict(), dtype, cache_dir=cache_dir
    )
    parallel = config.parallel
    layout = {
        "engine": f"vllm {supported_version(vllm.__version__).series}",
        "chunk_bytes": chunk_bytes,
        "cache": asdict(config.cache),
        "groups": [asdict(group) for group in config.groups],
        "worker_kv_bytes_per_block": config.worker_kv_bytes_per_block,
        "kv_cache_layout": config.kv_cache_layout,
        "canonical": config.canonical_layout,
        "replicated": config.replicated_layout,
        "dtype": dtype.value,
        "ranks": [parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size],
    }
    return PageNamespace(spec.digest, json.dumps(layout, sort_keys=True), salt=salt.encode())
