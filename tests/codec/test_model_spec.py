from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest
import torch
from blake3 import blake3

from kvstore_codec.errors import CodecError, InvalidKVError, UnsupportedModelError
from kvstore_codec.model_config import spec_from_config
from kvstore_codec.model_spec import KVDtype, ModelSpec, RopeSpec, weights_digest

WEIGHTS = bytes(range(32))
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}
SPEC = ModelSpec(
    "tiny",
    WEIGHTS,
    layers=2,
    kv_heads=3,
    head_dim=64,
    dtype=KVDtype.FLOAT16,
    rope=RopeSpec("linear", 10000.0, 64, (("factor", 2.0),)),
    sliding_windows=(None, 4096),
    tp_rank=1,
    tp_size=2,
    numerics=(("hidden_act", "silu"), ("rms_norm_eps", 1e-5)),
)


GEMMA: dict[str, Any] = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_size": 1152,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 512,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def parse(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return spec_from_config({**config, **changes}, weights_digest=WEIGHTS, dtype=KVDtype.BFLOAT16)


def field(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def test_digest_is_blake3_over_length_prefixed_fields() -> None:
    rope = b"".join(
        field(part)
        for part in (
            b"linear",
            b"n" + struct.pack("<d", 10000.0),
            struct.pack("<q", 64),
            b"factor",
            b"n" + struct.pack("<d", 2.0),
        )
    )
    fields = [
        b"kvstore.ModelSpec.v1",
        b"tiny",
        WEIGHTS,
        struct.pack("<q", 2),
        struct.pack("<q", 3),
        struct.pack("<q", 64),
        b"float16",
        rope,
        struct.pack("<qq", 0, 4096),
        struct.pack("<q", 1),
        struct.pack("<q", 2),
        b"".join(map(field, (b"hidden_act", b"ssilu", b"rms_norm_eps", b"n" + struct.pack("<d", 1e-5)))),
    ]
    assert SPEC.digest == blake3(b"".join(map(field, fields))).digest()


def test_digest_is_a_known_constant() -> None:
    assert SPEC.digest.hex() == "1634f23ce5da5856433bed4cd56673947bc418d83e13173a4f2237547e6d1ce3"


@pytest.mark.parametrize(
    "change",
    [
        {"model_id": "tinz"},
        {"weights_digest": bytes(32)},
        {"numerics": (("hidden_act", "gelu"), ("rms_norm_eps", 1e-5))},
        {"numerics": (("hidden_act", "silu"), ("rms_norm_eps", 1e-6))},
        {"layers": 3, "sliding_windows": (None, 4096, None)},
        {"kv_heads": 2},
        {"head_dim": 32},
        {"dtype": KVDtype.BFLOAT16},
        {"rope": None},
        {"rope": RopeSpec("linear", 10000.0, 32, (("factor", 2.0),))},
        {"rope": RopeSpec("linear", 10001.0, 64, (("factor", 2.0),))},
        {"rope": RopeSpec("linear", 10000.0, 64, (("factor", 4.0),))},
        {"rope": RopeSpec("linear", 10000.0, 64, (("factor", True),))},
        {"rope": RopeSpec("linear", 10000.0, 64, (("factor", "2.0"),))},
        {"sliding_windows": ()},
        {"sliding_windows": (4096, None)},
        {"tp_rank": 0},
        {"tp_size": 3},
        {"sliding_rope": RopeSpec("default", 10000.0, 64)},
    ],
)
def test_every_field_changes_the_digest(change: dict[str, Any]) -> None:
    assert dataclasses.replace(SPEC, **change).digest != SPEC.digest


def test_which_rope_is_that_of_the_windows_matters() -> None:
    far, near = RopeSpec("default", 1e6, 64), RopeSpec("default", 1e4, 64)
    ropes = [(far, near), (near, far), (far, None), (near, None)]
    assert len({dataclasses.replace(SPEC, rope=a, sliding_rope=b).digest for a, b in ropes}) == 4


def test_a_whole_number_is_the_same_factor_as_its_float() -> None:
    rope = RopeSpec("linear", 10000, 64, (("factor", 2),))
    assert dataclasses.replace(SPEC, rope=rope).digest == SPEC.digest


@pytest.mark.parametrize(
    "change",
    [
        {"weights_digest": b"short"},
        {"layers": 0, "sliding_windows": ()},
        {"kv_heads": -1},
        {"sliding_windows": (None,)},
        {"tp_rank": 2},
        {"tp_size": 0},
        {"sliding_windows": (), "sliding_rope": RopeSpec("default", 10000.0, 64)},
    ],
)
def test_impossible_specs_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CodecError):
        dataclasses.replace(SPEC, **change)


def test_unsorted_rope_parameters_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="sorted"):
        RopeSpec("yarn", 1.0, 64, (("b", 1), ("a", 1)))


def test_kv_bytes_per_token() -> None:
    assert parse(LLAMA).kv_bytes_per_token == 23_040


def test_kv_dtypes() -> None:
    assert [(kind.torch, kind.itemsize) for kind in KVDtype] == [
        (torch.bfloat16, 2),
        (torch.float16, 2),
        (torch.float32, 4),
    ]
    assert KVDtype.of(torch.float16) is KVDtype.FLOAT16
    with pytest.raises(InvalidKVError, match="int8"):
        KVDtype.of(torch.int8)


