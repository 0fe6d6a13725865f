"""Benchmarks compute in a dtype that the processor does not have to emulate."""

import pytest
import torch

from kvstore_bench.native_dtype import native_dtype


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_f": True, "avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bfloat16"),
        ({"neon": True, "bf16": True}, "bfloat16"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "float32"),
        ({"neon": True}, "float32"),
    ],
)
def test_bfloat16_is_used_where_the_processor_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dtype: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert native_dtype() == dtype


def test_this_processor_is_understood() -> None:
    # The names are those that this PyTorch reports: one of them is known on either architecture.
    assert {"avx512_bf16", "bf16"} & set(torch.cpu.get_capabilities())
    assert native_dtype() in ("bfloat16", "float32")
