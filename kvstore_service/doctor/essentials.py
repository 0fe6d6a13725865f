"""Checks of the packages that every use of the service needs: codec and client."""

from kvstore_service.doctor.finding import Finding, missing, present

_REINSTALL = "Install kvstore-service again; run `make install` in a checkout."


def codec() -> Finding:
    """Encodes and decodes one chunk of random KV."""
    import torch

    from kvstore_codec.chunk import read_header
    from kvstore_codec.codec import decode_frames, encode_chunk
    from kvstore_codec.encoding import Encoding
    from kvstore_codec.identity import CHUNK_TOKENS, chunk_ids
    from kvstore_codec.model_spec import KVDtype, ModelSpec

    spec = ModelSpec(
        model_id="doctor",
        weights_digest=bytes(32),
        layers=4,
        kv_heads=2,
        head_dim=32,
        dtype=KVDtype.BFLOAT16,
        rope=None,
    )
    (chunk_id,) = chunk_ids(spec.digest, b"", range(CHUNK_TOKENS))
    kv = torch.randn(2, spec.layers, spec.kv_heads, CHUNK_TOKENS, spec.head_dim).to(torch.bfloat16)
    encoded = encode_chunk(kv[0], kv[1], spec=spec, chunk_id=chunk_id, encoding=Encoding.parse("exact-zstd"))
    chunk = b"".join(encoded.parts)
    header = read_header(chunk)
    geometry = header.geometry
    decoded = torch.empty_like(kv)
    for frame in range(geometry.frame_count):
        period, slot = divmod(frame, geometry.frames_per_period)
        layers, tokens = geometry.layers_of(period), geometry.tokens_of(slot)
        keys, values = decoded[:, layers.start : layers.stop, :, tokens.start : tokens.stop]
        offset, length = header.range_bytes(frame, 1)
        decode_frames(header, frame, 1, memoryview(chunk)[offset : offset + length], keys, values)
    if not torch.equal(decoded, kv):
        return missing("a decoded chunk differs from the encoded one", _REINSTALL)
    return present(f"{CHUNK_TOKENS} tokens of KV encoded and decoded bit-exactly")


def client() -> Finding:
    try:
        import kvstore_client
    except ImportError as error:
        return missing(f"cannot be imported: {error}", _REINSTALL)
    return present(f"can be imported, {len(kvstore_client.__all__)} public names")
