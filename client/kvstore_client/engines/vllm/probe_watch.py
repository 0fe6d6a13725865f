"""Recognises requests that begin with the canary's probe, and says when the engine has computed it."""

from typing import Any

from kvstore_codec.canary.probe import TOKENS, Probe


class ProbeWatch:
    """Used by the scheduler's thread."""

    def __init__(self, probe: Probe, block_tokens: int) -> None:
        self._ids: list[int] = probe.token_ids().tolist()
        self._blocks = TOKENS // block_tokens
        self._block_ids: dict[str, list[int]] = {}
        """Blocks of each probe that is not computed yet."""
        self._is_stopped = False

    def watch(self, request: Any) -> bool:
        """Whether the request's KV is that of the probe, whatever its salt. If so, it is followed from now on."""
        if self._is_stopped or not self._is_probe(request):
            return False
        self._block_ids.setdefault(request.request_id, [])
        return True

    def computed(self, output: Any) -> tuple[int, ...]:
        """The blocks of a probe that is computed when the scheduled step ends; none where there is no such probe."""
        found: tuple[int, ...] = ()
        for new in output.scheduled_new_reqs:
            if new.req_id in self._block_ids:
                self._block_ids[new.req_id] = list(new.block_ids[0])
                found = self._ended(new.req_id, new.num_computed_tokens, output) or found
        cached = output.scheduled_cached_reqs
        for request_id, blocks, before in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if request_id in self._block_ids:
                known = [] if request_id in cached.resumed_req_ids else self._block_ids[request_id]
                self._block_ids[request_id] = known + list(blocks[0] if blocks is not None else ())
                found = self._ended(request_id, before, output) or found
        return found

    def finished(self, request_id: str) -> None:
        """The engine has no such request any more."""
        self._block_ids.pop(request_id, None)

    def stop(self) -> None:
        """The engine may compute with other weights from now on, which the probe must not be compared for."""
        self._is_stopped = True
        self._block_ids.clear()

    def _ended(self, request_id: str, before: int, output: Any) -> tuple[int, ...]:
        if before + output.num_scheduled_tokens[request_id] < TOKENS:
            return ()
        return tuple(self._block_ids.pop(request_id)[: self._blocks])

    def _is_probe(self, request: Any) -> bool:
        if request.lora_request is not None or request.mm_features or request.prompt_embeds is not None:
            return False
        return bool(request.num_prompt_tokens > TOKENS and request.all_token_ids[:TOKENS] == self._ids)
