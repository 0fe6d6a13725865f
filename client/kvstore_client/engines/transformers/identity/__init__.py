"""Which KV a loaded model makes: the name of what it computes, or why its KV must not be shared.

`guard.ModelIdentity` is what an adapter asks before and after each call. It notices changes cheaply (`state`), and then
compares the model with what its config implies (`reference`): differences that a name can express go into the
`ModelSpec` (`settings`), others are a reason to leave the call alone (`hooks`, `code`, `settings`).
"""
