"""Fuzzes the chunk decoder with mutants: damaged chunks whose checksums are correct again. Decodes each one twice."""
