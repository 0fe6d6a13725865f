"""`kvstore calibrate`."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from blake3 import blake3
from rich.table import Table

from kvstore_codec.errors import ConfigurationError, StartupError
from kvstore_codec.geometry import period_layers_of
from kvstore_service.cli.borrowed_options import flag_of, options_of
from kvstore_service.cli.console import output, print_table
from kvstore_service.cli.extensions import extension_command
from kvstore_service.cli.signatures import add_options
from kvstore_service.cli.stages import Stages
from kvstore_service.models import DType, load_model

if TYPE_CHECKING:
    from kvstore_codec.calibration import Calibration

_STATE = "calibration.state"
_TOKENS = 65536
_STAGES = {
    "read": "reading texts with the model",
    "fit": "fitting the transforms",
    "measure": "measuring steps on held-out text",
}


_CODEC, _RATIO = "How KV is coded (needs --text and --out)", "Recompute ratio (with --ratio)"


@add_options(options_of("tune", _RATIO))
def calibrate(
    model: Annotated[
        str | None, typer.Option(help="Required. A folder in transformers format, or smollm2.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text similar to the prompts; repeat for more files.", rich_help_panel=_CODEC
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for <digest>.kvcal and the state of a stopped run.", rich_help_panel=_CODEC
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most tokens of text to use; with --ratio: tokens of the documents in a prompt, a multiple of 512.",
            show_default="65536, with --ratio 3072",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Rank of the prediction from token embeddings; 0: no prediction.",
            show_default="128",
            rich_help_panel=_CODEC,
        ),
    ] = None,
    period_layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Number of consecutive layers coded together.",
            show_default="4, or fewer where layers differ in their sliding windows",
            rich_help_panel=_CODEC,
        ),
    ] = None,
    dtype: Annotated[
        DType, typer.Option(help="Dtype in which workers run the model; auto: as saved.")
    ] = DType.AUTO,
    model_id: Annotated[str | None, typer.Option(help="The model id, if workers set one.")] = None,
    publish: Annotated[
        str | None,
        typer.Option(help="host:port of a running cluster to publish the result to.", rich_help_panel=_CODEC),
    ] = None,
    ratio: Annotated[
        bool,
        typer.Option("--ratio", help="The former name of `kvstore tune`.", rich_help_panel=_RATIO),
    ] = False,
    **tune_options: object,
) -> None:
    """Fit a KV codec calibration for a model from sample text, and measure the fidelity of each rate. A stopped run
    continues where it stopped.

    With --ratio this is `kvstore tune`, with its options.
    """
    of_codec: dict[str, object] = {
        "--text": text, "--out": out, "--rank": rank, "--period-layers": period_layers, "--publish": publish,
    }  # fmt: skip
    if ratio:
        if model is None:
            raise _missing({"--model": model})
        _refuse(of_codec, "is an option of the codec and cannot be used with --ratio")
        given = {
            name: value for name, value in {"tokens": tokens, **tune_options}.items() if value is not None
        }
        extension_command("tune")(model, dtype=dtype, model_id=model_id, **given)
        return
    _refuse({flag_of(calibrate, name): value for name, value in tune_options.items()}, "needs --ratio")
    if model is None or not text or out is None:
        raise _missing({"--model": model, "--text": text, "--out": out})
    if find_spec("transformers") is None:
        raise StartupError(
            "`kvstore calibrate` needs transformers: pip install 'kvstore-service[transformers]'"
        )
    from kvstore_client.engines.transformers.calibrate import ObservedModel
    from kvstore_service.calibration import Options, plan_passages, write_calibration
    from kvstore_service.calibration import calibrate as run
    from kvstore_service.calibration.publish import publish_calibration
    from kvstore_service.cluster_stats import list_calibrations
    from kvstore_service.listen import Address

    contents = [_read(path) for path in text]
    _require_folder(out)
    if publish is not None:
        # Fails now, not after minutes of work.
        list_calibrations(str(Address.parse(publish)))
    console = output()
    loaded, tokenizer = load_model(model, dtype)
    observed = ObservedModel(loaded, model_id)
    ids = [_tokens(tokenizer, content) for content in contents]
    plan = plan_passages(ids, tokens or _TOKENS, observed.longest_text)
    provenance = {
        "model": observed.spec.model_id,
        "texts": [
            {"name": path.name, "blake3": blake3(content.encode()).hexdigest(), "tokens": len(tokens_of)}
            for path, content, tokens_of in zip(text, contents, ids, strict=True)
        ],
    }
    with Stages(console, _STAGES) as stages:
        calibration = run(
            observed,
            plan,
            Options(
                period_layers=period_layers or period_layers_of(observed.spec),
                rank=128 if rank is None else rank,
            ),
            stages,
            state=out / _STATE,
            provenance=provenance,
        )
    path = out / f"{calibration.digest.hex()}.kvcal"
    write_calibration(calibration, path)
    print_table(_table(calibration))
    console.print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
    if publish is not None:
        publish_calibration(calibration, publish)
        console.print(
            f"published at {publish}: workers with KVSTORE_ENCODING=medium-klt-pco use it from now on"
        )
    console.print(
        f"{out / _STATE} lets a run with another --rank skip reading the texts; delete it when done.",
        soft_wrap=True,
    )


def _missing(options: Mapping[str, object]) -> ConfigurationError:
    """The error that names all missing options."""
    names = ", ".join(name for name, value in options.items() if not value)
    return ConfigurationError(f"missing options: {names}; `kvstore calibrate` takes options and no arguments")


def _refuse(options: Mapping[str, object], reason: str) -> None:
    for name, value in options.items():
        if value is not None and value != []:
            raise typer.BadParameter(reason, param_hint=name)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error  # without the path
        raise ConfigurationError(f"cannot read the text {path}: {reason}") from error


def _require_folder(out: Path) -> None:
    """Creates the output folder and checks that it can be written, before minutes of work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot make the folder {out}: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise ConfigurationError(f"cannot write to {out}; choose another --out")


def _tokens(tokenizer: Any, content: str) -> Any:
    """Token ids, i64 [tokens]. Long texts are cut later, so the tokenizer's warning about length is suppressed."""
    import torch

    ids = tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


def _table(calibration: "Calibration") -> Table:
    table = Table(title="what each rate costs, on text held out", title_justify="left")
    for column in ("rate", "step", "KL (nats/token)"):
        table.add_column(column, justify="left" if column == "rate" else "right")
    measured = calibration.provenance["kl"]
    for rate, step in calibration.steps.items():
        table.add_row(rate, f"{step:.4g}", f"{measured[rate]:.4f}")
    return table
