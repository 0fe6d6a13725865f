"""What Ray prints and says in the process that controls a cluster."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silent_ray() -> Iterator[None]:
    """Keeps Ray from printing errors of its workers to this process's stdout while the block runs, such as an actor's
    death. The coordinator notices and logs those.

    Ray prints them even with `log_to_driver=False`. Its variable RAY_DEDUP_LOGS_SKIP_REGEX hides them only if it was
    set before Ray was imported, which this process may have done long ago, and not at all beside RAY_DEDUP_LOGS=0.
    """
    from ray._private import worker

    prints = worker.print_to_stdstream  # a private name: Ray has no public setting
    worker.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        worker.print_to_stdstream = prints


def reason_of(error: Exception) -> str:
    """The reason of a failure in an actor: the last line of Ray's error, which is a whole remote traceback."""
    return str(error).strip().splitlines()[-1]
