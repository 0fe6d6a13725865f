"""What is said between the benchmark and its processes: lines of JSON.

An order is `["name", {...}]`. It is answered with any number of `["advance", [stage, done, total]]` and `["note",
text]`, and then with `["done", what it returns]` or `{"error": text}`.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import IO, Any

from kvstore_bench.store.processes import Process
from kvstore_codec.errors import KVStoreError
from kvstore_service.calibration import Report


class Answers:
    """Standard output, kept for answers; what libraries print goes to standard error. A Report."""

    def __init__(self) -> None:
        self._out: IO[str] = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def advance(self, stage: str, done: int, total: int) -> None:
        self.say(["advance", [stage, done, total]])

    def note(self, text: str) -> None:
        self.say(["note", text])

    def say(self, answer: Any) -> None:
        print(json.dumps(answer), file=self._out, flush=True)


def serve(orders: Mapping[str, Callable[..., Any]], answers: Answers) -> None:
    """Until standard input ends."""
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer: Any = ["done", orders[name](**arguments)]
        except KVStoreError as error:
            answer = {"error": str(error)}
        except Exception as error:  # whatever goes wrong is the benchmark's to show
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.say(answer)


def ask(process: Process, report: Report, timeout_s: float, order: str, **arguments: Any) -> Any:
    """What the order returned. Raises StartupError when it failed, or said nothing for `timeout_s`."""
    process.tell(order, **arguments)
    while True:
        kind, said = process.answer(timeout_s)
        if kind == "done":
            return said
        if kind == "note":
            report.note(said)
        else:
            report.advance(*said)
