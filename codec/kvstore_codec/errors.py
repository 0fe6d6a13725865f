"""The one error tree of the service.

KVStoreError
├── ConfigurationError            a setting is wrong; says which and what would be right
│   └── FolderInUseError          a data folder that another process has
├── CodecError
│   ├── UnsupportedModelError     the model's KV cannot be described or reused; says why
│   ├── InvalidKVError            tensors whose shape, dtype or values do not fit the ModelSpec
│   ├── InvalidTokensError        token ids that are not whole numbers of 32 bits
│   ├── UnknownEncodingError      a rate or coder that does not exist
│   ├── CoderUnavailableError     a coder that exists but cannot run on this machine; says why
│   ├── CalibrationError          a calibration that is damaged, of another model, or not at hand
│   ├── CanaryError               KV of the probe that is damaged, of another model, or cannot be computed
│   └── ChunkFormatError          bytes that are not a chunk, or not a whole one
│       ├── UnsupportedVersionError
│       ├── TruncatedChunkError
│       ├── ChecksumError
│       ├── SampleMismatchError    sound bytes that decode to other samples than were encoded
│       └── ForeignChunkError     a sound chunk, but of another model, text or context than asked for
├── StorageError
│   ├── ArenaFullError            nothing left that may be evicted
│   │   └── TextTooLongError      but the beginning of the text itself
│   ├── ChunkTooLargeError
│   ├── ChunkNotFoundError
│   ├── FrameRangeError           frames that the stored chunk does not have
│   ├── OverQuotaError            the tenant's quota is full of what may not be evicted
│   ├── NotDurableError           durability was asked for that the node cannot promise now
│   ├── DiskError                 a node's disk tier; the node goes on without it
│   │   ├── DiskFullError
│   │   ├── DiskReadOnlyError
│   │   └── DiskFailedError       reading, writing or syncing failed
│   └── PutStateError             put verbs out of order, or a size that differs from the announced one
├── ClusterError
│   ├── CatalogueError            the coordinator's durable state cannot be read or written
│   ├── UnknownNodeError          the cluster never heard of that storage node
│   ├── TooManyPinsError
│   ├── TooManyQuotasError
│   ├── UnknownCalibrationError   the registry has no calibration of that digest
│   ├── CalibrationSizeError      more or fewer bytes than announced
│   ├── CalibrationTooLargeError
│   ├── DamagedCalibrationError   bytes that do not have their digest
│   └── UnknownModelError         the cluster keeps no canary of that ModelSpec digest
├── MatchFormatError              bytes that are not a match of this model, or not a whole one
├── NotCopyableError              an object that holds threads, hooks or connections was copied or pickled
├── PublishError                  a calibration was not taken by the registry; says why
├── ServiceError
│   ├── AddressInUseError
│   ├── StartupError
│   └── RequestError              a request that an endpoint does not serve
│       ├── MalformedRequestError
│       ├── BusyError             too much is under way; may be tried again
│       └── AbandonedRequestError its client has gone
└── FetchError                    never leaves the client: a fetch turns it into a miss with a reason
    ├── NodeUnavailableError
    └── TransferError             a read or put of KV bytes broke off; `reason` is one word for the metrics

It lives in the codec because every part knows the codec and the codec knows nobody.
"""


class KVStoreError(Exception):
    """Root of every error this project raises on purpose."""


class ConfigurationError(KVStoreError): ...


class FolderInUseError(ConfigurationError): ...


class CodecError(KVStoreError): ...


class UnsupportedModelError(CodecError): ...


class InvalidKVError(CodecError): ...


class InvalidTokensError(CodecError, ValueError): ...


class UnknownEncodingError(CodecError): ...


class CoderUnavailableError(CodecError): ...


class CalibrationError(CodecError): ...


class CanaryError(CodecError): ...


class ChunkFormatError(CodecError): ...


class UnsupportedVersionError(ChunkFormatError): ...


class TruncatedChunkError(ChunkFormatError): ...


class ChecksumError(ChunkFormatError): ...


class SampleMismatchError(ChunkFormatError):
    """`found`: the checksum of the samples that came out."""

    def __init__(self, found: int, expected: int) -> None:
        super().__init__(
            f"a frame decodes to other samples than were encoded (xxh3 {found:016x} instead of {expected:016x}): "
            "a broken encoder or an attacker wrote it"
        )
        self.found = found


class ForeignChunkError(ChunkFormatError): ...


class StorageError(KVStoreError): ...


class ArenaFullError(StorageError): ...


class TextTooLongError(ArenaFullError): ...


class NodeDrainingError(StorageError): ...


class ChunkTooLargeError(StorageError): ...


class ChunkNotFoundError(StorageError): ...


class FrameRangeError(StorageError): ...


class PutStateError(StorageError): ...


class OverQuotaError(StorageError): ...


class NotDurableError(StorageError): ...


class DiskError(StorageError): ...


class DiskFullError(DiskError): ...


class DiskReadOnlyError(DiskError): ...


class DiskFailedError(DiskError): ...


class SegmentRemovedError(DiskFailedError): ...


class ClusterError(KVStoreError): ...


class CatalogueError(ClusterError): ...


class UnknownNodeError(ClusterError): ...


class TooManyPinsError(ClusterError): ...


class TooManyQuotasError(ClusterError): ...


class UnknownCalibrationError(ClusterError): ...


class CalibrationSizeError(ClusterError): ...


class CalibrationTooLargeError(ClusterError): ...


class DamagedCalibrationError(ClusterError): ...


class UnknownModelError(ClusterError): ...


class MatchFormatError(KVStoreError): ...


class NotCopyableError(KVStoreError, TypeError): ...


class PublishError(KVStoreError): ...


class ServiceError(KVStoreError): ...


class AddressInUseError(ServiceError): ...


class StartupError(ServiceError): ...


class RequestError(ServiceError): ...


class MalformedRequestError(RequestError): ...


class BusyError(RequestError): ...


class AbandonedRequestError(RequestError): ...


class FetchError(KVStoreError): ...


class NodeUnavailableError(FetchError): ...


class FetchIncompleteError(FetchError):
    """Raised out of a forward pass whose reused KV will not all arrive; the adapter catches it and starts over."""


class TransferError(FetchError):
    """`reason`: timeout, unreachable, cancelled, protocol, or what the other side called it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
