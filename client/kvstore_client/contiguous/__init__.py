"""Question-guided re-prefill (ContiguousKV, arXiv 2601.13631): a question reads, and attends to, a part of its prefix.

The frame of the stored format is the unit of everything: what is scored is what is read, decoded and cached.
docs/reprefill.md describes it for users.
"""
