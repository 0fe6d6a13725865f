"""Bits, fidelity and speed of encodings of a real model's KV, on text that its calibration has not seen.

    python benchmarks/codec.py --calibration F.kvcal --text A.txt --text B.txt --json R.json

Rows: {name, rate, transform, coder, bits_per_value, kl, kl_max, top1, ppl, encode_MBps, decode_MBps, exact_frames}.
Bits count every byte a chunk stores. KL (nats a token) is against the model's own exact KV, in bfloat16, over the
continuation; decode goes from bytes to KV, restoration included; MB are of that KV.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from blake3 import blake3
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer

from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_codec.calibration import Calibration, token_features
from kvstore_codec.codec import decode_frame, encode_chunk
from kvstore_codec.encoding import Encoding
from kvstore_codec.identity import CHUNK_TOKENS, chunk_ids
from kvstore_codec.klt_frames import KLT
from kvstore_codec.payload import PayloadKind
from kvstore_service.bench import write_results
from kvstore_service.models import load_smollm2, smollm2_folder

CONTEXT_TOKENS, CONTINUATION_TOKENS = 2048, 384
_ENCODINGS = (
    "exact-zstd,high-zstd,high-hevc-cpu,high-klt-pco,medium-klt-pco,low-klt-pco,high-klt-zstd,medium-klt-zstd,"
    "high-klt-hevc-cpu,medium-klt-hevc-cpu"
)


def main(
    calibration: Annotated[Path, typer.Option(help="What `kvstore calibrate` wrote for smollm2.")],
    text: Annotated[list[Path], typer.Option(help="Texts to measure on; none the calibration was made of.")],
    passages: Annotated[int, typer.Option(min=1, help="Of each text.")] = 2,
    encodings: Annotated[str, typer.Option(help="Comma-separated.")] = _ENCODINGS,
    random_ids: Annotated[
        bool, typer.Option("--random-ids", help="Also a passage of random token ids.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure encodings on a model's KV."""
    klt = KLT(Calibration.from_bytes(calibration.read_bytes()))
    seen = {entry["blake3"] for entry in klt.calibration.provenance["texts"]}
    if any(blake3(path.read_bytes()).hexdigest() in seen for path in text):
        raise typer.BadParameter("a text to measure on is one that the calibration was made of")
    model, _ = load_smollm2(torch.bfloat16)
    observed = ObservedModel(model)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    length = CONTEXT_TOKENS + CONTINUATION_TOKENS
    ids = [
        piece
        for path in text
        for piece in torch.tensor(tokenizer(path.read_text(), verbose=False).input_ids).split(length)[
            :passages
        ]
        if len(piece) == length
    ]
    if random_ids:
        ids.append(torch.randint(tokenizer.vocab_size, (length,), generator=torch.Generator().manual_seed(0)))
    texts = [_Text(observed, piece) for piece in track(ids, "prefilling")]
    rows = [
        _measure(observed, klt, Encoding.parse(name), texts)
        for name in track(encodings.split(","), "measuring")
    ]
    Console().print(_table(rows))
    write_results(rows, json_file, {"passages": len(texts), "calibration": klt.calibration.digest.hex()})


class _Text:
    """One passage with what the model says about its continuation from exact KV."""

    def __init__(self, observed: ObservedModel, ids: torch.Tensor) -> None:
        self.context, self.continuation = ids[:CONTEXT_TOKENS], ids[CONTEXT_TOKENS:]
        kv = observed.prefill(self.context)
        self.keys, self.values = kv.keys.bfloat16(), kv.values.bfloat16()
        self.reference = observed.log_probabilities(self.keys.float(), self.values.float(), self.continuation)
        self.embeddings = observed.model.get_input_embeddings()(self.context)


def _measure(observed: ObservedModel, klt: KLT, encoding: Encoding, texts: list[_Text]) -> dict[str, Any]:
    spec, calibration = observed.spec, klt.calibration
    size = exact = 0
    encode_s = decode_s = 0.0
    kl, top1, nll = [], [], []
    for text in texts:
        ids = chunk_ids(spec.digest, b"", text.context.tolist(), CHUNK_TOKENS)
        keys, values = torch.empty_like(text.keys), torch.empty_like(text.values)
        for index, chunk_id in enumerate(ids):
            cut = slice(index * CHUNK_TOKENS, (index + 1) * CHUNK_TOKENS)
            features = token_features(text.embeddings[cut]) if encoding.needs_calibration else None
            maps = klt if encoding.needs_calibration else None
            begin = time.perf_counter()
            chunk = encode_chunk(
                text.keys[:, :, cut],
                text.values[:, :, cut],
                spec=spec,
                chunk_id=chunk_id,
                encoding=encoding,
                klt=maps,
                features=features,
                sinks=calibration.sinks if index == 0 else 0,
            )
            encode_s += time.perf_counter() - begin
            size += chunk.size_bytes
            geometry = chunk.header.geometry
            exact += sum(part[0] != PayloadKind.KLT for part in chunk.parts[1:])
            begin = time.perf_counter()
            for frame, data in enumerate(chunk.parts[1:]):
                period, slot = divmod(frame, geometry.frames_per_period)
                layers, rows = geometry.layers_of(period), geometry.tokens_of(slot)
                place = np.s_[layers.start : layers.stop, :, cut.start + rows.start : cut.start + rows.stop]
                decode_frame(
                    chunk.header, frame, data, keys[place], values[place], klt=maps, features=features
                )
            decode_s += time.perf_counter() - begin
        said = observed.log_probabilities(keys.float(), values.float(), text.continuation)
        kl.append(float((text.reference.exp() * (text.reference - said)).sum(-1).mean()))
        top1.append(float((said.argmax(-1) == text.reference.argmax(-1)).float().mean()))
        nll.append(float(torch.nn.functional.nll_loss(said[:-1], text.continuation[1:])))
    count = sum(2 * text.keys.numel() for text in texts)
    return {
        "name": encoding.name,
        "rate": str(encoding.rate),
        "transform": str(encoding.transform),
        "coder": encoding.coder,
        "bits_per_value": 8 * size / count,
        "kl": sum(kl) / len(kl),
        "kl_max": max(kl),
        "top1": sum(top1) / len(top1),
        "ppl": float(np.exp(sum(nll) / len(nll))),
        "encode_MBps": 2 * count / encode_s / 1e6,
        "decode_MBps": 2 * count / decode_s / 1e6,
        "exact_frames": exact if encoding.needs_calibration else None,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="SmolLM2 KV")
    for column in ("encoding", "bits/value", "KL", "worst", "top-1", "ppl", "encode MB/s", "decode MB/s"):
        table.add_column(column, justify="left" if column == "encoding" else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['bits_per_value']:.3f}",
            f"{row['kl']:.4f}",
            f"{row['kl_max']:.4f}",
            f"{row['top1']:.3f}",
            f"{row['ppl']:.2f}",
            f"{row['encode_MBps']:.0f}",
            f"{row['decode_MBps']:.0f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
