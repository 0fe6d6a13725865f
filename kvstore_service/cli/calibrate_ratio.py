"""`kvstore calibrate --ratio`: asks for the measurement and shows it."""

from dataclasses import dataclass
from pathlib import Path

from kvstore_service.cli.bench.tables import require_outputs, require_packages, result_table
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.stages import Stages
from kvstore_service.models import DType, load_model

_TIERS = "dram,ssd,hdd"
_STAGES = {"start": "cluster and documents"} | {
    f"{stage}-{tier}": f"{label}, {tier}"
    for tier in ("dram", "ssd", "hdd", "disk")
    for stage, label in (("tune", "searching the ratio"), ("sweep", "a sweep beside it"))
}
_DIGITS = {"compute_ms": 3, "transfer_ms": 4, "over_best": 3}


@dataclass(frozen=True, slots=True)
class RatioArguments:
    """What was asked for; None: nothing."""

    tier: str | None
    selector: str | None
    drift: bool | None
    tokens: int | None
    repeats: int | None
    sweep: int | None
    data_dir: Path | None
    json_file: Path | None
    plot: Path | None


def calibrate_ratio(model: str, dtype: DType, model_id: str | None, asked: RatioArguments) -> None:
    require_packages("grpc_reflection", "psutil", "ray", "transformers")
    require_outputs(asked.json_file, asked.plot)
    from kvstore_client.recompute import Recompute
    from kvstore_client.settings import ClientSettings
    from kvstore_service.bench import write_results
    from kvstore_service.calibration.ratio import Options, plot_ratios, tune_tiers

    settings = ClientSettings()
    recompute = Recompute(
        asked.selector or settings.recompute_selector,
        drift=settings.recompute_drift if asked.drift is None else asked.drift,
    )
    options = Options(
        recompute,
        settings.cache_dir,
        [name.strip() for name in (asked.tier or _TIERS).split(",") if name.strip()],
        asked.tokens or 3072,
        asked.repeats or 3,
        asked.sweep or 0,
        asked.data_dir,
    )
    console = output()
    loaded, tokenizer = load_model(model, dtype)
    with Stages(console, _STAGES) as stages:
        result = tune_tiers(loaded, tokenizer, options, stages, model_id=model_id)
    write_results(result.rows, asked.json_file, result.meta)
    if asked.plot is not None:
        plot_ratios(result.rows, asked.plot)
    columns = {
        "tier": "tier", "t_c ms": "compute_ms", "t_i ms": "transfer_ms", "r0": "first_ratio", "ratio": "ratio",
        "TTFT s": "ttft_s", "full s": "full_ttft_s",
    }  # fmt: skip
    if options.sweep:
        columns |= {"best of sweep": "best_ratio", "its TTFT s": "best_ttft_s", "/ best": "over_best"}
    rows = [
        row | {"compute_ms": row["compute_s"] * 1e3, "transfer_ms": row["transfer_s"] * 1e3}
        for row in result.rows
    ]
    tuned = f"{recompute.selector}, {'with' if recompute.drift else 'without'} drift"
    print_table(result_table(f"tuned for {tuned}, {options.tokens} tokens reused", columns, rows, _DIGITS))
    console.print(f"kept in {result.path}: workers that start from now on use it", soft_wrap=True)
