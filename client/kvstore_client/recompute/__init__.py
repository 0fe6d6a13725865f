"""Selective recompute: of KV that was computed in another context, which tokens are worth computing again."""
