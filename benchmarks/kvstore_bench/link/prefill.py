"""Process that prefills the documents, stores their KV in all encodings, and codes it with CacheGen.

`python -m kvstore_bench.link.prefill`; see `orders`.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from kvstore_bench.codec import cachegen
from kvstore_bench.codec.calibration import default_calibration, seen_digests
from kvstore_bench.codec.texts import require_unseen
from kvstore_bench.link.orders import Answers, serve
from kvstore_bench.link.prompts import Prompt, prompts, sources
from kvstore_client import connect
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import StartupError
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_service.calibration import publish
from kvstore_service.cluster_stats import cluster_stats
from kvstore_service.models import load_smollm2

_STORE_TIMEOUT_S = 600.0


def cachegen_file(folder: str, tokens: int) -> Path:
    """File with the KV of a document after a round trip through CacheGen: `keys` after RoPE, `values`."""
    return Path(folder, f"cachegen-{tokens}.safetensors")


class _Prefill:
    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self._measured, self._fitted = sources()

    def store(
        self,
        address: str,
        dtype: str,
        tokens: list[int],
        encodings: list[str],
        cachegen_folder: str | None,
        quick: bool,
    ) -> dict[str, Any]:
        """Stores one document of each length in `tokens`. Returns {calibration, chunks, cachegen_bytes: [of each
        document]}."""
        _, tokenizer = load_smollm2(getattr(torch, dtype))
        documents = prompts(self._measured, tokenizer, tokens)
        calibration = None
        if any(Encoding.parse(name).needs_calibration for name in encodings):
            calibration = self._publish_calibration(address, dtype, quick)
        model, _ = load_smollm2(getattr(torch, dtype))
        chunks = self._store(model, address, documents, encodings)
        sizes = []
        for index, tokens_ in enumerate(tokens if cachegen_folder is not None else []):
            self._answers.advance("cachegen", index, len(tokens))
            sizes.append(_cachegen(model, documents[tokens_], cachegen_file(str(cachegen_folder), tokens_)))
            self._answers.advance("cachegen", index + 1, len(tokens))
        return {"calibration": calibration, "chunks": chunks, "cachegen_bytes": sizes}

    def _publish_calibration(self, address: str, dtype: str, quick: bool) -> str:
        model, tokenizer = load_smollm2(getattr(torch, dtype))
        observed = ObservedModel(model)
        calibration = default_calibration(observed, tokenizer, self._fitted, self._answers, quick=quick)
        require_unseen(self._measured, seen_digests(calibration))
        return publish.publish_calibration(calibration, address).hex()

    def _store(
        self, model: PreTrainedModel, address: str, documents: dict[int, Prompt], encodings: list[str]
    ) -> int:
        """Stores the documents. Returns the number of stored variants of chunks. Raises StartupError if any is
        missing."""
        if not encodings:
            return 0
        with connect(
            address,
            encoding=",".join(encodings),
            put_timeout_s=_STORE_TIMEOUT_S,
            close_timeout_s=_STORE_TIMEOUT_S,
        ) as client:
            cached = CachedModel(model, client)
            client.prepare(cached.spec).result()
            for index, prompt in enumerate(documents.values()):
                self._answers.advance("store", index, len(documents))
                cached.generate(prompt.document.unsqueeze(0), max_new_tokens=1, do_sample=False)
                client.store.flush()
            cached.close()
            counters = client.metrics.snapshot()
        self._answers.advance("store", len(documents), len(documents))
        stored = sum(node.stats.chunks for node in cluster_stats(address).nodes)
        wanted = len(encodings) * sum(tokens // CHUNK_TOKENS for tokens in documents)
        if stored < wanted:
            raise StartupError(
                f"only {stored} of {wanted} variants of the documents' chunks are stored; the client counted {counters}"
            )
        return stored


@torch.no_grad()
def _cachegen(model: PreTrainedModel, prompt: Prompt, file: Path) -> int:
    """Codes a document with CacheGen. Writes the decoded KV to `file`. Returns the bytes that LMCache would
    transfer."""
    cache = DynamicCache()
    model(prompt.document.unsqueeze(0), past_key_values=cache, use_cache=True, logits_to_keep=1)
    keys = torch.stack([layer.keys[0] for layer in cache.layers])
    values = torch.stack([layer.values[0] for layer in cache.layers])
    # CacheGen codes half precision.
    given = [(keys.to(torch.bfloat16), values.to(torch.bfloat16))]
    ((keys, values, row),) = cachegen.round_trip(given, "default", CHUNK_TOKENS)
    dtype = model.dtype
    save_file({"keys": keys.to(dtype).contiguous(), "values": values.to(dtype).contiguous()}, file)
    return int(row["total_bytes"])


if __name__ == "__main__":
    logging.disable_progress_bar()
    answers = Answers()
    serve({"store": _Prefill(answers).store}, answers)
