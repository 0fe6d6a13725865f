"""Which chunk goes first when room is needed."""