def test_llama_config() -> None:
    assert parse(LLAMA) == ModelSpec(
        "LlamaForCausalLM", WEIGHTS, 30, 3, 64, KVDtype.BFLOAT16, RopeSpec("default", 100000.0, 64)
    )


def test_gemma_config() -> None:
    spec = parse(GEMMA)
    assert spec.sliding_windows == (512, 512, 512, 512, 512, None, 512)
    assert spec.rope == RopeSpec("linear", 1e6, 256, (("factor", 8.0),))
    assert spec.sliding_rope == RopeSpec("default", 1e4, 256)
    assert spec.numerics == (("hidden_activation", "gelu_pytorch_tanh"),)
    assert parse(GEMMA, query_pre_attn_scalar=168).digest != spec.digest
    kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert parse(GEMMA, layer_types=kinds) == spec
    older = {key: value for key, value in GEMMA.items() if key != "rope_parameters"}
    assert parse(older, rope_scaling={"rope_type": "linear", "factor": 8.0}) == spec
    named = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    assert parse(older, rope_scaling={"rope_type": "linear", "factor": 8.0}, **named) == spec
    assert parse(older, rope_theta=1e4).sliding_rope is None
    assert parse(GEMMA, sliding_window=None).sliding_rope is None


def test_older_configs_give_the_same_spec() -> None:
    older = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
    assert parse(older, rope_theta=100000.0, rope_scaling=None) == parse(LLAMA)
    newer_linear = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    assert parse(older, rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 4}) == parse(
        LLAMA, rope_parameters=newer_linear
    )


def test_local_paths_and_unused_fields_do_not_matter() -> None:
    assert parse(LLAMA, _name_or_path="/models/a", use_cache=False) == parse(LLAMA)


def test_what_the_model_computes_with_matters() -> None:
    digests = {
        parse(LLAMA, rms_norm_eps=eps, hidden_act=act).digest
        for eps in (1e-5, 1e-6)
        for act in ("silu", "gelu")
    }
    assert len(digests) == 4


def test_head_dim_and_partial_rotation() -> None:
    spec = parse(LLAMA, head_dim=128, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})
    assert spec.head_dim == 128
    assert spec.rope == RopeSpec("default", 10000.0, 64)


def test_kv_heads_default_to_attention_heads() -> None:
    assert parse(LLAMA, num_key_value_heads=None).kv_heads == 9


def test_scaled_rope_remembers_the_length_it_was_trained_at() -> None:
    parameters = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    implicit = parse(LLAMA, rope_parameters=parameters)
    explicit = parse(LLAMA, rope_parameters={**parameters, "original_max_position_embeddings": 8192})
    assert implicit == explicit
    assert implicit.rope is not None
    assert implicit.rope.parameters == (
        ("factor", 8.0),
        ("low_freq_factor", 1.0),
        ("original_max_position_embeddings", 8192),
    )
    assert implicit.digest != parse(LLAMA, max_position_embeddings=4096, rope_parameters=parameters).digest


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 4096}, ()),
        ({"model_type": "mistral", "sliding_window": 4096}, (4096,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, ()),
        ({"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": False}, ()),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 512,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            (None, None, None, 512),
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 512,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
            (None, 512, None, 512),
        ),
    ],
)
def test_sliding_windows(changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert parse(LLAMA, num_hidden_layers=4, **changes).sliding_windows == windows


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt2"}, "family 'gpt2' is not supported; supported are llama"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "latent"),
        ({"model_type": "qwen3_next", "linear_num_value_heads": 32}, "linear attention"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "cross-attention"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "attend to later ones"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' RoPE change with the seq"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope' RoPE change with the sequence length"),
        ({"rope_scaling": {"type": "dynamic"}, "rope_parameters": None}, "sequence length"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "'spiral' is unknown"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_attention_heads": "nine"}, "num_attention_heads"),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 1,
                "use_sliding_window": True,
                "layer_types": ["full_attention"],
            },
            "layer_types",
        ),
    ],
)
def test_unsupported_models_say_why(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        parse(LLAMA, **changes)


def test_weights_digest_is_blake3_over_names_types_shapes_and_bytes() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor(3, dtype=torch.int64)
    expected = field(b"kvstore.weights.v1")
    for name, dtype, shape, data in (
        (b"a", b"torch.float32", struct.pack("<qq", 1, 2), struct.pack("<ff", 1, 2)),
        (b"b", b"torch.int64", b"", struct.pack("<q", 3)),
    ):
        expected += field(name) + field(dtype) + field(shape) + field(data)
    assert weights_digest([("b", b), ("a", a)]) == blake3(expected).digest()


def test_weights_digest_depends_on_everything_but_order_and_layout() -> None:
    w = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    digest = weights_digest([("w", w), ("e", torch.empty(0))])
    assert weights_digest([("e", torch.empty(0)), ("w", w.t().contiguous().t())]) == digest
    for other in (w + 1, w.reshape(3, 2), w.view(torch.float16)):
        assert weights_digest([("w", other), ("e", torch.empty(0))]) != digest
    assert weights_digest([("v", w), ("e", torch.empty(0))]) != digest
    assert weights_digest([("w", w)]) != digest
