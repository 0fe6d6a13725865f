"""All errors of the project, as one tree.

KVStoreError
├── ConfigurationError            a setting is invalid; the message names it and a valid value
│   ├── FolderInUseError          another process uses the data folder
│   └── EncryptionKeyError        files on disk are encrypted with a key that is not given
├── CodecError
│   ├── UnsupportedModelError     the model's KV cannot be described or reused; the message says why
│   ├── InvalidKVError            tensors whose shape, dtype or values do not match the ModelSpec
│   ├── InvalidTokensError        token ids that are not 32-bit integers
│   ├── UnknownEncodingError      an unknown rate or coder
│   ├── CoderUnavailableError     a known coder that cannot run on this machine; the message says why
│   ├── CalibrationError          a calibration that is damaged, of another model, or missing
│   ├── CanaryError               KV of the probe that is damaged, of another model, or not computable
│   └── ChunkFormatError          bytes that are not a whole chunk
│       ├── UnsupportedVersionError
│       ├── TruncatedChunkError
│       ├── ChecksumError
│       ├── SignatureError         not signed by a key of the reader, or other bytes than were signed
│       │   └── UnsignedChunkError
│       ├── SampleMismatchError    intact bytes that decode to other samples than were encoded
│       └── ForeignChunkError     an intact chunk of another model, text or context than requested
├── StorageError
│   ├── ArenaFullError            no chunk may be evicted to make room
│   │   └── TextTooLongError      only the beginning of the same text could be evicted
│   ├── ChunkTooLargeError
│   ├── ChunkNotFoundError
│   ├── ForgottenTenantError      the chunk's tenant was forgotten while the chunk was put
│   ├── FrameRangeError           frames that the stored chunk does not have
│   ├── OverQuotaError            the quota is full, and none of the tenant's chunks may be evicted
│   ├── NotDurableError           the node cannot give the requested durability now
│   ├── DiskError                 a failure of the disk tier; the node continues without it
│   │   ├── DiskFullError
│   │   ├── DiskReadOnlyError
│   │   └── DiskFailedError       reading, writing or syncing failed
│   └── PutStateError             put steps out of order, or a size that differs from the announced one
├── ClusterError
│   ├── CatalogueError            the coordinator's durable state cannot be read or written
│   ├── UnknownNodeError          no storage node of that name has joined the cluster
│   ├── TooManyPinsError
│   ├── TooManyQuotasError
│   ├── TooManyForgettingsError   a tenant was forgotten again and again
│   ├── UnknownCalibrationError   the registry has no calibration with that digest
│   ├── CalibrationSizeError      more or fewer bytes than announced
│   ├── CalibrationTooLargeError
│   ├── DamagedCalibrationError   bytes that do not match their digest
│   └── UnknownModelError         the cluster has no canary for that ModelSpec digest
├── MatchFormatError              bytes that are not a whole match of this model
├── UnsupportedEngineError        an engine whose version or KV layout is unknown; the message says why
├── NotCopyableError              an object with threads, hooks or connections was copied or pickled
├── PublishError                  the registry did not accept a calibration; the message says why
├── ServiceError
│   ├── AddressInUseError
│   ├── StartupError
│   └── RequestError              a request that an endpoint refuses
│       ├── MalformedRequestError
│       ├── UnauthenticatedError  no credential, or none that is valid here
│       ├── PermissionDeniedError the caller's credential does not allow the call
│       ├── BusyError             too many requests are in progress; retry later
│       └── AbandonedRequestError its client has disconnected
└── FetchError                    never raised to users: a fetch turns it into a miss with a reason
    ├── NodeUnavailableError
    └── TransferError             a read or put of KV bytes was interrupted; `reason` is a metric label

It is in the codec because every package imports the codec and the codec imports none.
"""


class KVStoreError(Exception):
    """Base class of every error that this project raises."""


class ConfigurationError(KVStoreError): ...


class FolderInUseError(ConfigurationError): ...


class EncryptionKeyError(ConfigurationError): ...


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
    """The decoded samples differ from the encoded ones. `found` is the checksum of the decoded samples."""

    def __init__(self, found: int, expected: int) -> None:
        super().__init__(
            f"a frame decodes to other samples than were encoded (xxh3 {found:016x} instead of {expected:016x}): "
            "a broken encoder or an attacker wrote it"
        )
        self.found = found


class SignatureError(ChunkFormatError): ...


class UnsignedChunkError(SignatureError): ...


class ForeignChunkError(ChunkFormatError): ...


class StorageError(KVStoreError): ...


class ArenaFullError(StorageError): ...


class TextTooLongError(ArenaFullError): ...


class NodeDrainingError(StorageError): ...


class ChunkTooLargeError(StorageError): ...


class ChunkNotFoundError(StorageError): ...


class ForgottenTenantError(StorageError): ...


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


class TooManyForgettingsError(ClusterError): ...


class UnknownCalibrationError(ClusterError): ...


class CalibrationSizeError(ClusterError): ...


class CalibrationTooLargeError(ClusterError): ...


class DamagedCalibrationError(ClusterError): ...


class UnknownModelError(ClusterError): ...


class MatchFormatError(KVStoreError): ...


class UnsupportedEngineError(KVStoreError): ...


class NotCopyableError(KVStoreError, TypeError): ...


class PublishError(KVStoreError): ...


class ServiceError(KVStoreError): ...


class AddressInUseError(ServiceError): ...


class StartupError(ServiceError): ...


class RequestError(ServiceError): ...


class MalformedRequestError(RequestError): ...


class BusyError(RequestError): ...


class UnauthenticatedError(RequestError): ...


class PermissionDeniedError(RequestError): ...


class AbandonedRequestError(RequestError): ...


class FetchError(KVStoreError): ...


class NodeUnavailableError(FetchError): ...


class FetchIncompleteError(FetchError):
    """Ends a forward pass whose reused KV will not all arrive. The engine adapter catches it and starts again."""


class TransferError(FetchError):
    """`reason` is timeout, unreachable, cancelled, protocol, or a reason that the node sent."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
