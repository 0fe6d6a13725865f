"""Engine-neutral reuse of KV by token ids: `session.ReuseSession`.

This package imports no engine. An adapter provides an `Engine` (`engine.py`), calls (`call.py`) and a `CanaryCheck`
(`identity.py`).
"""
