"""Runs the benchmark: stores a prefix, and asks each system about it at each budget and disk rate."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvstore_bench.codec.texts import default_sources
from kvstore_bench.recompute.tiers import Tier, use_tier
from kvstore_bench.reprefill.baselines import NAMES as BASELINES
from kvstore_bench.reprefill.baselines import Baselines
from kvstore_bench.reprefill.layerwise import Layerwise
from kvstore_bench.reprefill.ours import Cold, Reusing, store_prefix
from kvstore_bench.reprefill.prefix_kv import PrefixKV
from kvstore_bench.reprefill.prompts import Prompts, make_prompts
from kvstore_bench.reprefill.rows import Fidelity, Row, fidelity_of, row_of
from kvstore_client.settings import EXACT
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_service.calibration import Report
from kvstore_service.embedded import EmbeddedCluster
from kvstore_service.models import SMOLLM2, DType, load_model
from kvstore_service.settings import settings_of

OURS = ("contiguous", "contiguous-no-ahead", "contiguous-no-cache")
WHOLE = ("full", "cold")
"""Systems without a budget."""
RATES_Bps = {"unthrottled": None, "nvme": 3.5e9, "ssd": 550e6, "hdd": 160e6}
_COLD_QUESTIONS = 2
"""A prefill of 4,096 tokens takes most of a minute on two cores, and does not depend on the question or the disk."""
_MEMORY_BYTES, _DISK_BYTES = 2 << 30, 8 << 30


@dataclass(frozen=True, slots=True)
class Options:
    systems: Sequence[str] = ("contiguous", "impress", "as_h2o_lru", "full", "cold")
    budgets: Sequence[float] = (0.05, 0.1, 0.25, 0.5)
    rates: Sequence[str] = tuple(RATES_Bps)
    prefix_tokens: int = 4096
    questions: int = 21
    cache_share: float = 0.25
    """Cache of every system, as a share of the prefix's KV in memory."""
    probes: int = 1
    """Probe heads of `impress`."""
    dtype: DType = DType.FLOAT32
    encoding: str = EXACT


@dataclass(frozen=True, slots=True)
class Result:
    meta: dict[str, Any]
    rows: list[Row]


def run(options: Options, report: Report) -> Result:
    """Runs the benchmark. Raises ConfigurationError for options that cannot be measured."""
    _require(options)
    report.advance("start", 0, 2)
    model, tokenizer = load_model(SMOLLM2, options.dtype)
    prompts = make_prompts(default_sources()[0], tokenizer, options.prefix_tokens, options.questions)
    with (
        tempfile.TemporaryDirectory(prefix="kvstore-reprefill-") as folder,
        EmbeddedCluster(
            settings_of(
                memory=_MEMORY_BYTES, disk=_DISK_BYTES, data_dir=Path(folder, "nodes"), experiments=True
            )
        ) as cluster,
    ):
        stored_bytes = store_prefix(cluster.address, model, prompts, encoding=options.encoding)
        report.advance("start", 1, 2)
        bench = _Bench(options, model, prompts, cluster.address, Path(folder))
        report.advance("start", 2, 2)
        rows = list(bench.rows(report))
    return Result(_meta(options, prompts, stored_bytes), rows)


