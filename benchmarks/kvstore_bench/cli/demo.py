"""`kvstore demo`."""

import json
import multiprocessing
import signal
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from enum import StrEnum
from importlib.util import find_spec
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvstore_codec.errors import ConfigurationError, StartupError
from kvstore_service.cli.console import output, print_table
from kvstore_service.parent_death import end_with_parent

if TYPE_CHECKING:
    from kvstore_bench.demo.worker import Job, Run


class DType(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def demo(
    bandwidth: Annotated[
        str, typer.Option(help="Bandwidth of worker B's link, such as 50mbit or 1gbit.")
    ] = "1gbit",
    document: Annotated[
        Path | None,
        typer.Option(help="A text file; default: the data model chapter of Python's documentation."),
    ] = None,
    document_tokens: Annotated[
        int, typer.Option(min=256, max=7800, help="Tokens of the document to use.")
    ] = 3000,
    new_tokens: Annotated[int, typer.Option(min=1, max=256, help="Tokens of the answer.")] = 32,
    dtype: Annotated[
        DType,
        typer.Option(
            help="float32 gives the same answer on every exact path; bfloat16 rounds cold and hit differently."
        ),
    ] = DType.FLOAT32,
    out: Annotated[Path, typer.Option(help="Folder for demo.json, demo.png and demo.trace.json.")] = Path(),
) -> None:
    """Show reuse between two workers: A prefills a document, and B reuses its KV over a slow link."""
    _require_extra()
    from kvstore_bench import write_results
    from kvstore_bench.demo.document import read_document
    from kvstore_bench.demo.worker import Job, Run
    from kvstore_bench.shaping import ShapedLink
    from kvstore_bench.timeline_plot import TracedRun, plot_timelines
    from kvstore_client.trace import chrome_trace
    from kvstore_service.bandwidth import parse_bandwidth
    from kvstore_service.embedded import EmbeddedCluster
    from kvstore_service.models import smollm2_folder

    bandwidth_bps = parse_bandwidth(bandwidth)
    read_document(document)
    _require_folder(out)
    console = output()
    with ExitStack() as stack:
        show = stack.enter_context(_Steps(console))
        show.begin("model", "preparing SmolLM2-135M (converted once, then cached)")
        smollm2_folder()
        show.done("model", "SmolLM2-135M is ready")

        show.begin("cluster", "starting the cluster: local Ray, a coordinator, a storage node")
        cluster = stack.enter_context(EmbeddedCluster())
        show.done("cluster", f"cluster listens on {cluster.address}")

        job = Job(cluster.address, {}, document, document_tokens, new_tokens, dtype.value)
        origin = show.run("calibration", "publish_calibration", job)
        show.done("calibration", origin)

        chunks = show.run("worker A", "prefill_and_store", job)
        show.done("worker A", f"worker A prefilled the document and stored {chunks} chunks")

        routes: dict[str, str] = {}
        for endpoint in (cluster.address, *_storage_endpoints(cluster.address)):
            link = stack.enter_context(ShapedLink(endpoint, bandwidth_bps=bandwidth_bps))
            routes[endpoint] = link.address
        slow = Job(cluster.address, routes, document, document_tokens, new_tokens, dtype.value)
        runs: tuple[Run, ...] = show.run("worker B", "answer_thrice", slow)
        show.done("worker B", f"worker B answered three times; its link is limited to {bandwidth}")

    cold = runs[0]
    rows = [_row(run, cold) for run in runs]
    write_results(rows, out / "demo.json", _meta(bandwidth_bps, slow))
    plot_timelines(
        [TracedRun(_title(run, bandwidth), run.timeline, run.ttft_s) for run in runs], "", out / "demo.png"
    )
    trace = chrome_trace({_path(run.encoding): run.timeline for run in runs})
    (out / "demo.trace.json").write_text(json.dumps(trace))
    print_table(_table(rows))
    for run in runs:
        if run is cold or run.tokens != cold.tokens:
            console.print(f"[bold]answer[/bold] ({_path(run.encoding)})  {escape(run.text.strip())}")
    speedups = ", ".join(f"{cold.ttft_s / run.ttft_s:.1f}x with {run.encoding}" for run in runs[1:])
    console.print(f"speed-up of the first token: {speedups}; see {out / 'demo.png'} and {out / 'demo.json'}")
    console.print(
        f"timeline of each stage and chunk: open {out / 'demo.trace.json'} in https://ui.perfetto.dev"
    )
    console.print(
        "medium-klt-pco is lossy, and this calibration is small: `kvstore calibrate` fits a full one to your own text."
    )


def _require_extra() -> None:
    missing = [name for name in ("matplotlib", "ray", "transformers") if find_spec(name) is None]
    if missing:
        raise StartupError(f"the demo needs {', '.join(missing)}: pip install 'kvstore-service[bench]'")


def _require_folder(folder: Path) -> None:
    """Creates the output folder and checks that it can be written, before minutes of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"cannot write demo.json and demo.png to {folder}: {error.strerror}; choose another --out"
        ) from error


def _row(run: "Run", cold: "Run") -> dict[str, Any]:
    return {
        "path": run.path,
        "encoding": run.encoding,
        "ttft_s": round(run.ttft_s, 4),
        "tokens_reused": run.tokens_reused,
        "bytes": run.received_bytes,
        "same_tokens": run.tokens == cold.tokens,
        "prompt_tokens": run.prompt_tokens,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="one document, a second question")
    for column in ("path", "TTFT", "tokens reused", "bytes moved", "same answer?"):
        table.add_column(column, justify="left" if column == "path" else "right")
    for row in rows:
        table.add_row(
            _path(row["encoding"]),
            f"{row['ttft_s']:.3f} s",
            f"{row['tokens_reused']} of {row['prompt_tokens']}",
            f"{row['bytes'] / 1e6:.1f} MB",
            "yes" if row["same_tokens"] else "no",
        )
    return table


def _path(encoding: str | None) -> str:
    return "full prefill" if encoding is None else f"through the service, {encoding}"


def _title(run: "Run", bandwidth: str) -> str:
    if run.encoding is None:
        return f"full prefill of {run.prompt_tokens} tokens"
    return f"{run.tokens_reused} of {run.prompt_tokens} tokens reused as {run.encoding} over {bandwidth}"


def _meta(bandwidth_bps: float, job: "Job") -> dict[str, Any]:
    return {
        "bandwidth_bps": bandwidth_bps,
        "model": "SmolLM2-135M-Instruct",
        "dtype": job.dtype,
        "document_tokens": job.document_tokens,
        "new_tokens": job.new_tokens,
    }


def _storage_endpoints(address: str) -> list[str]:
    from kvstore_client import ClientSettings
    from kvstore_client.cluster_view import ClusterView

    view = ClusterView(ClientSettings(address=address))
    try:
        return [member.endpoint for member in view.membership().members]
    finally:
        view.close()


class _Steps:
    """A progress line for each step; what a worker process reports is shown on its line."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]done"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=18),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "_Steps":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, name: str, text: str) -> None:
        self._tasks[name] = self._progress.add_task(text, total=None)

    def done(self, name: str, text: str) -> None:
        self._progress.update(self._tasks[name], description=text, total=1, completed=1)

    def run(self, name: str, function: str, job: "Job") -> Any:
        """Run a function of the worker module in a new process."""
        self.begin(name, f"{name}: starting")
        spawn = multiprocessing.get_context("spawn")
        messages: Queue[str] = spawn.Queue()
        with ProcessPoolExecutor(
            1, mp_context=spawn, initializer=_begin_worker, initargs=(messages,)
        ) as worker:
            result = worker.submit(_in_worker, function, job)
            try:
                while not result.done():
                    with suppress(Empty):
                        text = messages.get(timeout=0.1)
                        self._progress.update(self._tasks[name], description=f"{name}: {text}")
            except KeyboardInterrupt:
                for process in multiprocessing.active_children():
                    process.terminate()  # the executor would wait for its result, which nobody needs any more
                raise
            return result.result()


_messages: "Queue[str] | None" = None
"""Queue of progress messages to the command, in a worker process."""


def _begin_worker(messages: "Queue[str]") -> None:
    global _messages
    _messages = messages
    end_with_parent(signal.SIGKILL)


def _in_worker(function: str, job: "Job") -> Any:
    from transformers.utils import logging

    from kvstore_bench.demo import worker

    assert _messages is not None  # noqa: S101 (the initialiser ran)
    logging.disable_progress_bar()
    return getattr(worker, function)(job, _messages.put)
