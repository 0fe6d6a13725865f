"""Ray shells: they give the plain classes a process, a life after death, and an endpoint. Never KV bytes."""
