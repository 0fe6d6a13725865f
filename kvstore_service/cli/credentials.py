"""`kvstore credentials`."""

import json
import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstore_codec.errors import ConfigurationError
from kvstore_service.cli import options
from kvstore_service.cli.console import print_table

if TYPE_CHECKING:
    from kvstore_service.identity import Credential, Scope

_LIFETIME = re.compile(r"([1-9][0-9]{0,6})([smhdw])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

credentials = typer.Typer(
    help="Credentials of a cluster's callers, in the file that `kvstore serve --credentials` names.",
    no_args_is_help=True,
)

File = Annotated[
    Path, typer.Option("--file", envvar="KVSTORE_CREDENTIALS", help="The file with the credentials.")
]


@credentials.command()
def add(
    file: File,
    name: Annotated[str, typer.Argument(help="Name of the caller. Several credentials may have one name.")],
    tenant: Annotated[
        str, typer.Option(help="The caller's tenant; '' is the default tenant, and '*' every tenant.")
    ] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="data, admin, node or metrics; may be repeated.", show_default="data"),
    ] = None,
    expires: Annotated[
        str | None, typer.Option(help="Lifetime, such as 90d or 12h.", show_default="never")
    ] = None,
    subject: Annotated[
        str | None,
        typer.Option(help="Common or alternative name in the caller's certificate, instead of a token."),
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Add a credential, and print its token once. The file keeps only a digest of it. Running services accept the
    token within a second. To rotate a token: add a second credential of the same name, give its token to the caller,
    and revoke the first one by its --id."""
    from kvstore_service.identity import ALL_TENANTS, Credential, new_token
    from kvstore_service.identity.credential import new_id, token_digest
    from kvstore_service.identity.file import changing

    now_s = time.time()
    made, token = (new_id(), None) if subject is not None else new_token()
    credential = Credential(
        made,
        name,
        None if tenant == ALL_TENANTS else tenant,
        frozenset(map(_scope, scope or ["data"])),
        token_digest(token) if token is not None else None,
        subject,
        now_s,
        math.inf if expires is None else now_s + _lifetime_s(expires),
    )
    with changing(file) as known:
        known.append(credential)
    if json_output:
        typer.echo(json.dumps(_row(credential) | ({"token": token} if token else {}), indent=2))
        return
    if token is None:
        typer.echo(f"added credential {made} of {name}, for certificates with the subject {subject}")
        return
    # Only the token goes to stdout, so that `> file` keeps it and nothing else.
    typer.echo(
        f"added credential {made} of {name}; its token, for KVSTORE_TOKEN or KVSTORE_TOKEN_FILE:", err=True
    )
    typer.echo(token)


@credentials.command("list")
def list_credentials(file: File, json_output: options.Json = False) -> None:
    """List the credentials. Tokens cannot be shown, because they are not kept."""
    from rich.markup import escape
    from rich.table import Table

    from kvstore_service.identity.file import read_credentials

    rows = [_row(credential) for credential in read_credentials(file)]
    if json_output:
        typer.echo(json.dumps({"credentials": rows}, indent=2))
        return
    table = Table(
        "id", "name", "tenant", "scopes", "proof", "expires", title=escape(f"credentials in {file}")
    )
    for row in rows:
        table.add_row(
            row["id"],
            escape(row["name"]),
            escape(row["tenant"]) or "(default)",
            ", ".join(row["scopes"]),
            escape(f"certificate {row['subject']}") if "subject" in row else "token",
            row.get("expires", "never") + (" [red](expired)[/red]" if row["expired"] else ""),
        )
    print_table(table)


@credentials.command()
def revoke(
    file: File,
    name: Annotated[str | None, typer.Argument(help="All credentials of this name.")] = None,
    id_: Annotated[str | None, typer.Option("--id", help="Only the credential with this id.")] = None,
    json_output: options.Json = False,
) -> None:
    """Remove credentials. Running services refuse them within a second."""
    from kvstore_service.identity.file import changing, read_credentials

    if (name is None) == (id_ is None):
        raise ConfigurationError("name what to revoke by one of: NAME, --id")
    read_credentials(file)  # a file that is missing is not made
    with changing(file) as known:
        gone = [one for one in known if (one.name == name if name is not None else one.id == id_)]
        if not gone:
            raise ConfigurationError(f"{file} has no credential {name if name is not None else id_!r}")
        known[:] = [one for one in known if one not in gone]
    if json_output:
        typer.echo(json.dumps({"revoked": [_row(credential) for credential in gone]}, indent=2))
    else:
        typer.echo(f"revoked {', '.join(f'{one.id} of {one.name}' for one in gone)}")


def _row(credential: "Credential") -> dict[str, Any]:
    from kvstore_service.identity.document import fields

    row = fields(credential)
    row.pop("token_sha256", None)
    return row | {"expired": credential.expires_unix_s <= time.time()}


def _scope(text: str) -> "Scope":
    from kvstore_service.identity import Scope

    try:
        return Scope(text)
    except ValueError:
        raise ConfigurationError(f"{text!r} is not a scope; scopes are {', '.join(Scope)}") from None


def _lifetime_s(text: str) -> int:
    match = _LIFETIME.fullmatch(text)
    if match is None:
        raise ConfigurationError(
            f"--expires {text!r} is not a lifetime; write a number and s, m, h, d or w, for example 90d"
        )
    return int(match[1]) * _UNIT_S[match[2]]
