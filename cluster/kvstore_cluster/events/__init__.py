"""KV events: which blocks the cluster stores, in which tier, for routers. A *block* is a chunk, whatever the number of
its encodings and copies. Nodes report the state of blocks whose tiers changed (`changes.py`, `feed.py`); the
coordinator merges the reports (`hub.py`, `block_index.py`) and numbers what results from them (`event_log.py`)."""
