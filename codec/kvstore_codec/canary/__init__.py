"""The canary: KV of one fixed text, with which two workers check that they compute the same KV."""

from kvstore_codec.canary.probe import Probe, Sample
from kvstore_codec.canary.sketch import MAX_SKETCH_BYTES, SketchHeader, read_sketch_header

__all__ = ["MAX_SKETCH_BYTES", "Probe", "Sample", "SketchHeader", "read_sketch_header"]
