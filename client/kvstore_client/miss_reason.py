"""Why KV was not reused or not stored: the values of the label `reason` of `kvstore_client_misses_total`."""

from enum import StrEnum

from kvstore_codec.errors import (
    CalibrationError,
    ChecksumError,
    CodecError,
    SignatureError,
    UnsignedChunkError,
)


class MissReason(StrEnum):
    """One reason for each thing that can go wrong or stand in the way. The engine computes the KV instead, and the
    answer stays correct. docs/miss-reasons.md lists the docstrings of the members."""

    # ---- the lookup

    UNREACHABLE = "unreachable"
    """The coordinator, or a node that owns the chunks, did not answer. Check that `kvstore serve` runs, that
    `KVSTORE_ADDRESS` is right, and the network."""
    PAUSED = "paused"
    """All nodes that could have the chunks failed a moment ago, so they were not asked. They are asked again after
    `KVSTORE_RETRY_AFTER_S`, and after each further failure later, at most 30 s. Look for the failure in the log."""
    LOOKUP_FAILED = "lookup_failed"
    """Some nodes did not answer a lookup; their chunks are computed. Check these nodes with `kvstore status`."""
    CLOSED = "closed"
    """The client was closed, or cannot be used in a forked process. Create a client after the fork."""
    BAD_HEADER = "bad_header"
    """A node answered with a chunk header that is damaged or belongs to another chunk. Run `kvstore verify`."""
    UNSIGNED = "unsigned"
    """A stored chunk is not signed, and the client has `KVSTORE_SIGNING_KEY_FILE`. The chunk that is computed instead
    replaces it. Give all workers of the tenant the key (docs/security.md)."""
    BAD_SIGNATURE = "bad_signature"
    """A stored chunk is signed by a key that this client does not have, or is not what was signed: somebody without the
    key has stored it. The chunk that is computed instead replaces it. Compare the workers' key files; the log has the
    id of the key."""
    CALIBRATION_FOREIGN = "calibration_foreign"
    """A chunk or the registry names a calibration of another model. Make one with `kvstore calibrate --publish`."""
    CALIBRATION_LOADING = "calibration_loading"
    """The chunks are stored in an encoding whose calibration this client is still loading. Later calls can use them."""
    MEMBERSHIP_INTERNAL_ERROR = "membership_internal_error"
    """A bug in kvstore: refreshing the list of nodes failed. The log has the traceback; report it."""

    # ---- the fetch

    NO_RESOURCES = "no_resources"
    """This process has no memory or no thread left for a fetch. Give it more, or lower `KVSTORE_POOL_BYTES`."""
    TIMEOUT = "timeout"
    """The chunks did not arrive within `KVSTORE_FETCH_TIMEOUT_S`. The link is too slow for them or overloaded."""
    STALLED = "stalled"
    """No byte arrived for `KVSTORE_STALL_TIMEOUT_S`. Check the nodes and the network."""
    OVERTAKEN = "overtaken"
    """The chunks came so slowly that the engine computes them sooner. Normal work on a slow link."""
    SILENT = "silent"
    """A node sent nothing for `KVSTORE_FAILOVER_S`, and no other node has the chunks."""
    GONE = "gone"
    """The chunks were evicted or deleted between the lookup and the read. This is normal work; more memory or disk on
    the nodes makes it rarer."""
    REPREFILL_INCOMPLETE = "reprefill_incomplete"
    """Of the frames that a question with a budget had chosen the first one or more than half did not arrive, so its
    prefix is reused as without a budget. Check the nodes and the network."""
    CANCELLED = "cancelled"
    """The call ended before its chunks arrived. This is normal work."""
    CHECKSUM = "checksum"
    """The bytes of a chunk do not have their checksum: they were damaged on a disk or on the way. The node drops a copy
    that is damaged. Run `kvstore verify`, and check the node's disk and network."""
    UNDECODABLE = "undecodable"
    """The coded bytes of a chunk are invalid, although their checksum is right. The worker that stored the chunk has a
    faulty encoder or other software: compare the versions."""
    CALIBRATION = "calibration"
    """A chunk cannot be decoded with its calibration. Make a new one with `kvstore calibrate --publish`."""
    DESTINATION = "destination"
    """The engine's memory could not take fetched KV; the log has the error of the engine's adapter."""
    PROTOCOL = "protocol"
    """A node's answer violates the protocol. Check that client and nodes have compatible versions."""
    TLS = "tls"
    """No TLS connection to a node's bulk port. Check `KVSTORE_TLS_CA`, the node's certificate and the client's."""
    REFUSED = "refused"
    """A node refused a read, perhaps for lack of a valid credential; the log has its message."""
    INTERNAL_ERROR = "internal_error"
    """A bug in kvstore ended a fetch. The log has the traceback; report it."""
    RPC_INVALID_ARGUMENT = "rpc_invalid_argument"
    """A node refused a read as invalid. Check that client and nodes have compatible versions."""
    RPC_UNAUTHENTICATED = "rpc_unauthenticated"
    """A node does not know the client's credential, or it has expired. Set `KVSTORE_TOKEN` or `KVSTORE_TOKEN_FILE`."""
    RPC_PERMISSION_DENIED = "rpc_permission_denied"
    """The client's credential does not allow a read. The log says what is missing."""
    RPC_RESOURCE_EXHAUSTED = "rpc_resource_exhausted"
    """A node has as many streams open as it allows. Add nodes, or run fewer workers."""
    RPC_UNIMPLEMENTED = "rpc_unimplemented"
    """What listens at a node's address is no kvstore node, or an older one."""
    RPC_INTERNAL = "rpc_internal"
    """gRPC failed inside a node or on the way, often in a proxy. The logs of both have the cause."""
    RPC_UNKNOWN = "rpc_unknown"
    """A read failed with an error that has no reason of its own here. The log has its message."""

    # ---- the comparison of the model with its canary (docs/canary.md)

    CANARY_PENDING = "canary_pending"
    """The model has not been compared with the cluster's canary yet. Later calls are reused."""
    STORE_CANARY_PENDING = "store_canary_pending"
    """As `canary_pending`: the KV of such a call is not stored either."""
    STORE_CANARY_DIFFERS = "store_canary_differs"
    """The model computes other KV here than where its canary was made, so its KV is not stored. Look for hooks, patched
    modules, other kernels or quantisation; `kvstore models` shows who made the canary."""
    STORE_CANARY_FAILED = "store_canary_failed"
    """The comparison with the canary failed, so the KV is not stored. The log has the error."""
    STORE_CANARY_REPLACED = "store_canary_replaced"
    """The canary was replaced during the call, so its KV is not stored. Later calls are."""

    # ---- requests of vLLM with a LoRA adapter (docs/engines/vllm.md)

    ADAPTER_PENDING = "adapter_pending"
    """The adapter's files are still being read, or the engine has not loaded it yet. Later requests are reused."""
    ADAPTER_UNREADABLE = "adapter_unreadable"
    """The adapter is not in a folder of this machine with `adapter_config.json` and `adapter_model.safetensors`, or
    these cannot be read. The log has the error."""
    ADAPTER_CHANGED = "adapter_changed"
    """The adapter's files, or its path, have changed since the engine has first loaded it. Load changed weights from a
    new path, as a new adapter."""
    ADAPTER_UNCALIBRATED = "adapter_uncalibrated"
    """Requests with an adapter are not reused by workers that store KV by a calibration, which is of the model without
    adapter. Set `KVSTORE_ENCODING=exact-zstd` for them."""
    STORE_ADAPTER_PENDING = "store_adapter_pending"
    """The engine was not seen to load the adapter, so KV that it computes with it is not stored."""
    STORE_ADAPTER_CHANGED = "store_adapter_changed"
    """As `adapter_changed`: KV that is computed with such an adapter is not stored either."""

    # ---- calls that are passed to the model as they are

    BYPASS_CANARY_DIFFERS = "bypass_canary_differs"
    """The model computes other KV here than where its canary was made. See `store_canary_differs`."""
    BYPASS_CANARY_FAILED = "bypass_canary_failed"
    """The model cannot be compared with its canary. The log has the error."""
    BYPASS_TRAINING = "bypass_training"
    """The model is in training mode. Call `model.eval()`."""
    BYPASS_AUTOCAST = "bypass_autocast"
    """Autocast is on in the calling thread, which changes the type of KV. Load the model in that type instead."""
    BYPASS_DISPATCH_MODE = "bypass_dispatch_mode"
    """A TorchDispatchMode is active in the calling thread. Leave it before the call."""
    BYPASS_FUNCTION_MODE = "bypass_function_mode"
    """A TorchFunctionMode other than that of `torch.device` is active in the calling thread. Leave it first."""
    BYPASS_ADAPTER = "bypass_adapter"
    """The model has PEFT adapters, and no weight shows which one is active. Merge the adapter into the model."""
    BYPASS_BATCH = "bypass_batch"
    """The call has no `input_ids`, or more than one row of them. Call once for each prompt."""
    BYPASS_ATTENTION_MASK = "bypass_attention_mask"
    """The attention mask hides tokens of the prompt, or pad tokens stand in it. Pass the prompt without padding."""
    BYPASS_ARGUMENT = "bypass_argument"
    """An argument or generation setting of the call may change the prompt's KV. `last_report.bypassed` names it."""
    BYPASS_MODE = "bypass_mode"
    """The call neither decodes greedily nor samples (beam search, assisted generation). `last_report.bypassed` names
    its mode."""
    BYPASS_FORWARD_HOOK = "bypass_forward_hook"
    """A forward hook on the model may change what it computes. Remove the hook; the log names it."""
    BYPASS_GLOBAL_HOOK = "bypass_global_hook"
    """A hook on all modules of the process may change what the model computes. Remove the hook; the log names it."""
    BYPASS_PATCHED_MODULE = "bypass_patched_module"
    """A module, method or function of the model was replaced, added or removed. The log names it."""
    BYPASS_CHANGED_SETTING = "bypass_changed_setting"
    """A setting of a module differs from what the model's config implies. The log names it."""
    BYPASS_MODEL_CHANGED = "bypass_model_changed"
    """The model was changed after it was wrapped and can no longer be described. Wrap it again."""

    # ---- storing

    STORE_CLOSED = "store_closed"
    """The client was closed before the chunks were handed in."""
    STORE_BACKLOG = "store_backlog"
    """`KVSTORE_STORE_BACKLOG_BYTES` of KV wait to be stored already. The nodes take it too slowly, it waits for a pause
    of the engine (`KVSTORE_STORE_IDLE_WAIT_S`), or the limit is too small."""
    STORE_NO_RESOURCES = "store_no_resources"
    """This process has no thread left for storing."""
    STORE_DROPPED_AT_CLOSE = "store_dropped_at_close"
    """The client was closed, and chunks were not stored within `KVSTORE_CLOSE_TIMEOUT_S`."""
    STORE_CANCELLED = "store_cancelled"
    """The caller, or closing the client, ended the put. This is normal work."""
    STORE_INTERNAL_ERROR = "store_internal_error"
    """A bug in kvstore or in a caller's callback. The log has the traceback."""
    STORE_MODEL_CHANGED = "store_model_changed"
    """The model was changed during the call, so its KV is not stored. Do not change a model while it generates."""
    STORE_UNALIGNED = "store_unaligned"
    """The keys that hooks recorded do not cover all tokens of the call, so its KV is not stored."""
    STORE_BEHIND_LOSSY = "store_behind_lossy"
    """The KV was computed behind fetched KV that is less faithful than what the client stores. This is normal work with
    a lossy `KVSTORE_ACCEPT` or `KVSTORE_FLOOR`; add a lossy encoding to `KVSTORE_ENCODING` to store it."""
    STORE_BEHIND_PART = "store_behind_part"
    """The KV was computed over a part of a prefix, as `KVSTORE_BUDGET` or the call says, so it is not stored: a plain
    prefill computes other KV. This is normal work."""
    STORE_NO_CALIBRATION = "store_no_calibration"
    """The encoding needs a calibration of the model, and there is none. Make one with `kvstore calibrate --publish`."""
    STORE_UNENCODABLE = "store_unencodable"
    """The KV of a chunk cannot be coded, for example because it is not finite. The log has the error."""
    STORE_UNREACHABLE = "store_unreachable"
    """The coordinator or a node could not be reached. See `unreachable`."""
    STORE_PAUSED = "store_paused"
    """All owners of the chunk failed a moment ago, or the client is being closed. See `paused`."""
    STORE_STALLED = "store_stalled"
    """A node took and acknowledged nothing for `KVSTORE_PUT_STALL_TIMEOUT_S`. Check the node and the network."""
    STORE_TIMEOUT = "store_timeout"
    """A batch was not stored within `KVSTORE_PUT_TIMEOUT_S`. The link or the node is too slow for it."""
    STORE_PROTOCOL = "store_protocol"
    """A node's answer to a put violates the protocol. Check that client and nodes have compatible versions."""
    STORE_TLS = "store_tls"
    """No TLS connection to a node's bulk port. Check `KVSTORE_TLS_CA`, the node's certificate and the client's."""
    STORE_REFUSED = "store_refused"
    """A node refused a put, perhaps for lack of a valid credential; the log has its message."""
    STORE_TEXT_CUT = "store_text_cut"
    """The node has no room for the whole text and keeps its beginning. This is normal work; more memory or disk on the
    nodes makes it rarer."""
    STORE_INVALID = "store_invalid"
    """A node found a chunk malformed or damaged. Check the network, and that the versions are compatible."""
    STORE_TOO_LARGE = "store_too_large"
    """A chunk is larger than the node can ever hold. Give the node more memory."""
    STORE_FULL = "store_full"
    """Everything on the node that could make room is leased or pinned, or the node is draining. Add memory or nodes."""
    STORE_OVER_QUOTA = "store_over_quota"
    """The tenant's quota is used up by chunks that cannot be evicted. Raise it with `kvstore quota`."""
    STORE_NOT_DURABLE = "store_not_durable"
    """`KVSTORE_PUT_DURABILITY=durable` was asked for, and the node's disk is full, read-only, failing or missing."""
    STORE_FORGOTTEN = "store_forgotten"
    """An operator had the tenant forgotten (`kvstore tenants forget`) during the put. Later puts are stored."""
    STORE_RPC_INVALID_ARGUMENT = "store_rpc_invalid_argument"
    """A node refused a put as invalid. Check that client and nodes have compatible versions."""
    STORE_RPC_UNAUTHENTICATED = "store_rpc_unauthenticated"
    """As `rpc_unauthenticated`, for a put."""
    STORE_RPC_PERMISSION_DENIED = "store_rpc_permission_denied"
    """The client's credential does not allow a put. The log says what is missing."""
    STORE_RPC_RESOURCE_EXHAUSTED = "store_rpc_resource_exhausted"
    """A node has as many streams open as it allows. Add nodes, or run fewer workers."""
    STORE_RPC_UNIMPLEMENTED = "store_rpc_unimplemented"
    """What listens at a node's address is no kvstore node, or an older one."""
    STORE_RPC_INTERNAL = "store_rpc_internal"
    """gRPC failed inside a node or on the way, often in a proxy. The logs of both have the cause."""
    STORE_RPC_UNKNOWN = "store_rpc_unknown"
    """A put failed with an error that has no reason of its own here. The log has its message."""

    # ---- calibrations

    CALIBRATION_CLOSED = "calibration_closed"
    """The client was closed before the calibration was loaded."""
    CALIBRATION_PAUSED = "calibration_paused"
    """Loading this calibration failed a moment ago, so the registry was not asked. It is asked again later."""
    CALIBRATION_PROTOCOL = "calibration_protocol"
    """The coordinator's answer violates the protocol. Check that client and coordinator have compatible versions."""
    CALIBRATION_TOO_LARGE = "calibration_too_large"
    """The coordinator sent more bytes than any calibration has."""
    CALIBRATION_DAMAGED = "calibration_damaged"
    """The calibration from the coordinator does not have its digest. Publish it again."""
    CALIBRATION_UNUSABLE = "calibration_unusable"
    """The calibration is invalid or of an unknown format. Make a new one with `kvstore calibrate --publish`."""
    CALIBRATION_NO_RESOURCES = "calibration_no_resources"
    """This process has no thread left to load a calibration."""
    CALIBRATION_INTERNAL_ERROR = "calibration_internal_error"
    """A bug in kvstore. The log has the traceback; report it."""
    CALIBRATION_CACHE_DAMAGED = "calibration_cache_damaged"
    """A file in `KVSTORE_CACHE_DIR` was damaged. It is deleted and downloaded again."""
    CALIBRATION_CACHE_UNREADABLE = "calibration_cache_unreadable"
    """A file in `KVSTORE_CACHE_DIR` cannot be read; the calibration is downloaded. Check the folder's permissions."""
    CALIBRATION_CACHE_UNWRITABLE = "calibration_cache_unwritable"
    """`KVSTORE_CACHE_DIR` cannot be written, so every process downloads calibrations again. Set a writable folder."""
    CALIBRATION_RPC_NOT_FOUND = "calibration_rpc_not_found"
    """The cluster does not have the calibration that its chunks were stored with. Publish it again."""
    CALIBRATION_RPC_UNAVAILABLE = "calibration_rpc_unavailable"
    """The coordinator could not be reached, or its catalogue could not. See `unreachable`."""
    CALIBRATION_RPC_DEADLINE_EXCEEDED = "calibration_rpc_deadline_exceeded"
    """The calibration did not arrive within `KVSTORE_CALIBRATION_TIMEOUT_S`."""
    CALIBRATION_RPC_DATA_LOSS = "calibration_rpc_data_loss"
    """The coordinator's copy of the calibration is damaged. Publish it again."""
    CALIBRATION_RPC_UNAUTHENTICATED = "calibration_rpc_unauthenticated"
    """As `rpc_unauthenticated`, for the coordinator."""
    CALIBRATION_RPC_PERMISSION_DENIED = "calibration_rpc_permission_denied"
    """The client's credential does not allow it: to publish a calibration, it needs `admin` for every tenant."""
    CALIBRATION_RPC_UNIMPLEMENTED = "calibration_rpc_unimplemented"
    """The coordinator is older than calibrations, or `KVSTORE_ADDRESS` leads to no kvstore service."""
    CALIBRATION_RPC_UNKNOWN = "calibration_rpc_unknown"
    """The registry failed with an error that has no reason of its own here. The log has its message."""

    @classmethod
    def of_header(cls, error: CodecError) -> "MissReason":
        """Why a chunk with such a header is not used."""
        if isinstance(error, SignatureError):
            return cls.UNSIGNED if isinstance(error, UnsignedChunkError) else cls.BAD_SIGNATURE
        return cls.CALIBRATION_FOREIGN if isinstance(error, CalibrationError) else cls.BAD_HEADER

    @classmethod
    def of_frames(cls, error: CodecError) -> "MissReason":
        """Why frames cannot be used."""
        if isinstance(error, SignatureError):
            return cls.BAD_SIGNATURE
        if isinstance(error, ChecksumError):
            return cls.CHECKSUM
        return cls.CALIBRATION if isinstance(error, CalibrationError) else cls.UNDECODABLE

    @classmethod
    def of_fetch(cls, failure: str) -> "MissReason":
        """Why a chunk was not read, by the `reason` of a TransferError."""
        return cls._known(failure) or cls.RPC_UNKNOWN

    @classmethod
    def of_store(cls, failure: str) -> "MissReason":
        """Why a chunk was not stored, by the `reason` of a TransferError."""
        return cls._known(f"store_{failure}") or cls.STORE_RPC_UNKNOWN

    @classmethod
    def of_calibration(cls, code: str) -> "MissReason":
        """Why the registry gave no calibration, by the name of a gRPC status."""
        return cls._known(f"calibration_rpc_{code.lower()}") or cls.CALIBRATION_RPC_UNKNOWN

    @classmethod
    def of_canary(cls, why: str, *, storing: bool) -> "MissReason":
        """Why a call looks nothing up, or does not store its KV, by the word of a canary's verdict."""
        if storing:
            return cls._known(f"store_{why}") or cls.STORE_CANARY_PENDING
        return cls._known(why) or cls.CANARY_PENDING

    @classmethod
    def of_bypass(cls, why: str) -> "MissReason":
        """Why a call was passed through, by the word of its report. The names of arguments and modes are left to the
        report: users can write any, and a label for each would grow without a limit."""
        return cls._known(f"bypass_{why}") or (
            cls.BYPASS_MODE if why.startswith("mode_") else cls.BYPASS_ARGUMENT
        )

    @classmethod
    def _known(cls, value: str) -> "MissReason | None":
        try:
            return cls(value)
        except ValueError:
            return None
