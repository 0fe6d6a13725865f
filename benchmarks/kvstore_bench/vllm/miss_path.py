"""What the connector costs where nothing is reused: no request finds its KV, or the store is out of reach."""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from kvstore_bench.shaping.netns import NetworkNamespace
from kvstore_bench.vllm.completions import Answer
from kvstore_bench.vllm.engine import Engine
from kvstore_bench.vllm.policies import COLD, POLICIES, Deploy, Deployment, Testbed, kvstore_connector

STORE_IS_EMPTY, STORE_IS_AWAY = "empty-store", "store-away"
_SLOWER = 1.03
_PORT = 7420


def _away(testbed: Testbed, stack: ExitStack, name: str, number: int) -> Deployment:
    """The store's address is behind a link that is cut, so that packets are lost and no connection is refused."""
    link = stack.enter_context(NetworkNamespace(None))
    link.cut()
    folder = testbed.folder / f"cache-{number}"
    connector = kvstore_connector(f"{link.inside_address}:{_PORT}", folder, {})
    engine = Engine(f"away-{number}", testbed.vllm_python, testbed.options, testbed.folder, connector)
    stack.callback(engine.close)
    return Deployment(name, engine, None, lambda: None)


MISS_POLICIES: Mapping[str, Deploy] = {
    COLD: POLICIES[COLD],
    STORE_IS_EMPTY: POLICIES["exact"],
    f"{STORE_IS_EMPTY}-lossy": POLICIES["adaptive"],
    STORE_IS_AWAY: _away,
}


def miss_rows(answers: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """`answers` has one answer for each policy and round. Policies are compared round by round.

    Rows: {policy, rounds, ttft_s (median), ttft_min_s, ttft_max_s, decode_tokens_per_s, ttft_over_cold and
    decode_time_over_cold (medians of the ratios to `cold` in the same round), reused_tokens (the most in any answer),
    met (whether both ratios are at most 1.03)}."""
    rows = []
    for policy, given in answers.items():
        ttft, speed = [answer.ttft_s for answer in given], [_speed(answer) for answer in given]
        cold = answers[COLD]
        over = [mine.ttft_s / other.ttft_s for mine, other in zip(given, cold, strict=False)]
        slower = [_speed(other) / _speed(mine) for mine, other in zip(given, cold, strict=False)]
        rows.append(
            {
                "policy": policy,
                "rounds": len(given),
                "ttft_s": statistics.median(ttft),
                "ttft_min_s": min(ttft),
                "ttft_max_s": max(ttft),
                "decode_tokens_per_s": statistics.median(speed),
                "ttft_over_cold": statistics.median(over),
                "decode_time_over_cold": statistics.median(slower),
                "reused_tokens": max(answer.reused_tokens for answer in given),
                "met": statistics.median(over) <= _SLOWER and statistics.median(slower) <= _SLOWER,
            }
        )
    return rows


def _speed(answer: Answer) -> float:
    speed = answer.decode_tokens_per_s
    if speed is None:
        raise ValueError("an answer of one token has no decoding speed")
    return speed
