"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Address = Annotated[str, typer.Option(envvar="KVSTORE_ADDRESS", help="host:port of the coordinator.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Chunks = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CHUNK...",
        help="content_id[+prefix_id], as `kvstore ls` shows them; any unique beginning.",
    ),
]
Tenant = Annotated[
    str | None,
    typer.Option(
        help="The tenant whose chunks are meant, if the service has credentials. '' is the default tenant."
    ),
]
ChunkFile = Annotated[
    Path | None, typer.Option("--from", help="A file with one chunk per line; - is standard input.")
]
