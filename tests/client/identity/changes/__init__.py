"""Kinds of change that a model can go through after it was wrapped; a module for each kind."""

from tests.client.identity.changes import belongings, buffers, hooks, modules, scalars, types, weights
from tests.client.identity.changes.base import CHANGES, Change

__all__ = ["CHANGES", "Change", "belongings", "buffers", "hooks", "modules", "scalars", "types", "weights"]