class _Bench:
    def __init__(
        self, options: Options, model: PreTrainedModel, prompts: Prompts, address: str, folder: Path
    ) -> None:
        self._options, self._model, self._prompts = options, model, prompts
        self._address = address
        kv = PrefixKV(model, prompts)
        self._exact = [kv.log_probabilities(question) for question in prompts.questions]
        self._baselines = Baselines(model, prompts, kv, folder, options.probes)

    def rows(self, report: Report) -> Iterator[Row]:
        options, questions = self._options, self._prompts.questions
        cells = [
            (rate, name, budget)
            for rate in options.rates
            for name in options.systems
            if name != "cold" or rate == options.rates[0]
            for budget in ([None] if name in WHOLE else options.budgets)
        ]
        judged: dict[tuple[str, float | None], Fidelity] = {}
        for number, (rate, name, budget) in enumerate(cells):
            report.advance("ask", number, len(cells))
            rate_Bps = RATES_Bps[rate]  # noqa: N806
            with closing(self._system(name, budget, rate_Bps)) as system:
                is_cold = isinstance(system, Cold)
                asked = [system.ask(q) for q in (questions[:_COLD_QUESTIONS] if is_cold else questions)]
                if not isinstance(system, Cold) and (name, budget) not in judged:
                    found = [system.log_probabilities(question) for question in questions]
                    judged[name, budget] = fidelity_of(questions, self._exact, found)
            yield row_of(
                asked,
                judged.get((name, budget)),
                model="SmolLM2-135M-Instruct",
                system=name,
                budget=budget,
                prefix_tokens=options.prefix_tokens,
                encoding=options.encoding if name in (*OURS, "full") else "raw",
                disk=rate,
                disk_bandwidth_Bps=rate_Bps,
            )
        report.advance("ask", len(cells), len(cells))

    def _system(self, name: str, budget: float | None, rate_Bps: float | None) -> Cold | Reusing | Layerwise:  # noqa: N803
        cache_bytes = self._options.cache_share * self._kv_bytes
        if name == "cold":
            return Cold(self._model, self._prompts)
        if name in BASELINES and budget is not None:
            return self._baselines.make(name, budget, cache_bytes, rate_Bps)
        use_tier(self._address, Tier("disk", rate_Bps or _FASTEST_BPS))
        settings: dict[str, Any] = {
            "accept": (self._options.encoding,),
            "frame_cache_bytes": 0 if name == "contiguous-no-cache" else int(cache_bytes),
            "budget_read_ahead": name != "contiguous-no-ahead",
        }
        return Reusing(self._address, self._model, self._prompts, budget, **settings)

    @property
    def _kv_bytes(self) -> int:
        config = self._model.config
        values = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return int(2 * values * self._options.prefix_tokens * self._model.dtype.itemsize)


_FASTEST_BPS = 1e11
"""A limit that no disk reaches: chunks stay on the disk, and reads are not slowed down."""


def _require(options: Options) -> None:
    known = (*OURS, *BASELINES, *WHOLE)
    for name in options.systems:
        if name not in known:
            raise ConfigurationError(f"there is no system {name!r}; systems are {', '.join(known)}")
    for rate in options.rates:
        if rate not in RATES_Bps:
            raise ConfigurationError(f"there is no disk {rate!r}; disks are {', '.join(RATES_Bps)}")
    for budget in options.budgets:
        if not 0 < budget <= 1:
            raise ConfigurationError(f"a budget of {budget}: expected a share above 0 and up to 1")
    if options.prefix_tokens % CHUNK_TOKENS or options.prefix_tokens < 2 * CHUNK_TOKENS:
        raise ConfigurationError(
            f"a prefix of {options.prefix_tokens} tokens is not two or more chunks of {CHUNK_TOKENS}"
        )


def _meta(options: Options, prompts: Prompts, stored_bytes: int) -> dict[str, Any]:
    return {
        "dtype": options.dtype,
        "stored_bytes": stored_bytes,
        "cache_share": options.cache_share,
        "impress_probe_heads": options.probes,
        "questions": {
            kind: sum(question.kind == kind for question in prompts.questions)
            for kind in dict.fromkeys(question.kind for question in prompts.questions)
        },
        "ttft_s": "seconds from the call to the first token, lookup, scoring and reading included; median",
        "bytes_read": "mean per question; of ours, key summaries included",
        "bytes_needed": "bytes of the KV that is attended to and was not cached; of impress, of its tokens alone",
        "tokens_read": "prefix tokens read, mean over layers and questions",
        "kl": "nats per judged token relative to attention to the whole prefix; mean over questions",
        "right": "share of the facts in the prefix that are told right",
    }
