"""The metrics of a client, which its process exports."""

from kvstore_client.metric import RATIOS, Kind, Label, Metric
from kvstore_client.miss_reason import MissReason
from kvstore_client.spans import STAGES
from kvstore_codec.encoding import Encoding

_REASON = Label("reason", tuple(MissReason), "docs/miss-reasons.md explains them")
_ENCODING = Label("encoding", tuple(Encoding.families()), "family of encodings")

REQUESTED_TOKENS = Metric(
    "kvstore_client_requested_tokens_total",
    Kind.COUNTER,
    "tokens",
    "Tokens of the chunks that prompts were looked up with. Matched tokens divided by these are the hit rate.",
)
MATCHED_TOKENS = Metric(
    "kvstore_client_matched_tokens_total",
    Kind.COUNTER,
    "tokens",
    "Tokens of prompts whose KV was found stored and could be used.",
)
TOKENS = Metric(
    "kvstore_client_tokens_total",
    Kind.COUNTER,
    "tokens",
    "Prompt tokens, by where their KV came from.",
    (Label("source", ("reused", "computed")),),
)
MATCHED = Metric(
    "kvstore_client_matched_chunks_total",
    Kind.COUNTER,
    "chunks",
    "Chunks of prompts that were found stored: in their own context, or with the same tokens in another one.",
    (Label("kind", ("exact", "approximate")),),
)
PLANNED = Metric(
    "kvstore_client_planned_chunks_total",
    Kind.COUNTER,
    "chunks",
    "Matched chunks, by the last decision about them.",
    (Label("decision", ("fetch", "compute")),),
)
CHUNKS = Metric(
    "kvstore_client_chunks_total",
    Kind.COUNTER,
    "chunks",
    "Chunks a fetch asked for, by how they ended. Of the cancelled ones the engine needed no KV any more.",
    (Label("result", ("delivered", "missing", "cancelled")),),
)
MISSES = Metric(
    "kvstore_client_misses_total",
    Kind.COUNTER,
    "events",
    "Reuse and storing that did not happen, by reason.",
    (_REASON,),
)
FAILOVERS = Metric(
    "kvstore_client_failovers_total",
    Kind.COUNTER,
    "events",
    "Times a fetch continued with another node that holds the same chunks, by the first node's failure.",
    (_REASON,),
)
BYTES = Metric(
    "kvstore_client_bytes_total",
    Kind.COUNTER,
    "bytes",
    "Bytes of chunks moved, by direction.",
    (Label("direction", ("in", "out")),),
)
FETCHED_BYTES = Metric(
    "kvstore_client_fetched_bytes_total",
    Kind.COUNTER,
    "bytes",
    "Bytes of chunks that fetches delivered, by encoding.",
    (_ENCODING,),
)
STORED_BYTES = Metric(
    "kvstore_client_stored_bytes_total",
    Kind.COUNTER,
    "bytes",
    "Bytes of chunks that nodes accepted, all copies, by encoding.",
    (_ENCODING,),
)
UNDER_REPLICATED = Metric(
    "kvstore_client_under_replicated_chunks_total",
    Kind.COUNTER,
    "chunks",
    "Chunks stored on fewer nodes than the number of replicas; the cluster repairs them.",
)
GUARDED = Metric(
    "kvstore_client_guarded_frames_total",
    Kind.COUNTER,
    "frames",
    "Frames unlike the calibration's text that were coded with a finer step, or exactly.",
    (Label("action", ("finer", "exact")),),
)
FETCH_S = Metric(
    "kvstore_client_fetch_seconds", Kind.HISTOGRAM, "seconds", "How long a fetch took, start to end."
)
PREDICTED_S = Metric(
    "kvstore_predicted_fetch_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "How long a planned fetch was to take by its first plan; compare with kvstore_client_fetch_seconds.",
)
PREDICTION_RATIO = Metric(
    "kvstore_client_fetch_prediction_ratio",
    Kind.HISTOGRAM,
    "ratio",
    "How long a planned fetch took, divided by how long it was to take by its first plan.",
    buckets=RATIOS,
)
STAGE_S = Metric(
    "kvstore_client_stage_seconds",
    Kind.HISTOGRAM,
    "seconds",
    "Time within a fetch that a stage worked, in any of its threads.",
    (Label("stage", STAGES),),
)
REPLANS = Metric(
    "kvstore_client_replans_total", Kind.COUNTER, "events", "Times a fetch was replanned while it ran."
)
BANDWIDTH = Metric(
    "kvstore_client_bandwidth_bytes_per_second",
    Kind.GAUGE,
    "bytes per second",
    "Bandwidth from a node as the planner estimates it. A node that has not sent anything yet has none.",
    (Label("endpoint", meaning="host:port of a member of the cluster"),),
)
PAGES = Metric(
    "kvstore_client_pages_total",
    Kind.COUNTER,
    "pages",
    "Pages of finished jobs, by operation and result.",
    (
        Label("operation", ("exists", "get", "put")),
        Label("outcome", meaning="ok, or a reason of docs/pages.md"),
    ),
)
FRAMES = Metric(
    "kvstore_client_frames_total",
    Kind.COUNTER,
    "frames",
    "Frames that questions with a budget chose: read, found in the frame cache, or missing.",
    (Label("result", ("read", "cached", "missing")),),
)
WAITING = Metric("kvstore_client_waiting_for_kv", Kind.GAUGE, "requests", "Requests that wait for their KV.")

CLIENT_METRICS = (
    REQUESTED_TOKENS, MATCHED_TOKENS, TOKENS, MATCHED, PLANNED, CHUNKS, MISSES, FAILOVERS, BYTES, FETCHED_BYTES,
    STORED_BYTES, UNDER_REPLICATED, GUARDED, FETCH_S, PREDICTED_S, PREDICTION_RATIO, STAGE_S, REPLANS, BANDWIDTH, PAGES,
    FRAMES, WAITING,
)  # fmt: skip
