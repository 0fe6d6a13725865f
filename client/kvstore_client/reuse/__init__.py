"""Reuse of KV by token ids, for any engine: `session.ReuseSession`.

Imports no engine. An engine adapter brings an `Engine` (`engine.py`), calls (`call.py`) and a `CanaryCheck`
(`identity.py`)."""
