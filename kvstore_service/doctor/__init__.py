"""What this machine can do for the service, found out by trying, and for what is missing: why, and what to do."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import entry_points

from kvstore_service.doctor import configuration, essentials, machine, services, video
from kvstore_service.doctor.finding import Check, Finding, missing

__all__ = ["CHECKS", "Check", "Finding", "examine"]

_NamedCheck = tuple[str, bool, Callable[[], Finding]]


def _added() -> Iterator[_NamedCheck]:
    """Checks of other packages, by entry points of the group `kvstore.checks`."""
    for entry in entry_points(group="kvstore.checks"):
        with suppress(ImportError):
            yield from entry.load()


# Name, essential, and how to find out. Without what is essential nothing works.
CHECKS: tuple[_NamedCheck, ...] = (
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
    *_added(),
)


def examine() -> list[Check]:
    """Runs every check; takes seconds. Whatever goes wrong in a check is its result, never an exception."""
    return [_run(name, check, essential=essential) for name, essential, check in CHECKS]


def _run(name: str, check: Callable[[], Finding], *, essential: bool) -> Check:
    try:
        found = check()
    except Exception as error:
        found = missing(
            f"the check failed: {type(error).__name__}: {error}",
            "Install again what it names, or report it as a bug.",
        )
    return Check(name, found.available, found.detail, found.remedy, essential)
