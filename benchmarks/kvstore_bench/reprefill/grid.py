"""Measures every pair of budget and encoding, and what a budget of `auto` chooses among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kvstore_bench.codec.calibration import default_calibration, read_calibration, seen_digests
from kvstore_bench.codec.texts import default_sources, require_unseen, split
from kvstore_bench.recompute.tiers import Tier, use_tier
from kvstore_bench.reprefill.ours import Pair, Reusing, store_prefix
from kvstore_bench.reprefill.prefix_kv import PrefixKV
from kvstore_bench.reprefill.prompts import Prompts, make_prompts
from kvstore_bench.reprefill.rows import Fidelity, Row, fidelity_of, row_of
from kvstore_bench.reprefill.testbed import cluster_with_disk
from kvstore_bench.targets import at_most
from kvstore_client.cache_dir import default_cache_dir
from kvstore_client.engines.transformers.calibrate import ObservedModel
from kvstore_client.planning.losses import LossTable, PartLosses
from kvstore_client.settings import AUTO, EXACT
from kvstore_codec.encoding import Encoding, Rate
from kvstore_service.calibration import Report
from kvstore_service.calibration.publish import publish_calibration
from kvstore_service.models import SMOLLM2, DType, load_model

ENCODINGS = (EXACT, "high-klt-pco", "medium-klt-pco", "low-klt-pco")
BUDGETS = (0.05, 0.1, 0.25, 0.5)
RATES_Bps = {"unthrottled": 1e11, "ssd": 550e6, "hdd": 160e6, "network": 25e6}
"""The last one is a disk behind a link of 200 Mbit/s."""
_WARM_UP = 2
"""Questions before the measured ones: links are learned, and caches filled."""
_MOST_SLOWER = 1.05


@dataclass(frozen=True, slots=True)
class GridOptions:
    encodings: Sequence[str] = ENCODINGS
    budgets: Sequence[float] = BUDGETS
    """The whole prefix is measured in any case."""
    rates: Sequence[str] = tuple(RATES_Bps)
    prefix_tokens: int = 4096
    questions: int = 21
    timed: int = 9
    """Questions whose time is measured; KL is measured with all."""
    cache_share: float = 0.25
    dtype: DType = DType.BFLOAT16
    calibration: Path | None = None
    """For the encodings that need one; None: one is fitted to other documents."""
    keep: bool = False
    """Whether the measured losses are kept for budgets of `auto` on this machine."""
    quick: bool = False


@dataclass(frozen=True, slots=True)
class GridResult:
    meta: dict[str, Any]
    rows: list[Row]
    targets: list[Row]


def run_grid(options: GridOptions, report: Report) -> GridResult:
    """Measures the grid, on documents that the calibration was not fitted to."""
    report.advance("start", 0, 3)
    model, tokenizer = load_model(SMOLLM2, options.dtype)
    sources = [split(source) for source in default_sources()]
    prompts = make_prompts(sources[0][0], tokenizer, options.prefix_tokens, options.questions)
    with cluster_with_disk() as (address, folder):
        if any(Encoding.parse(name).needs_calibration for name in options.encodings):
            observed = ObservedModel(load_model(SMOLLM2, options.dtype)[0])
            calibration = (
                read_calibration(options.calibration, observed)
                if options.calibration
                else default_calibration(
                    observed, tokenizer, [fitted for _, fitted in sources], report, quick=options.quick
                )
            )
            require_unseen([sources[0][0]], seen_digests(calibration))
            publish_calibration(calibration, address)
        report.advance("start", 1, 3)
        store_prefix(address, model, prompts, encoding=",".join(options.encodings))
        report.advance("start", 2, 3)
        grid = _Grid(options, model, prompts, address, folder / "cache")
        report.advance("start", 3, 3)
        rows = list(grid.rows(report))
    return GridResult(grid.meta, rows, _targets(rows))


class _Grid:
    def __init__(
        self, options: GridOptions, model: PreTrainedModel, prompts: Prompts, address: str, cache_dir: Path
    ) -> None:
        self._options, self._model, self._prompts = options, model, prompts
        self._address, self._cache_dir = address, cache_dir
        kv = PrefixKV(model, prompts)
        self._exact = [kv.log_probabilities(question) for question in prompts.questions]
        config = model.config
        values = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        kv_bytes = 2 * values * options.prefix_tokens * model.dtype.itemsize
        self._cache_bytes = int(options.cache_share * kv_bytes)
        self.meta: dict[str, Any] = {
            "dtype": options.dtype,
            "cache_share": options.cache_share,
            "timed_questions": options.timed,
            "ttft_s": "seconds from the call to the first token, lookup, choosing and reading included; median",
            "kl": "nats per judged token relative to attention to the whole prefix, exactly; mean over questions; of "
            "auto, that of the pair it chose most often",
        }

    def rows(self, report: Report) -> Iterator[Row]:
        """The rows of all pairs, then those of `auto`, which needs to know what parts lose."""
        options = self._options
        pairs: list[Pair] = [
            (budget, name) for name in options.encodings for budget in (*options.budgets, None)
        ]
        floors = list(dict.fromkeys(self._rates_of_encodings()))
        total = len(pairs) + len(floors)
        fidelity: dict[Pair, Fidelity] = {}
        for number, pair in enumerate(pairs):
            report.advance("ask", number, total)
            with closing(self._system(pair)) as system:
                fidelity[pair] = self._fidelity(system)
                yield from self._timed(system, fidelity, None)
        self._keep_losses(fidelity)
        for number, floor in enumerate(floors, len(pairs)):
            report.advance("ask", number, total)
            with closing(self._automatic(floor)) as system:
                yield from self._timed(system, fidelity, floor)
        report.advance("ask", total, total)

    def _timed(self, system: Reusing, fidelity: dict[Pair, Fidelity], floor: Rate | None) -> Iterator[Row]:
        """A row for each disk. The cache is empty before the questions that warm it up."""
        options, questions = self._options, self._prompts.questions
        for rate in options.rates:
            use_tier(self._address, Tier("disk", RATES_Bps[rate]))
            system.forget()
            for question in questions[-_WARM_UP:]:
                system.ask(question)
            asked, choices = [], Counter[Pair]()
            for question in questions[: options.timed]:
                asked.append(system.ask(question))
                choices[system.read] += 1
            (budget, encoding), times = choices.most_common(1)[0]
            yield row_of(
                asked,
                fidelity.get((budget, encoding)),
                model="SmolLM2-135M-Instruct",
                system="pair" if floor is None else AUTO,
                budget=budget,
                prefix_tokens=options.prefix_tokens,
                encoding=encoding,
                disk=rate,
                disk_bandwidth_Bps=RATES_Bps[rate],
                floor=floor,
                chosen_share=times / choices.total(),
            )

    def _fidelity(self, system: Reusing) -> Fidelity:
        questions = self._prompts.questions
        return fidelity_of(
            questions, self._exact, [system.log_probabilities(question) for question in questions]
        )

    def _keep_losses(self, fidelity: dict[Pair, Fidelity]) -> None:
        """Let `auto` know what parts of a prefix lose: what they lose in the most faithful encoding."""
        name = self._options.encodings[0]
        whole = fidelity[None, name].kl
        losses = PartLosses.of(
            (budget, max(0.0, found.kl - whole))
            for (budget, encoding), found in fidelity.items()
            if encoding == name and budget is not None
        )
        weights = ObservedModel(self._model).spec.weights_digest
        provenance = {"encoding": name, "prefix_tokens": self._options.prefix_tokens}
        for folder in (self._cache_dir, *([default_cache_dir()] if self._options.keep else [])):
            LossTable(folder).save(weights, losses, provenance)

    def _system(self, pair: Pair) -> Reusing:
        budget, encoding = pair
        return Reusing(
            self._address, self._model, self._prompts, budget,
            accept=(encoding,), frame_cache_bytes=self._cache_bytes,
        )  # fmt: skip

    def _automatic(self, floor: Rate) -> Reusing:
        return Reusing(
            self._address, self._model, self._prompts, AUTO,
            floor=floor, fetch_policy="adaptive", cache_dir=self._cache_dir, frame_cache_bytes=self._cache_bytes,
        )  # fmt: skip

    def _rates_of_encodings(self) -> Iterator[Rate]:
        for name in self._options.encodings:
            rate = Encoding.parse(name).rate
            if isinstance(rate, Rate):
                yield rate


def _targets(rows: Sequence[Row]) -> list[Row]:
    """The time of `auto`, and of the pair that it chose, relative to the quickest pair with no higher KL than the floor
    or the chosen pair."""
    found = []
    for chosen in rows:
        if chosen["system"] != AUTO:
            continue
        limit = max(chosen["floor"].loss, chosen["kl"] or 0.0)
        pairs = [r for r in rows if (r["system"], r["disk"]) == ("pair", chosen["disk"])]
        best = min((r for r in pairs if r["kl"] <= limit), key=lambda r: r["ttft_s"])
        where = f"{chosen['disk']}, floor {chosen['floor']}: {_told(chosen)}, best {_told(best)}"
        same = [r for r in pairs if _pair(r) == _pair(chosen)]
        for what, row in (("auto", chosen), *(("the pair that auto chose", row) for row in same)):
            slower = row["ttft_s"] / best["ttft_s"]
            found.append(at_most(f"TTFT of {what} relative to the best pair", where, slower, _MOST_SLOWER))
    return found


def _pair(row: Row) -> tuple[Any, Any]:
    return row["budget"], row["encoding"]


def _told(row: Row) -> str:
    share = "all" if row["budget"] is None else f"{row['budget']:.0%}"
    return f"{share} in {row['encoding']}"
