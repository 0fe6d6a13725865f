"""What the load tells the benchmark, one line of JSON each."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One put or get of a document. Times as of `time.monotonic`, which processes of one machine share."""

    operation: str
    """`put` or `get`."""
    document: int
    begin_s: float
    end_s: float
    chunks: int
    """Acknowledged, or delivered."""
    wrong_bytes: int = 0
    missing: str = ""
    """Why a get did not deliver everything."""
    holders: tuple[str, ...] = ()
    """Nodes that had the first missing chunk, asked directly afterwards."""

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s

    def to_line(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_line(cls, line: str) -> "Event":
        fields = json.loads(line)
        return cls(**fields | {"holders": tuple(fields["holders"])})
