"""Identity of a loaded model's KV: a name for what the model computes, or the reason why its KV must not be shared.

An adapter asks `guard.ModelIdentity` before and after each call. It detects changes cheaply (`state`), then compares
the model with what its config implies (`reference`). Differences that can be part of a name go into the `ModelSpec`
(`settings`); all others are reasons to run calls without reuse (`hooks`, `code`, `settings`).
"""
