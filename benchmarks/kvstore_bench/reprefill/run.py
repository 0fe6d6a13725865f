"""Runs the benchmark: stores a prefix, and asks each system about it at each budget and disk rate."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvstore_bench.codec.texts import default_sources
from kvstore_bench.models import model_folder
from kvstore_bench.recompute.tiers import Tier, use_tier
from kvstore_bench.reprefill.baselines import NAMES as BASELINES
from kvstore_bench.reprefill.baselines import Baselines
from kvstore_bench.reprefill.disks import BALANCES, DISKS, RATES_Bps, balanced_rate, require_disks
from kvstore_bench.reprefill.layerwise import Layerwise
from kvstore_bench.reprefill.ours import Cold, Reusing, store_prefix
from kvstore_bench.reprefill.prefix_kv import PrefixKV
from kvstore_bench.reprefill.prompts import Prompts, make_prompts
from kvstore_bench.reprefill.rows import Fidelity, Row, fidelity_of, row_of
from kvstore_bench.reprefill.systems import Asked
from kvstore_bench.reprefill.testbed import cluster_with_disk
from kvstore_bench.reprefill.variants import OURS, Variant
from kvstore_codec.errors import ConfigurationError, StartupError
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_service.calibration import Report
from kvstore_service.models import SMOLLM2, DType, load_model

WHOLE = ("full", "cold")
"""Systems without a budget."""
_TIMED = {"cold": 2, "full": 7, "as_h2o_lru": 7, "as_h2o_lfu": 7}
"""Questions that are timed of systems that prefill or read all of the prefix for each question, whatever is asked; of
other systems all are. A prefill of 4,096 tokens takes up to a minute on two cores, and a read several seconds."""
_FASTEST_BPS = 1e11
"""A limit that no disk reaches: chunks stay on the disk, and reads are not slowed down."""


@dataclass(frozen=True, slots=True)
class Options:
    systems: Sequence[str] = ("contiguous", "impress", "as_h2o_lru", "full", "cold")
    budgets: Sequence[float] = (0.05, 0.1, 0.25, 0.5)
    disks: Sequence[str] = DISKS
    prefix_tokens: int = 4096
    questions: int = 21
    cache_share: float = 0.25
    """Cache of every system, as a share of the prefix's KV in memory."""
    probes: int = 1
    """Probe heads of `impress`."""
    dtype: DType = DType.FLOAT32
    encoding: str = "exact-zstd@16x2"
    model: str = SMOLLM2
    """SMOLLM2, QWEN or a model's folder."""
    minutes: float | None = None
    """No row is begun after this time; None: all rows are measured."""


@dataclass(frozen=True, slots=True)
class Result:
    meta: dict[str, Any]
    rows: list[Row]


def run(options: Options, report: Report) -> Result:
    """Runs the benchmark. An interrupt ends it, and the rows that are measured by then are returned. Raises
    ConfigurationError for options that cannot be measured."""
    _require(options)
    report.advance("start", 0, 3)
    model, tokenizer = load_model(str(model_folder(options.model)), options.dtype)
    prompts = make_prompts(default_sources()[0], tokenizer, options.prefix_tokens, options.questions)
    with cluster_with_disk() as (address, folder):
        report.advance("start", 1, 3)
        stored = _stored(address, model, prompts, options)
        report.advance("start", 2, 3)
        bench = _Bench(options, model, prompts, address, folder)
        report.advance("start", 3, 3)
        rows: list[Row] = []
        try:
            rows.extend(bench.rows(report))
        except KeyboardInterrupt:
            if not rows:
                raise
            report.note(f"stopped: {len(rows)} rows were measured")
    return Result(_meta(options, prompts, stored, bench.rates), rows)


def _stored(address: str, model: PreTrainedModel, prompts: Prompts, options: Options) -> dict[str, int]:
    """Stores the prefix as each of our systems reads it. Returns its stored bytes by encoding."""
    asked = [variant for name, variant in OURS.items() if name in options.systems]
    stored: dict[str, int] = {}
    for variant in [Variant(), *asked]:
        name = variant.encoding(options.encoding)
        if name not in stored:
            stored[name] = store_prefix(address, model, prompts, encoding=name, accept=(name,))
    return stored


