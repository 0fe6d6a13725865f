"""Messages between the benchmark and its processes, one line of JSON each.

An order is `["name", {...}]`. The process answers it with any number of `["advance", [stage, done, total]]` and
`["note", text]`, and then with `["done", result]` or `{"error": text}`.
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
    """A `Report` that writes answers to standard output. From its creation on, all that others print goes to standard
    error."""

    def __init__(self) -> None:
        self._out: IO[str] = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def advance(self, stage: str, done: int, total: int) -> None:
        self.send(["advance", [stage, done, total]])

    def note(self, text: str) -> None:
        self.send(["note", text])

    def send(self, answer: Any) -> None:
        print(json.dumps(answer), file=self._out, flush=True)


def serve(orders: Mapping[str, Callable[..., Any]], answers: Answers) -> None:
    """Executes orders until standard input ends."""
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer: Any = ["done", orders[name](**arguments)]
        except KVStoreError as error:
            answer = {"error": str(error)}
        except Exception as error:  # the benchmark reports any error
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.send(answer)


def ask(process: Process, report: Report, timeout_s: float, order: str, **arguments: Any) -> Any:
    """Sends an order and returns its result. Raises StartupError when it failed, or sent nothing for `timeout_s`."""
    process.tell(order, **arguments)
    while True:
        kind, content = process.answer(timeout_s)
        if kind == "done":
            return content
        if kind == "note":
            report.note(content)
        else:
            report.advance(*content)
