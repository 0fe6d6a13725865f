"""Checks of `kvstore doctor`: each tries one capability of this machine and says what to do if it is missing."""

from collections.abc import Callable, Iterator
from functools import partial

from kvstore_service.doctor import configuration, essentials, machine, services, video
from kvstore_service.doctor.finding import Check, Finding, missing
from kvstore_service.extensions import INSTALL, load_extensions

__all__ = ["OPTIONAL", "Check", "Finding", "checks", "examine"]

_NamedCheck = tuple[str, bool, Callable[[], Finding]]


# Name, whether the service needs it, and the check itself.
_CHECKS: tuple[_NamedCheck, ...] = (
    ("Python", False, machine.python),
    ("CPU and memory", False, machine.cpu_and_memory),
    ("PyTorch", False, machine.torch),
    ("CUDA", False, machine.cuda),
    ("codec", True, essentials.codec),
    ("client", True, essentials.client),
    ("HEVC on the CPU", False, video.hevc_cpu),
    ("NVDEC", False, video.nvdec),
    ("NVENC", False, video.nvenc),
    ("KVSTORE_* variables", False, configuration.variables),
    ("Ray", False, services.ray),
    ("Redis client", False, services.redis_client),
    ("Redis server", False, services.redis_server),
    ("Redis connection", False, services.redis_connection),
)


OPTIONAL = frozenset({"CUDA", "NVDEC", "NVENC", "Redis client", "Redis server"})
"""Names of checks whose failure needs no action: models run on the CPU, and the catalogue is a file. A failing Redis
connection is not among them, because it may be configured."""


def checks() -> tuple[_NamedCheck, ...]:
    """The service's own checks and those of other packages. These are asked for each time: they use this package
    themselves, so that neither can wait for the other while it is imported."""
    return (*_CHECKS, *_added_checks())


def examine() -> list[Check]:
    """Runs all checks, which takes seconds. A check that raises an exception counts as missing."""
    return [_run(name, check, essential=essential) for name, essential, check in checks()]


def _run(name: str, check: Callable[[], Finding], *, essential: bool) -> Check:
    try:
        found = check()
    except Exception as error:
        found = missing(
            f"the check failed: {type(error).__name__}: {error}",
            "Reinstall the package named there, or report a bug.",
        )
    return Check(name, found.available, found.detail, found.remedy, essential)


def _added_checks() -> Iterator[_NamedCheck]:
    """Checks that other packages provide. A package whose checks cannot be imported gives one failing check."""
    for extension in load_extensions("kvstore.checks"):
        if extension.reason:
            reason = f"its checks cannot be imported: {extension.reason}"
            yield extension.name, False, partial(missing, reason, f"To use them: {INSTALL}")
        else:
            yield from extension.value
