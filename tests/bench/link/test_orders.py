"""What is said between the benchmark and its processes."""

import sys
from collections.abc import Iterator

import pytest

from kvstore_bench.link.orders import ask
from kvstore_bench.store.processes import Process
from kvstore_codec.errors import StartupError

WORKER = """
from kvstore_codec.errors import ConfigurationError
from kvstore_bench.link.orders import Answers, serve

answers = Answers()
print("a library talks")

def count(to):
    for number in range(to):
        answers.advance("counting", number, to)
    answers.note("counted")
    return {"to": to}

def fail(known):
    raise ConfigurationError("on purpose") if known else ZeroDivisionError("by accident")

serve({"count": count, "fail": fail}, answers)
"""


class Noted:
    def __init__(self) -> None:
        self.said: list[object] = []

    def advance(self, stage: str, done: int, total: int) -> None:
        self.said.append((stage, done, total))

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    process = Process("counting", (sys.executable, "-c", WORKER))
    yield process
    process.close()


def test_progress_and_notes_come_before_the_answer(process: Process) -> None:
    noted = Noted()
    assert ask(process, noted, 60, "count", to=2) == {"to": 2}
    assert noted.said == [("counting", 0, 2), ("counting", 1, 2), "counted"]


def test_what_goes_wrong_there_is_raised_here(process: Process) -> None:
    with pytest.raises(StartupError, match="on purpose"):
        ask(process, Noted(), 60, "fail", known=True)
    with pytest.raises(StartupError, match="ZeroDivisionError: by accident"):
        ask(process, Noted(), 60, "fail", known=False)
    assert ask(process, Noted(), 60, "count", to=0) == {"to": 0}
