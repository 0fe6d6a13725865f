"""The dtype that a benchmark computes in if the user names none."""

NATIVE_DTYPE = "bfloat16, or float32 on processors that only emulate it"
"""What `native_dtype` returns, for the help of a command."""

_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def native_dtype() -> str:
    """Returns "bfloat16" if this processor has instructions for it, else "float32".

    Without them PyTorch emulates bfloat16 several times more slowly than it computes in float32. A run of minutes
    would take a quarter of an hour and measure what nobody serves.
    """
    import torch

    capabilities = torch.cpu.get_capabilities()
    supported = any(capabilities.get(name, False) for name in _BFLOAT16_INSTRUCTIONS)
    return "bfloat16" if supported else "float32"
