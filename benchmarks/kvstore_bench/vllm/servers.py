"""What every benchmark of vLLM behind a link starts."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from kvstore_bench.shaping.netns import NetworkNamespace
from kvstore_bench.vllm.calibration import publish_in_process
from kvstore_bench.vllm.engine import EngineOptions
from kvstore_bench.vllm.links import BURST_S
from kvstore_bench.vllm.policies import Deploy, Deployed, Testbed, deployed
from kvstore_service.calibration import Report


@contextmanager
def logs_folder(logs: Path | None) -> Iterator[Path]:
    """Absolute path of the folder for the servers' logs and caches: `logs`, which is made and kept, or a temporary
    one."""
    with ExitStack() as stack:
        folder = logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-vllm-")))
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.absolute()


@contextmanager
def servers_behind_a_link(
    policies: Mapping[str, Deploy], engine: EngineOptions, report: Report, logs: Path | None
) -> Iterator[tuple[NetworkNamespace, Deployed]]:
    """An unshaped link, and the policies with their stores at its far end. All of it ends with the context. Raises
    StartupError where no link can be made, and when `cold` does not start."""
    with (
        logs_folder(logs) as folder,
        NetworkNamespace(None, BURST_S) as link,
        deployed(
            Testbed(link, engine, folder, publish=partial(publish_in_process, engine.model, engine.dtype)),
            policies,
            report,
        ) as started,
    ):
        yield link, started
