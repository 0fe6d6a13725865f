"""Ray actors: run the coordinator and storage nodes as processes that Ray restarts. KV bytes never pass through Ray."""
