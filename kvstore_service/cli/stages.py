"""Progress of long commands."""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Stages:
    """Progress bars, one per stage. A bar appears with the first `advance` of its stage."""

    def __init__(self, console: Console, labels: Mapping[str, str]) -> None:
        self._labels = labels
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Stages":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(self._labels[stage], total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def note(self, text: str) -> None:
        self._progress.console.print(text, soft_wrap=True, markup=False)
