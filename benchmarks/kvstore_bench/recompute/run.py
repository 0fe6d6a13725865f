"""Runs the benchmark: times all methods in each storage tier, then measures their fidelity."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvstore_bench.codec.texts import default_sources
from kvstore_bench.recompute.engine import Engine
from kvstore_bench.recompute.fidelity import judge
from kvstore_bench.recompute.methods import DEFAULT_METHODS, OURS, Cell, cells_of, methods_named
from kvstore_bench.recompute.prompts import DOCUMENT_TOKENS, Prompt, Prompts
from kvstore_bench.recompute.rows import Row, rows_of, tuned_row
from kvstore_bench.recompute.tiers import TIERS, Tier, limit_disks, tiers_named, use_tier
from kvstore_bench.recompute.times import Batches, Race, batches, race
from kvstore_bench.recompute.tuning import TunedTier, tune
from kvstore_client.settings import EXACT
from kvstore_codec.errors import ConfigurationError
from kvstore_service.calibration import Report
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.models import SMOLLM2, DType, load_model
from kvstore_service.settings import settings_of

DEFAULT_RATIOS = (0.0, 0.05, 0.15, 0.3, 1.0)
_MEMORY_BYTES, _DISK_BYTES = 1 << 30, 4 << 30


@dataclass(frozen=True, slots=True)
class Options:
    methods: Sequence[str] = DEFAULT_METHODS
    ratios: Sequence[float] = DEFAULT_RATIOS
    tiers: Sequence[str] = tuple(TIERS)
    prompts: int = 8
    """Number of prompts of each kind that fidelity is measured on."""
    tokens: int = 3072
    """Number of document tokens in the timed prompt."""
    batch: int = 16
    """Number of concurrent requests for throughput; 0 to measure none."""
    repeats: int = 5
    dtype: DType = DType.BFLOAT16
    """Dtype of the timed model. Fidelity is measured in float32."""
    quick: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    meta: dict[str, Any]
    rows: list[Row]
    tuned: list[Row]


@dataclass(frozen=True, slots=True)
class _Timed:
    tier: Tier
    race: Race
    batches: Batches | None
    tuned: TunedTier | None


def run(options: Options, report: Report) -> Result:
    """Runs the benchmark. Raises ConfigurationError for options that cannot be measured, StartupError when documents
    are not stored or not reused."""
    cells = cells_of(methods_named(options.methods), options.ratios)
    tiers = tiers_named(options.tiers)
    if options.tokens < 2 * DOCUMENT_TOKENS or options.tokens % DOCUMENT_TOKENS:
        raise ConfigurationError(
            f"{options.tokens} document tokens are not two or more documents of {DOCUMENT_TOKENS} tokens; use a "
            f"multiple of {DOCUMENT_TOKENS} from {2 * DOCUMENT_TOKENS} on"
        )
    sources = default_sources()
    report.advance("start", 0, 2)
    with (
        tempfile.TemporaryDirectory(prefix="kvstore-recompute-") as folder,
        EmbeddedCluster(
            settings_of(memory=_MEMORY_BYTES, disk=_DISK_BYTES, data_dir=Path(folder), experiments=True)
        ) as cluster,
    ):
        report.advance("start", 1, 2)
        torch.manual_seed(0)
        with closing(_engine(cluster.address, options.dtype)) as engine:
            report.advance("start", 2, 2)
            prompt = Prompts(sources, engine.tokenizer).timed(options.tokens)
            engine.store(Prompts(sources, engine.tokenizer), prompt)
            timed = [_time(engine, cluster.address, prompt, tier, cells, options, report) for tier in tiers]
        limit_disks(cluster.address, None)
        tuned_cells = [found.tuned.cell for found in timed if found.tuned is not None]
        with closing(_engine(cluster.address, DType.FLOAT32)) as engine:
            prompts = Prompts(sources, engine.tokenizer)
            judged = [*prompts.text(options.prompts), *prompts.documents(options.prompts)]
            fidelity = judge(engine, prompts, judged, list(dict.fromkeys([*cells, *tuned_cells])), report)
    rows: list[Row] = []
    for found in timed:
        name = found.tier.name
        rows += rows_of(name, found.race, found.batches, fidelity, options.tokens)
        if found.tuned is not None:
            only = [found.tuned.cell]
            rows += rows_of(name, found.tuned.race, None, fidelity, options.tokens, tuned=True, only=only)
    tuned = [
        tuned_row(found.tier.name, found.tuned, options.tokens) for found in timed if found.tuned is not None
    ]
    return Result(_meta(options, prompts, prompt, judged), rows, tuned)


def _engine(address: str, dtype: DType) -> Engine:
    """An engine that stores bit-exact KV, so that only effects of reuse are measured, not of lossy coding."""
    return Engine(address, *load_model(SMOLLM2, dtype), encoding=EXACT, accept=(EXACT,), floor=None)


def _time(
    engine: Engine,
    address: str,
    prompt: Prompt,
    tier: Tier,
    cells: Sequence[Cell],
    options: Options,
    report: Report,
) -> _Timed:
    def advance(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: report.advance(f"{stage}-{tier.name}", done, total)

    use_tier(address, tier)
    measured = race(engine, prompt, cells, options.repeats, advance("time"))
    found = batches(engine, prompt, cells, options.batch, advance("batch")) if options.batch else None
    ours = next((cell.method for cell in cells if cell.method.name == OURS), None)
    tuned = None
    if ours is not None:
        tuned = tune(engine, prompt, ours, options.repeats, advance("tune"), quick=options.quick)
    return _Timed(tier, measured, found, tuned)


def _meta(options: Options, prompts: Prompts, prompt: Prompt, judged: Sequence[Prompt]) -> dict[str, Any]:
    return {
        "model": "SmolLM2-135M-Instruct",
        "encoding": EXACT,
        "dtype": options.dtype,
        "judged_dtype": DType.FLOAT32,
        "sources": prompts.sources,
        "judged_prompts": {kind: sum(one.kind == kind for one in judged) for kind in ("text", "documents")},
        "timed_prompt": {"segments": prompt.segments, "tokens": prompt.ids.shape[1]},
        "batch": options.batch,
        "tier_disk_read_Bps": {tier.name: tier.disk_read_bytes_per_s for tier in tiers_named(options.tiers)},
        "quick": options.quick,
        "kl": "nats per token of the question, relative to full recompute; mean over prompts, the same in every tier",
        "closed": "share by which KL is lower than at ratio 0",
        "ttft_s": "seconds from the request to its first token, including lookup and fetch; median of the rounds",
        "full_ttft_s": "the same for the model without the service, in the same rounds",
        "prefilled": "the engine reused nothing, because a full prefill was faster at this ratio",
        "throughput_tok_s": "prompt tokens per second of a batch; our method at every ratio, the others at ratio 0.15",
    }
