"""Publishes the KV events of a cluster to routers over ZeroMQ (docs/kv-events.md). Needs pyzmq, the extra `events`."""
