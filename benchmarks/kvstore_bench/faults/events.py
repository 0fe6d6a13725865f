"""Events that the load process reports to the benchmark, one line of JSON each."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One put or get of a document. Times are those of `time.monotonic`, which processes of one machine share."""

    operation: str
    """`put` or `get`."""
    document: int
    begin_s: float
    end_s: float
    chunks: int
    """Number of chunks that were acknowledged or delivered."""
    wrong_bytes: int = 0
    missing: str = ""
    """Why a get did not deliver all chunks; empty if it did."""
    holders: tuple[str, ...] = ()
    """Nodes that had the first missing chunk when asked directly afterwards."""

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s

    def to_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> "Event":
        fields = json.loads(line)
        return cls(**fields | {"holders": tuple(fields["holders"])})
