"""Measures the time to the first token where a user sees it: at the streamer."""

import time
from typing import Any


class FirstTokenTimer:
    """A streamer for `generate`. `ttft_s` is the time from its construction to the first token of the answer."""

    def __init__(self) -> None:
        self._prompt_seen = False
        self._started_at_s = time.perf_counter()
        self.ttft_s = 0.0

    def put(self, _value: Any) -> None:
        if self._prompt_seen and not self.ttft_s:
            self.ttft_s = time.perf_counter() - self._started_at_s
        self._prompt_seen = True

    def end(self) -> None:
        """Does nothing, because the streamer buffers nothing."""
