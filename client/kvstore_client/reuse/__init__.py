"""Reuse of KV by token ids, for any engine: what a call computed, what it leaves to be stored, and selective recompute.

Imports no engine. An engine adapter brings `TokenEmbeddings` and `DecoderLayers` (`engine.py`)."""
