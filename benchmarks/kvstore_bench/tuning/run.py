"""Tunes the recompute ratios that workers of a model use."""

import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvstore_bench.codec.texts import default_sources
from kvstore_bench.recompute.engine import Engine
from kvstore_bench.recompute.prompts import DOCUMENT_TOKENS, Prompt, Prompts, orders
from kvstore_bench.recompute.tiers import tiers_named, use_tier
from kvstore_bench.tuning.rounds import Rounds
from kvstore_bench.tuning.tiers import TIERS
from kvstore_bench.tuning.tune import MOST_RATIO, TunedTier, tune
from kvstore_client.engines.transformers.decoder import Decoder
from kvstore_client.engines.transformers.spec import spec_of
from kvstore_client.recompute import Recompute
from kvstore_client.recompute.tuned import TunedRatios
from kvstore_client.recompute.tuning import LEAST_RATIO
from kvstore_client.settings import EXACT
from kvstore_codec.errors import ConfigurationError, StartupError
from kvstore_codec.model_spec import ModelSpec
from kvstore_service.calibration.run import Report
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.settings import settings_of

_PROMPTS = 3
_ROOM = 2
"""Capacity of a tier, as a multiple of the documents' bytes."""
_LEAST_BYTES = 256 << 20

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Options:
    recompute: Recompute
    """All parameters except the ratio."""
    cache_dir: Path
    """Folder where workers look for tuned ratios."""
    tiers: Sequence[str] = ("dram", "ssd", "hdd")
    tokens: int = 3072
    """tokens of the documents in each prompt"""
    repeats: int = 3
    sweep: int = 0
    """number of additional ratios to measure; 0 means none"""
    data_dir: Path | None = None
    """folder on the disk to measure"""


@dataclass(frozen=True, slots=True)
class Result:
    rows: list[Row]
    meta: Row
    path: Path
    """File with the tuned ratios."""


def tune_tiers(
    model: PreTrainedModel, tokenizer: Any, options: Options, report: Report, *, model_id: str | None = None
) -> Result:
    """Tunes each tier, and saves its ratio as soon as it is found. Raises ConfigurationError for invalid options,
    UnsupportedModelError for a model whose text can be reused only at its original position, and StartupError for other
    failures."""
    tiers = tiers_named(options.tiers, TIERS)
    Decoder(model)
    spec = spec_of(model, model_id)
    report.advance("start", 0, 3)
    made = Prompts(default_sources(), tokenizer)
    prompt = _prompt(made, model, options.tokens)
    report.advance("start", 1, 3)
    room = max(_LEAST_BYTES, _ROOM * options.tokens * spec.kv_bytes_per_token)
    ratios = TunedRatios(options.cache_dir)
    rows: list[Row] = []
    with (
        _folder(options.data_dir) as folder,
        EmbeddedCluster(
            settings_of(memory=room, disk=2 * room, data_dir=Path(folder), experiments=True)
        ) as cluster,
    ):
        report.advance("start", 2, 3)
        # Without a planner: the ratio is measured even where a full prefill is faster.
        engine = Engine(
            cluster.address, model, tokenizer,
            model_id=model_id, encoding=EXACT, accept=(EXACT,), floor=None, fetch_policy="fixed",
        )  # fmt: skip
        with closing(engine):
            engine.store(made, prompt)
            report.advance("start", 3, 3)
            prompts = [prompt.ordered(order) for order in orders(len(prompt.documents), _PROMPTS)]
            rounds = Rounds(engine, prompts, options.recompute, options.repeats)
            for tier in tiers:
                use_tier(cluster.address, tier)
                found = tune(
                    rounds,
                    options.sweep,
                    partial(report.advance, f"tune-{tier.name}"),
                    partial(report.advance, f"sweep-{tier.name}"),
                )
                _keep(ratios, spec.digest, tier.name, found)
                rows.append(_row(tier.name, found))
    return Result(rows, _meta(options, spec, prompt), ratios.path(spec.digest))


def _prompt(made: Prompts, model: PreTrainedModel, tokens: int) -> Prompt:
    if tokens < 2 * DOCUMENT_TOKENS or tokens % DOCUMENT_TOKENS:
        raise ConfigurationError(
            f"cannot use {tokens} tokens: documents have {DOCUMENT_TOKENS}, so give a multiple of that, at least two"
        )
    prompt = made.timed(tokens)
    asked, longest = prompt.ids.shape[1], model.config.max_position_embeddings
    if asked >= longest:
        raise ConfigurationError(
            f"a prompt of {asked} tokens is too long for the model, which supports {longest}; give fewer --tokens"
        )
    return prompt


def _folder(parent: Path | None) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="kvstore-ratio-", dir=parent)
    except OSError as error:
        raise ConfigurationError(
            f"cannot store chunks in the folder {parent or tempfile.gettempdir()}: {error.strerror}"
        ) from error


def _keep(ratios: TunedRatios, model_digest: bytes, tier: str, found: TunedTier) -> None:
    try:
        ratios.save(model_digest, tier, found.tuned)
    except OSError as error:
        raise StartupError(
            f"cannot save the ratio {found.tuned.ratio:.3f} of {tier} in {ratios.path(model_digest).parent}: "
            f"{error.strerror}; set KVSTORE_CACHE_DIR to a writable folder"
        ) from error


def _row(tier: str, found: TunedTier) -> Row:
    best_ratio, best_ttft_s = found.best or (None, None)
    return {
        "tier": tier,
        "compute_s": found.costs.compute_s,
        "transfer_s": found.costs.transfer_s,
        "first_ratio": found.first,
        "ratio": found.tuned.ratio,
        "ttft_s": found.ttft_s,
        "full_ttft_s": found.costs.full_ttft_s,
        "best_ratio": best_ratio,
        "best_ttft_s": best_ttft_s,
        "over_best": None if best_ttft_s is None else found.ttft_s / best_ttft_s,
        "measured": [list(point) for point in found.tuned.measurements],
        "sweep": [list(point) for point in found.sweep],
    }


def _meta(options: Options, spec: ModelSpec, prompt: Prompt) -> Row:
    return {
        "model": spec.model_id,
        "dtype": spec.dtype,
        "selector": options.recompute.selector,
        "drift": options.recompute.drift,
        "prompt": {"segments": prompt.segments, "tokens": prompt.ids.shape[1], "orders": _PROMPTS},
        "repeats": options.repeats,
        "bounds": [LEAST_RATIO, MOST_RATIO],
        "tiers": {tier.name: tier.disk_read_bytes_per_s for tier in tiers_named(options.tiers, TIERS)},
        "compute_s": "seconds per token of a prompt that is computed completely",
        "transfer_s": "seconds per token of the documents that are fetched, without recompute",
        "ttft_s": "mean of the prompts' medians, lookup and fetch included, in the same rounds as the sweep",
        "measured": "[ratio, seconds] of the search, each in the same rounds as the first ratio",
        "tier_rates": "bytes per second that the disk is limited to; null: in memory",
    }
