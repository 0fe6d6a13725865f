"""The command line. Commands import their dependencies when they run, so that a plain install can show the help."""

import sys

import typer

from kvstore_api.printable import printable
from kvstore_codec.errors import ConfigurationError, FolderInUseError, KVStoreError
from kvstore_service.cli.calibrate import calibrate
from kvstore_service.cli.calibrations import calibrations
from kvstore_service.cli.credentials import credentials
from kvstore_service.cli.doctor import doctor
from kvstore_service.cli.drain import drain
from kvstore_service.cli.events import events
from kvstore_service.cli.evict import evict
from kvstore_service.cli.extensions import add_extensions
from kvstore_service.cli.ls import ls
from kvstore_service.cli.models import models
from kvstore_service.cli.pin import pin, unpin
from kvstore_service.cli.predict import predict
from kvstore_service.cli.probe import probe
from kvstore_service.cli.quota import quota
from kvstore_service.cli.repair import repair
from kvstore_service.cli.report import report
from kvstore_service.cli.selftest import selftest
from kvstore_service.cli.serve import serve
from kvstore_service.cli.status import status
from kvstore_service.cli.tenants import tenants
from kvstore_service.cli.throttle import throttle
from kvstore_service.cli.top import top
from kvstore_service.cli.verify import verify
from kvstore_service.signals import Stopped, StopSignals, end_by

app = typer.Typer(
    help="A distributed KV cache service for LLM inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_SERVICE = (
    serve, status, ls, pin, unpin, evict, quota, drain, repair, verify, throttle, predict, events, top, report,
    probe, selftest,
)  # fmt: skip
for command in (*_SERVICE, calibrations, doctor, calibrate):
    app.command()(command)
app.add_typer(models, name="models")
app.add_typer(credentials, name="credentials")
app.add_typer(tenants, name="tenants")
add_extensions(app)


def main() -> None:
    """Entry point of `kvstore`. An error of the project is printed as one line on stderr. The exit status is 2 for a
    wrong argument, option or setting, and 1 for other errors. A command that receives a stop signal cleans up and then
    ends by that signal, which shells show as 128 plus its number."""
    stop = StopSignals()
    try:
        stop.install()
        app()
    except KVStoreError as error:
        # A terminal sends a signal to all child processes too; the errors that their end causes are not reported.
        if stop.received is None:
            typer.echo(printable(f"kvstore: {error}"), err=True)
            sys.exit(_status(error))
        end_by(stop.received)
    except (Exception, SystemExit, Stopped):
        # Typer handles the signal only while it runs a command. C code that is interrupted by one may fail in a way of
        # its own: Python's import raises a TypeError.
        if stop.received is None:
            raise
        end_by(stop.received)


def _status(error: KVStoreError) -> int:
    # A folder that another process uses is not a wrong value: the same command works once that process has ended.
    wrong_value = isinstance(error, ConfigurationError) and not isinstance(error, FolderInUseError)
    return 2 if wrong_value else 1
