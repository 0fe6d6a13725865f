"""docs/miss-reasons.md, from the enum itself: `python -m tests.client.miss_reasons_page > docs/miss-reasons.md`."""

import ast
import inspect

from kvstore_client import miss_reason
from kvstore_client.miss_reason import MissReason

_HEAD = """\
# Why KV was not reused or not stored

Whatever stands in the way of reuse, the engine computes the KV itself and the answer stays correct. The client counts
the reason: `client.metrics.snapshot()["miss_gone"]`, in Prometheus `kvstore_client_misses_total{reason="gone"}`. A
failure is also logged as a WARNING with its details, at most once per cause and minute. Reasons that begin with
`store_` are about chunks that were not stored (the next worker computes them again), those with `bypass_` about calls
that were passed to the model as they are, those with `calibration_` about calibrations that could not be found, loaded
or used.

This table is made from `client/kvstore_client/miss_reason.py`
(`python -m tests.client.miss_reasons_page > docs/miss-reasons.md`), and a test compares it.

| reason | what happened, and what to do |
| --- | --- |
"""


def descriptions() -> dict[MissReason, str]:
    """The docstring of each member that has one, on one line."""
    (enum,) = (
        node for node in ast.parse(inspect.getsource(miss_reason)).body if isinstance(node, ast.ClassDef)
    )
    found = {}
    for member, text in zip(enum.body, enum.body[1:], strict=False):
        if (
            isinstance(member, ast.Assign)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            (name,) = member.targets
            found[MissReason[ast.unparse(name)]] = " ".join(str(text.value.value).split())
    return found


def miss_reasons_page() -> str:
    """The whole of docs/miss-reasons.md."""
    return _HEAD + "".join(f"| `{reason}` | {text} |\n" for reason, text in descriptions().items())


if __name__ == "__main__":
    print(miss_reasons_page(), end="")
