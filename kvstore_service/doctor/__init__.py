"""What this machine can do for the service, found out by trying, and for what is missing: why, and what to do."""

from collections.abc import Callable, Iterator
from functools import partial

from kvstore_service.doctor import configuration, essentials, machine, services, video
from kvstore_service.doctor.finding import Check, Finding, missing
from kvstore_service.extensions import INSTALL, load_extensions

__all__ = ["CHECKS", "Check", "Finding", "added_checks", "examine"]

_NamedCheck = tuple[str, bool, Callable[[], Finding]]


def added_checks() -> Iterator[_NamedCheck]:
    """Checks of other packages. Those that cannot be imported are one check that finds that out."""
    for extension in load_extensions("kvstore.checks"):
        if extension.reason:
            reason = f"its checks cannot be imported: {extension.reason}"
            yield extension.name, False, partial(missing, reason, f"If they are wanted: {INSTALL}")
        else:
            yield from extension.value


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
    *added_checks(),
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
