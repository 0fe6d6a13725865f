"""Layouts of quantised KV as pictures."""
