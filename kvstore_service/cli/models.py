"""`kvstore models`."""

import json
import time
from string import hexdigits
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_api.printable import printable
from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli import options

if TYPE_CHECKING:
    from kvstore_api.v1 import kvstore_pb2 as pb

models = typer.Typer(
    help="Models with a canary in the cluster: KV that every worker compares with its own before it reuses KV.",
    invoke_without_command=True,
)


@models.callback()
def list_models(
    context: typer.Context,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """List models with their canary, its age and the worker that made it, and the workers that were refused because
    their KV differs."""
    if context.invoked_subcommand is not None:
        return
    from kvstore_service.admin import ClusterAdmin
    from kvstore_service.listen import Address

    with ClusterAdmin(str(Address.parse(address))) as cluster:
        found = cluster.models()
    if json_output:
        typer.echo(json.dumps({"models": [_row(model) for model in found]}, indent=2))
    else:
        _print(address, found)


@models.command()
def replace(
    digest: Annotated[
        str, typer.Argument(help="Digest of the model, as `kvstore models` shows it; any unique beginning.")
    ],
    tenant: Annotated[
        str | None,
        typer.Option(
            help="The tenant whose canary it is, if the service has credentials and several have one."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    address: options.Address = DEFAULT_ADDRESS,
    json_output: options.Json = False,
) -> None:
    """Remove a model's canary, because the worker that made it was wrong. The next worker makes a new one, and stored
    chunks of the model are not used again."""
    from kvstore_service.admin import ClusterAdmin
    from kvstore_service.listen import Address

    if not set(digest) <= set(hexdigits):
        raise ConfigurationError(f"{digest!r} is not the beginning of a digest in hexadecimal digits")
    with ClusterAdmin(str(Address.parse(address))) as cluster:
        model = cluster.model(digest, tenant)
        name = printable(f"{model.origin.model_id or 'model'} ({model.model_digest.hex()[:12]})")
        if not yes:
            typer.confirm(f"Discard all stored chunks of {name}?", abort=True, err=True)
        generation = cluster.replace_canary(model.model_digest, model.tenant)
    if json_output:
        row = {"model_digest": model.model_digest.hex(), "generation": generation}
        typer.echo(json.dumps(row, indent=2))
    else:
        typer.echo(
            f"the canary of {name} is removed; its next worker makes a new one (generation {generation})"
        )


def _row(model: "pb.ModelInfo") -> dict[str, Any]:
    return {
        "model_digest": model.model_digest.hex(),
        "tenant": model.tenant,
        "generation": model.generation,
        "canary_bytes": model.size_bytes,
        "created_unix_s": model.created_unix_s,
        "origin": _origin(model.origin),
        "refusals": [
            {
                "origin": _origin(refusal.origin),
                "generation": refusal.generation,
                "message": refusal.message,
                "last_unix_s": refusal.last_unix_s,
                "times": refusal.times,
            }
            for refusal in model.refusals
        ],
    }


def _origin(origin: "pb.Origin") -> dict[str, Any]:
    return {
        "model_id": origin.model_id,
        "host": origin.host,
        "pid": origin.pid,
        "software": origin.software,
        "device": origin.device,
        "dtype": origin.dtype,
    }


def _print(address: str, found: "list[pb.ModelInfo]") -> None:
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    from kvstore_service.cli.console import print_table

    table = Table(title=escape(f"models at {address}"))
    for column in ("digest", "model", "dtype", "canary", "age", "made by", "generation", "refused"):
        table.add_column(column, justify="right" if column in ("canary", "age", "generation") else "left")
    notes: list[str] = []
    for model in found:
        there, digest = bool(model.size_bytes), model.model_digest.hex()[:12]
        table.add_row(
            digest,
            escape(model.origin.model_id),
            escape(model.origin.dtype),
            decimal(model.size_bytes) if there else "to be made",
            _age(model.created_unix_s) if there else "",
            escape(_who(model.origin)) if there else "",
            str(model.generation or ""),
            str(len(model.refusals) or ""),
        )
        notes += [
            f"{digest} refused {escape(_who(refusal.origin))}, {_age(refusal.last_unix_s)} ago, "
            f"{refusal.times} times: {escape(refusal.message)}. Its canary was made by {escape(_who(model.origin))}"
            for refusal in model.refusals
        ]
    table.caption = "\n".join(notes) or None
    print_table(table)


def _who(origin: "pb.Origin") -> str:
    return f"{origin.host} (pid {origin.pid}, {origin.device}, {origin.software})"


def _age(unix_s: float) -> str:
    seconds = max(0, int(time.time() - unix_s))
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{seconds // length_s} {unit}"
    return f"{seconds} s"
