"""Sends a vLLM server the canary's probe, so that it compares its KV with that of the cluster's other workers.

    python -m kvstore_client.engines.vllm.probe http://127.0.0.1:8000

The server's log says how the comparison ends. docs/canary.md describes it.
"""

import argparse
import json
import secrets
import sys
import urllib.request
from http.client import HTTPException
from typing import Any

from kvstore_client.engines.vllm.canary import engine_probe
from kvstore_client.engines.vllm.naming import checkpoint_folder
from kvstore_codec.errors import KVStoreError

_TIMEOUT_S = 300.0


def probe_prompt(vocabulary: int) -> list[int]:
    """Token ids of a prompt that begins with the probe. The last token is behind it: an engine computes at least one
    token of each prompt itself."""
    ids: list[int] = engine_probe(vocabulary).token_ids().tolist()
    return [*ids, ids[0]]


def send_probe(url: str) -> str:
    """Have the server at `url` compute the probe. Returns the name of its model. Raises OSError where it does not
    answer, and KVStoreError where the model's files are not on this machine."""
    served = _ask(f"{url}/v1/models")["data"][0]
    folder = checkpoint_folder(served["root"], None)
    config = json.loads((folder / "config.json").read_text())
    vocabulary = int(config.get("text_config", config)["vocab_size"])
    # A salt of its own, so that the engine does not answer from its own prefix cache.
    asked = {"model": served["id"], "prompt": probe_prompt(vocabulary), "max_tokens": 1}
    _ask(f"{url}/v1/completions", asked | {"cache_salt": secrets.token_hex(16)})
    return str(served["id"])


def _ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310  # the user's own
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
        told: dict[str, Any] = json.load(answer)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description="Send a vLLM server the canary's probe.")
    parser.add_argument("url", help="base URL of the server, such as http://127.0.0.1:8000")
    url = parser.parse_args().url.rstrip("/")
    try:
        model = send_probe(url)
    except (OSError, KVStoreError) as error:
        sys.exit(f"the probe was not sent to {url}: {error}")
    except (ValueError, LookupError, TypeError, HTTPException) as error:
        sys.exit(f"the probe was not sent: {url} is not the URL of a vLLM server ({error!r})")
    print(f"{url} has computed the probe of {model}; its log has the result of the comparison")  # noqa: T201


if __name__ == "__main__":
    main()