class _Bench:
    def __init__(
        self, options: Options, model: PreTrainedModel, prompts: Prompts, address: str, folder: Path
    ) -> None:
        self._options, self._model, self._prompts = options, model, prompts
        self._address = address
        kv = PrefixKV(model, prompts)
        self._exact = [kv.log_probabilities(question) for question in prompts.questions]
        self._baselines = Baselines(model, prompts, kv, folder, options.probes)
        self.rates = dict(RATES_Bps)
        """Rate of each disk, bytes/s, as far as it is known; None: not limited."""

    def rows(self, report: Report) -> Iterator[Row]:
        options = self._options
        cells = list(_cells(options))
        model = model_folder(options.model).resolve().name
        began_s = time.monotonic()
        judged: dict[tuple[str, float | None], Fidelity] = {}
        for number, (disk, name, budget) in enumerate(cells):
            report.advance("ask", number, len(cells))
            if options.minutes is not None and time.monotonic() - began_s > 60 * options.minutes:
                report.note(f"stopped after {options.minutes:g} minutes: {number} rows were measured")
                return
            rate = self._rate(disk, report)
            questions = self._prompts.questions
            try:
                with closing(self._system(name, budget, rate)) as system:
                    asked = [system.ask(question) for question in questions[: _TIMED.get(name)]]
                    if not isinstance(system, Cold) and (name, budget) not in judged:
                        found = [system.log_probabilities(question) for question in questions]
                        judged[name, budget] = fidelity_of(questions, self._exact, found)
            except StartupError as error:  # the other rows are worth having
                report.note(f"{name} at a budget of {budget} is left out: {error}")
                continue
            yield row_of(
                asked,
                judged.get((name, budget)),
                model=model,
                system=name,
                budget=budget,
                prefix_tokens=options.prefix_tokens,
                encoding=self._encoding(name),
                disk=disk,
                disk_bandwidth_Bps=rate,
            )
        report.advance("ask", len(cells), len(cells))

    def _rate(self, disk: str, report: Report) -> float | None:
        """The disk's rate. That of a balanced disk is measured when it is asked for the first time."""
        if disk not in self.rates:
            balance, budget = BALANCES[disk], min(self._options.budgets)

            def ask(rate: float | None) -> list[Asked]:
                with closing(self._system(balance.system, budget, rate)) as system:
                    return [system.ask(question) for question in self._prompts.questions]

            self.rates[disk] = rate = balanced_rate(balance, ask)
            report.note(f"the {disk} disk reads {rate / 1e6:.0f} MB/s")
        return self.rates[disk]

    def _system(self, name: str, budget: float | None, rate: float | None) -> Cold | Reusing | Layerwise:
        cache_bytes = self._options.cache_share * self._kv_bytes
        if name == "cold":
            return Cold(self._model, self._prompts)
        if name in BASELINES and budget is not None:
            return self._baselines.make(name, budget, cache_bytes, rate)
        use_tier(self._address, Tier("disk", rate or _FASTEST_BPS))
        variant = OURS.get(name, Variant())
        settings: dict[str, Any] = {
            "accept": (self._encoding(name),),
            "frame_cache_bytes": int(cache_bytes) if variant.caches else 0,
            "budget_read_ahead": variant.read_ahead,
        }
        return Reusing(self._address, self._model, self._prompts, budget, **settings)

    def _encoding(self, name: str) -> str:
        """How the prefix that the system reads is stored."""
        if name in (*BASELINES, "cold"):
            return "raw"
        return OURS.get(name, Variant()).encoding(self._options.encoding)

    @property
    def _kv_bytes(self) -> int:
        config = self._model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        values = config.num_hidden_layers * config.num_key_value_heads * head_dim
        return int(2 * values * self._options.prefix_tokens * self._model.dtype.itemsize)


def _cells(options: Options) -> Iterator[tuple[str, str, float | None]]:
    """Disk, system and budget of each row. Systems without a budget come once on each disk, and `cold` once."""
    for disk in options.disks:
        for number, budget in enumerate(options.budgets):
            for name in options.systems:
                if name not in WHOLE:
                    yield disk, name, budget
                elif number == 0 and (name != "cold" or disk == options.disks[0]):
                    yield disk, name, None


def _require(options: Options) -> None:
    known = (*OURS, *BASELINES, *WHOLE)
    for name in options.systems:
        if name not in known:
            raise ConfigurationError(f"there is no system {name!r}; systems are {', '.join(known)}")
    require_disks(options.disks)
    for budget in options.budgets:
        if not 0 < budget <= 1:
            raise ConfigurationError(f"a budget of {budget}: expected a share above 0 and up to 1")
    if options.prefix_tokens % CHUNK_TOKENS or options.prefix_tokens < 2 * CHUNK_TOKENS:
        raise ConfigurationError(
            f"a prefix of {options.prefix_tokens} tokens is not two or more chunks of {CHUNK_TOKENS}"
        )


def _meta(
    options: Options, prompts: Prompts, stored: dict[str, int], rates: dict[str, float | None]
) -> dict[str, Any]:
    return {
        "dtype": options.dtype,
        "stored_bytes": stored,
        "cache_share": options.cache_share,
        "impress_probe_heads": options.probes,
        "disk_bandwidth_Bps": {disk: rates[disk] for disk in options.disks if disk in rates},
        "questions": {
            kind: sum(question.kind == kind for question in prompts.questions)
            for kind in dict.fromkeys(question.kind for question in prompts.questions)
        },
        "ttft_s": "seconds from the call to the first token, lookup, scoring and reading included; median",
        "bytes_read": "mean per question, whole disk blocks; of ours, what the node's disk read, and key summaries",
        "bytes_needed": "bytes of the KV that is attended to and was not cached; of impress, of its tokens alone",
        "summary_bytes": "part of bytes_read: key summaries, which a process reads once, with its first question",
        "frame_amplification": "bytes_read without summaries / bytes_needed: what each further question reads",
        "tokens_read": "prefix tokens read, mean over layers and questions",
        "idle_compute_fraction": "share of the time in which the model waits for bytes or for the lookup",
        "idle_io_fraction": "share of the time in which the disk reads nothing; limited, bytes_read / rate",
        "kl": "nats per judged token relative to attention to the whole prefix; mean over questions",
        "right": "share of the facts in the prefix that are told right",
    }
